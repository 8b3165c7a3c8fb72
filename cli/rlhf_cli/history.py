"""What the driver prints, read again: the curves of a run that the status does not keep. Pure."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rlhf_cli.exits import Wrong
from rlhf_client.errors import nearest

# `rlhf_worker.progress.line`, which a test holds this against.
STEP = re.compile(r"^step (\d+)/(\d+)  reward (\S+)  (\S+) tok/s  .*?(\d+\.\d+) s \(", re.MULTILINE)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ACTOR = re.compile(r"^\((\w+)[^)]*\bpid=\d+")  # as Ray prefixes what an actor prints
SOURCES = {"driver": (), "engines": ("Engine",), "trainer": ("Policy", "Trainer"), "feed": ("Feed",)}


@dataclass(frozen=True, slots=True)
class Step:
    number: int
    total: int
    reward: float
    tokens_per_second: float
    seconds: float


def steps(lines: Iterable[str]) -> list[Step]:
    """By their number; of one that was taken twice, after a restart, the last."""
    found = dict[int, Step]()
    for line in lines:
        if match := STEP.match(COLOURS.sub("", line)):
            number, total, *values = match.groups()
            try:
                found[int(number)] = Step(int(number), int(total), *map(float, values))
            except ValueError:
                continue
    return [found[number] for number in sorted(found)]


def of_source(lines: Iterable[str], source: str) -> Iterator[str]:
    """Lines of the driver itself, or of its actors of one kind, which Ray sends to it."""
    if source not in SOURCES:
        raise Wrong(f"--of {source}{nearest(source, list(SOURCES))}: one of {', '.join(SOURCES)}")
    for line in lines:
        actor = ACTOR.match(COLOURS.sub("", line))
        if (actor is None) if source == "driver" else (actor is not None and actor[1] in SOURCES[source]):
            yield line
