"""Holds a benchmark's rows against the last kept ones of the same card and configuration.

usage: python hack/bench/NAME.py ... | python hack/bench/compare.py [FILE ...] [--tolerance 0.05] [--keep]
  [--figures DIR]

Reads the JSON lines that benchmarks print and passes over all other lines. The exit code is 1 where a figure is worse
than the last by more than the tolerance, where a row failed, or where there is none; 0 otherwise, also where there is
nothing to compare with. --keep stores the rows that did not fail, in a file each:
hack/bench/figures/CARD/BENCHMARK-CONFIGURATION.json. """

import argparse
import fileinput
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parent / "figures"
KEYS = {"benchmark", "card", "configuration", "lower", "higher", "more"}
Row = dict[str, Any]


def rows(lines: Iterable[str]) -> Iterator[Row]:
    """Of those lines that are a row."""
    for line in lines:
        try:
            found = json.loads(line) if line.startswith("{") else None
        except ValueError:
            continue
        if isinstance(found, dict) and found.keys() >= KEYS:
            yield found


def place(row: Row) -> Path:
    """Of its file, below the figures'."""
    text = json.dumps(row["configuration"], sort_keys=True)
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(re.sub(r"\W+", "-", row["card"])) / f"{row['benchmark']}-{mark}.json"


def changes(last: Row, now: Row) -> dict[str, float]:
    """By figure that both have, how much worse it is: 0.1 is a tenth, and less than 0 is better."""
    found = {}
    for direction in ("lower", "higher"):
        for name in last[direction].keys() & now[direction].keys():
            before, after = last[direction][name], now[direction][name]
            ratio = after / before if direction == "lower" else before / after if after else float("inf")
            found[name] = ratio - 1
    return dict(sorted(found.items()))


def told(last: Row | None, now: Row, tolerance: float) -> tuple[bool, list[str]]:
    """Whether it is well, and what is to be said of it."""
    title = f"{now['benchmark']} on {now['card']}, {now['configuration']}"
    if error := now["more"].get("error"):
        return False, [f"FAILED  {title}: {error}"]
    if last is None:
        return True, [f"new     {title}"]
    lines, well = [f"        {title}, last of {last['date']} ({last['commit'] or 'no commit'})"], True
    for name, worse in changes(last, now).items():
        values = [row[key][name] for row in (last, now) for key in ("lower", "higher") if name in row[key]]
        bad = worse > tolerance
        well &= not bad
        how = f"{abs(worse):.1%} {'worse' if worse > 0 else 'better'}"
        lines.append(f"{'WORSE' if bad else 'ok':7} {name}: {values[0]:g} -> {values[1]:g}, {how}")
    return well, lines


def keep(figures: Path, row: Row) -> None:
    path = figures / place(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="default: standard input")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    given = parser.parse_args(arguments)
    with fileinput.input(given.files or ["-"]) as lines:
        found = list(rows(lines))
    well = bool(found)
    for row in found:
        path = given.figures / place(row)
        fine, words = told(json.loads(path.read_text()) if path.exists() else None, row, given.tolerance)
        well &= fine
        print("\n".join(words))
        if given.keep and not row["more"].get("error"):
            keep(given.figures, row)
    if not found:
        print("no row of a benchmark", file=sys.stderr)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
