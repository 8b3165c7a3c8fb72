"""How a driver's end is put in words."""

import re
import signal

from rlhf_operator.observed import Termination

WORDS_MAX, HEADLINE_MAX = 4096, 200
# The line of a python traceback, or of the driver's own last words, that names the error.
ERROR_LINE = re.compile(r"(?:[a-z_]\w*\.)*[A-Z]\w*(?:: |$)")


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
    """The line that names the error, else the last one: enough to know it again by."""
    lines = [line.strip() for line in (words or "").splitlines() if line.strip()]
    return next((line for line in lines if ERROR_LINE.match(line)), lines[-1] if lines else "")[:most]


def brief(message: str, words: str | None) -> str:
    """For conditions and Events; the whole text stands in `status.failures` alone."""
    head = headline(words)
    return f"{message}: {head}" if head else message
