"""Who may write a checkpoint path: of all drivers that ever did, the one that took it over last.

`<path>/fence/<number>.json` is one take-over: who, when, and from which checkpoint it went on. Its own driver alone
writes that file. The highest number holds the path; everyone else is refused by `check`, which whoever publishes calls
first. As a check and what follows it are two calls, an earlier driver may still publish once, late. The line of
take-overs makes that harmless: what lies beyond the checkpoint that a later driver went on from never counts
(`standing`).

A driver that takes over from many puts their turns into one file, `until-<number>.json`, and removes theirs: nothing is
forgotten, and the highest number keeps a file of its own. A late writer may create a number anew that was removed so;
that is no take-over.
"""

import json
import platform
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from rlhf_worker.errors import BadData, DeadlineExceeded, Fenced
from rlhf_worker.storage import Store

DIRECTORY = "fence"
POLL_SECONDS = 0.2
STALE_SECONDS = 120.0  # more than a client of NFS shows files that are gone
MOST_FILES = 16  # of earlier take-overs; with more they become one
T = TypeVar("T")
PAST = re.compile(r"until-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Writer:
    """`attempt`: the job's, counted by the operator; 0: a run by hand.

    `driver`: the same in all processes of one driver, and in no other.
    """

    job: str
    attempt: int
    driver: str

    @property
    def mark(self) -> str:
        """In the names of what it writes, so that no two writers ever touch the same file."""
        return f"attempt-{self.attempt}-{zlib.crc32(f'{self.job}/{self.driver}'.encode()):08x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One take-over. `resumed`: the checkpoint it went on from, "" for none; None: it has not said yet."""

    number: int
    mark: str
    job: str
    attempt: int
    host: str
    time: str
    resumed: str | None = None


def outranks(turn: Turn, writer: Writer) -> bool:
    """Whether `writer` may not take over from it: a higher attempt of its job is there. A run by hand may always."""
    return 0 < writer.attempt < turn.attempt and turn.job == writer.job


def barred(line: Sequence[Turn], writer: Writer) -> Turn | None:
    """The turn that keeps `writer` from taking over: of a higher attempt, or of another job after this very attempt."""
    for turn in reversed(line):
        if outranks(turn, writer) or (turn.job != writer.job and _was_before(line, turn, writer)):
            return turn
    return None


def _was_before(line: Sequence[Turn], turn: Turn, writer: Writer) -> bool:
    """A suspended job comes back with a higher attempt: one that was here before `turn` is what that took over from."""
    mine = [own for own in line if own.job == writer.job and own.number < turn.number]
    return bool(writer.attempt and any(own.attempt >= writer.attempt for own in mine))


def standing(names: Sequence[tuple[str, int, str | None]], line: Sequence[Turn]) -> list[str]:
    """Of checkpoints, each by name, step and mark, oldest first: those that count."""
    numbers = {turn.mark: turn.number for turn in line}
    kept = sorted((step, numbers.get(mark or "", 0), name) for name, step, mark in names)
    steps = {name: step for name, step, _ in names}
    return [name for step, number, name in kept if not _void(name, step, number, line, steps)]


def _void(name: str, step: int, number: int, line: Sequence[Turn], steps: dict[str, int]) -> bool:
    """A later turn went on from before it, and none after that chose it all the same."""
    later = [turn for turn in line if turn.number > number and turn.resumed is not None]
    chosen = max((turn.number for turn in later if turn.resumed == name), default=0)
    return any(turn.number > chosen and step > _step(turn.resumed or "", steps) for turn in later)


def _step(name: str, steps: dict[str, int]) -> int:
    """Of a checkpoint's name, which may be pruned by now."""
    return steps[name] if name in steps else int(name.split(".")[0].removeprefix("step-") or 0)


class Fence:
    """One writer's view of the line. `take` first, by one process of a driver; any may `check`.

    What fails to be read or written raises OSError.
    """

    def __init__(self, store: Store, writer: Writer) -> None:
        self.store = store
        self.writer = writer
        self._chosen: str | None = None
        self._said: dict[int, Turn] = {}  # turns that will not change any more
        self._past: tuple[int, list[Turn]] = (0, [])  # those in one file, and up to which number

    def line(self) -> list[Turn]:
        """Every take-over, in order. Raises BadData."""
        return self._settled(self._line)

    def _line(self) -> list[Turn]:
        numbers, until = self._listed()
        if until != self._past[0]:
            self._past = until, self._parsed(
                _past(until), lambda found: [Turn(**turn) for turn in found]
            ) if until else []
        turns = {turn.number: turn for turn in self._past[1]}
        found = [self._said.get(number) or self._read(number) for number in numbers]
        self._said = {turn.number: turn for turn in found[:-1] if turn.resumed is not None}
        told = (
            turn for turn in found
            if turn.number > until or (turn.number in turns and turns[turn.number].mark == turn.mark)
        )
        return [turn for _, turn in sorted((turns | {turn.number: turn for turn in told}).items())]

    def _settled(self, look: Callable[[], T]) -> T:
        """A look at files of which none is removed between their listing and their reading. Raises FileNotFoundError.
        """
        end = time.monotonic() + STALE_SECONDS
        while True:
            try:
                return look()
            except FileNotFoundError:
                if time.monotonic() > end:
                    raise
            time.sleep(POLL_SECONDS)

    def take(self) -> None:
        """Become the last in the line. Raises Fenced when a later driver is there."""
        while True:
            line = self.line()
            if line and line[-1].mark == self.writer.mark:
                return
            if last := barred(line, self.writer):
                raise self._fenced(last)
            if self._created(line[-1].number + 1 if line else 1):
                return

    def check(self) -> None:
        """Raises Fenced when another driver took over.

        What came of an earlier attempt, where storage lets it, is put right.
        """
        last = self._settled(self._last)
        if last is None or (
            last.mark != self.writer.mark and last.job == self.writer.job and last.attempt < self.writer.attempt
        ):
            self.take()
        elif last.mark != self.writer.mark:
            raise self._fenced(last)

    def _last(self) -> Turn | None:
        numbers, _ = self._listed()
        return self._read(numbers[-1]) if numbers else None

    def resume(self, name: str) -> None:
        """Say from which checkpoint this driver goes on: those beyond it that others made are void. Raises Fenced."""
        self.check()
        self._chosen = name
        self._write(replace(self._own(self.line()), resumed=name))
        try:
            self._gather()
        except OSError as error:
            print(f"checkpoint: {self.store.url(DIRECTORY)}: earlier take-overs stay as they are: {error}", flush=True)

    def _gather(self) -> None:
        """Of many earlier turns, each a file that every later driver would read, one. It is there before they go."""
        line, (numbers, _) = self.line(), self._listed()
        own = self._own(line).number
        if len(earlier := [number for number in numbers if number < own]) <= MOST_FILES:
            return
        self.store.write(_past(own - 1), json.dumps([asdict(turn) for turn in line if turn.number < own]).encode())
        for number in earlier:
            self.store.remove(_name(number))
        for name in self.store.names(DIRECTORY):
            if (match := PAST.fullmatch(name)) and int(match[1]) < own - 1:
                self.store.remove(f"{DIRECTORY}/{name}")

    def resumed(self, deadline_seconds: float) -> str:
        """What the process that took over said. Raises DeadlineExceeded."""
        end = time.monotonic() + deadline_seconds
        while time.monotonic() < end:
            if (own := [turn for turn in self.line() if turn.mark == self.writer.mark]) and own[-1].resumed is not None:
                return own[-1].resumed
            time.sleep(POLL_SECONDS)
        raise DeadlineExceeded(
            f"the policy's first rank chose no checkpoint of {self.store.root} in {deadline_seconds:g} s"
        )

    def earlier(self) -> set[str]:
        """Marks of those from whom this driver took over."""
        line = self.line()
        own = self._own(line)
        return {turn.mark for turn in line if turn.number < own.number} - {own.mark}

    def _own(self, line: Sequence[Turn]) -> Turn:
        return [turn for turn in line if turn.mark == self.writer.mark][-1]

    def _listed(self) -> tuple[list[int], int]:
        """Numbers of the turns that have files of their own; and up to which number the others are in one, 0 where
        there is none.
        """
        names = self.store.names(DIRECTORY)
        numbers = sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit())
        return numbers, max((int(match[1]) for name in names if (match := PAST.fullmatch(name))), default=0)

    def _read(self, number: int) -> Turn:
        return self._parsed(_name(number), lambda found: Turn(**found))

    def _parsed(self, name: str, made: Callable[[Any], T]) -> T:
        try:
            return made(json.loads(self.store.read(name)))
        except (ValueError, TypeError) as error:
            raise BadData(
                f"{self.store.url(name)} is not as it was written ({error}): "
                "remove it when no other run writes to spec.checkpoint.path"
            ) from error

    def _created(self, number: int) -> bool:
        turn = Turn(
            number=number, mark=self.writer.mark, job=self.writer.job, attempt=self.writer.attempt,
            host=platform.node(), time=_now(), resumed=self._chosen,
        )
        try:
            self.store.create(_name(number), _encoded(turn))
        except FileExistsError:
            return False
        # Where two can create one file, the last one has; and a number that others have passed and removed is nobody's.
        return any((one.number, one.mark) == (number, self.writer.mark) for one in self.line())

    def _write(self, turn: Turn) -> None:
        self.store.write(_name(turn.number), _encoded(turn))

    def _fenced(self, last: Turn) -> Fenced:
        who = (
            f"attempt {last.attempt} of this job"
            if last.job == self.writer.job
            else f"attempt {last.attempt} of another job (uid {last.job})"
        )
        return Fenced(
            f"{who} (on {last.host} since {last.time}) writes {self.store.root} now: "
            f"this driver, attempt {self.writer.attempt}, is an earlier one"
        )


def _name(number: int) -> str:
    return f"{DIRECTORY}/{number:08}.json"


def _past(until: int) -> str:
    return f"{DIRECTORY}/until-{until:08}.json"


def _encoded(turn: Turn) -> bytes:
    return json.dumps(asdict(turn)).encode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
