"""How a driver's end is put in words."""

import re
import signal

from rlhf_operator.observed import Termination

WORDS_MAX, HEADLINE_MAX = 4096, 300
TRACEBACK = "Traceback (most recent call last):"
# The line of a python traceback, or of the driver's own last words, that names the error.
ERROR_LINE = re.compile(r"(?:[a-z_]\w*\.)*[A-Z]\w*(?:: |$)")
# What the driver says of several errors; each has a line with its number below.
SEVERAL, NUMBERED = re.compile(r".*\b\d+ things are wrong:$"), re.compile(r"\d+\. ")


def how_it_ended(run: Termination, who: str = "the driver") -> str:
    if run.signal is None:
        return f"{who} ended with exit code {run.exit_code}"
    return f"{who} was killed by {_name(run.signal)} (signal {run.signal})"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a signal"


def last_words(run: Termination) -> str | None:
    """In whole lines, as many as there is room for."""
    text = run.message
    if len(text) > WORDS_MAX:
        text = text[-WORDS_MAX:]
        text = text.partition("\n")[2] or text
    return text or None


def headline(words: str | None, most: int = HEADLINE_MAX) -> str:
    """The line that names the error, else the last one: enough to know it again by. Where that line only leads to a
    traceback, the error that the traceback ends with stands in its place. Where it leads to several errors, they stand
    behind it, and share the room of two lines."""
    lines = [line.strip() for line in (words or "").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)] or lines[-1:]
    if not errors:
        return ""
    if SEVERAL.match(errors[0]):
        parts = [line for line in lines[lines.index(errors[0]) :] if NUMBERED.match(line)]
        return " ".join([errors[0][:most], *(part[: 2 * most // len(parts)] for part in parts)])
    first, leads, _ = errors[0].partition(TRACEBACK)
    if not leads:
        return first[:most]
    last = errors[-1][:most]
    return f"{first[: max(0, most - len(last))]}{last}"


def brief(message: str, words: str | None) -> str:
    """For conditions and Events; the whole text stands in `status.failures` alone."""
    head = headline(words)
    return f"{message}: {head}" if head else message
