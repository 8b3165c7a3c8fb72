"""The processes under one, by name. Any may end while it is looked at."""

from contextlib import suppress
from pathlib import Path

from rlhf_worker import watcher


def below(pid: int) -> list[int]:
    """The process and all under it."""
    return [pid, *watcher.below(pid)]


def title(pid: int) -> str:
    """Empty for one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0")
    return ""


def named(pid: int, name: str) -> list[int]:
    return [found for found in below(pid) if title(found).startswith(name)]
