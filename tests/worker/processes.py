"""The processes under one, by name."""

from pathlib import Path


def below(pid: int) -> list[int]:
    """The process and all under it."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += below(int(child))
    return found


def named(pid: int, name: str) -> list[int]:
    return [found for found in below(pid) if Path(f"/proc/{found}/cmdline").read_bytes().startswith(name.encode())]
