"""Numbers and tables as text. Pure."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
GAP = 3  # between columns


def in_words(seconds: float) -> str:
    """75 -> 1m15s, 5400 -> 1h30m, 200000 -> 2d7h"""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def age(stamp: str | None, now: datetime) -> str:
    """Since an RFC 3339 time; empty for none, or for what is no time."""
    try:
        return in_words((now - datetime.fromisoformat(stamp or "")).total_seconds())
    except (ValueError, TypeError):
        return ""


def utc() -> datetime:
    return datetime.now(UTC)


def sparkline(values: Sequence[float], width: int) -> str:
    """One character a value, or a mean of several where there are more than `width`. Values that are no numbers are
    spaces; equal ones lie in the middle.
    """
    shown = _binned(values, width)
    finite = [value for value in shown if value == value and abs(value) != float("inf")]
    if not finite:
        return " " * len(shown)
    low, high = min(finite), max(finite)
    return "".join(_bar(value, low, high) for value in shown)


def _bar(value: float, low: float, high: float) -> str:
    if value != value or abs(value) == float("inf"):
        return " "
    if high == low:
        return BARS[len(BARS) // 2]
    return BARS[min(len(BARS) - 1, int((value - low) / (high - low) * len(BARS)))]


def _binned(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def short(value: float) -> str:
    """Three digits, or a whole number where it has more before the point."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, keep: Sequence[str]) -> list[str]:
    """Lines of at most `width` characters where that can be: columns beside `keep` go, the last one first."""
    shown = list(columns)
    while True:
        places = [columns.index(name) for name in shown]
        sizes = [max(len(columns[at]), *(len(row[at]) for row in rows), 0) for at in places]
        spare = [name for name in shown if name not in keep]
        if sum(sizes) + GAP * (len(sizes) - 1) <= width or not spare:
            break
        shown.remove(spare[-1])
    lines = [columns, *rows]
    return [(" " * GAP).join(line[at].ljust(size) for at, size in zip(places, sizes, strict=True)).rstrip()
        for line in lines]
