"""Text that others cut off: kept to whole lines, and to bytes that every reader takes. Pure."""

import re

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of Ray's tracebacks


def printable(text: str) -> str:
    """Without colours, and with half a surrogate pair, which some inputs hold, as its escape: no encoder takes it."""
    return COLOURS.sub("", text).encode("utf-8", "backslashreplace").decode()


def first_lines(text: str, room: int) -> str:
    """The lines that fit into `room` bytes; of a first one that does not, its beginning."""
    if len(text.encode()) <= room:
        return text
    cut = text.encode()[:room].decode(errors="ignore")
    return cut.rpartition("\n")[0] or cut


def last_lines(text: str, room: int) -> str:
    """The last lines that fit into `room` bytes; none when the last one does not."""
    data = text.encode()
    if len(data) <= room:
        return text
    return data[len(data) - room - 1 :].partition(b"\n")[2].decode() if room > 0 else ""
