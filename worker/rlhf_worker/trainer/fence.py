"""Who may write a checkpoint path: of all drivers that ever did, the one that took it over last.

`<path>/fence/<number>.json` is one take-over: who, when, and from which checkpoint it went on. Its own driver alone
writes that file. The highest number holds the path; everyone else is refused by `check`, which whoever publishes calls
first. As a check and what follows it are two calls, an earlier driver may still publish once, late. The line of
take-overs makes that harmless: what lies beyond the checkpoint that a later driver went on from never counts
(`standing`).
"""

import json
import platform
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from rlhf_worker.errors import BadData, DeadlineExceeded, Fenced
from rlhf_worker.storage import Store

DIRECTORY = "fence"
POLL_SECONDS = 0.2


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
class TakeOver:
    """One take-over. `resumed`: the checkpoint it went on from, "" for none; None: it has not said yet."""

    number: int
    mark: str
    job: str
    attempt: int
    host: str
    time: str
    resumed: str | None = None


def barred(line: Sequence[TakeOver], writer: Writer) -> TakeOver | None:
    """The turn that keeps `writer` from taking over: of a higher attempt, or of another job after this very attempt. A
    run by hand may always.
    """
    for turn in reversed(line):
        higher = 0 < writer.attempt < turn.attempt
        if higher if turn.job == writer.job else _was_before(line, turn, writer):
            return turn
    return None


def _was_before(line: Sequence[TakeOver], turn: TakeOver, writer: Writer) -> bool:
    """A suspended job comes back with a higher attempt: one that was here before `turn` is what that took over from."""
    mine = [own for own in line if own.job == writer.job and own.number < turn.number]
    return bool(writer.attempt and any(own.attempt >= writer.attempt for own in mine))


def standing(names: Sequence[tuple[str, int, str | None]], line: Sequence[TakeOver]) -> list[str]:
    """Of checkpoints, each by name, step and mark, oldest first: those that count."""
    numbers = {turn.mark: turn.number for turn in line}
    kept = sorted((step, numbers.get(mark or "", 0), name) for name, step, mark in names)
    steps = {name: step for name, step, _ in names}
    return [name for step, number, name in kept if not _void(name, step, number, line, steps)]


def _void(name: str, step: int, number: int, line: Sequence[TakeOver], steps: dict[str, int]) -> bool:
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
        self._said: dict[int, TakeOver] = {}  # those that will not change any more

    def line(self) -> list[TakeOver]:
        """Every take-over, in order. Raises BadData."""
        numbers = self._numbers()
        self._said |= self._read([number for number in numbers if number not in self._said])
        line = [self._said[number] for number in numbers]
        self._said = {each.number: each for each in line[:-1] if each.resumed is not None}
        return line

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
        last = next(iter(self._read(self._numbers()[-1:]).values()), None)
        if last is None or (
            last.mark != self.writer.mark and last.job == self.writer.job and last.attempt < self.writer.attempt
        ):
            self.take()
        elif last.mark != self.writer.mark:
            raise self._fenced(last)

    def resume(self, name: str) -> None:
        """Say from which checkpoint this driver goes on: those beyond it that others made are void. Raises Fenced."""
        self.check()
        self._chosen = name
        self._write(replace(self._own(self.line()), resumed=name))

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

    def _own(self, line: Sequence[TakeOver]) -> TakeOver:
        return [turn for turn in line if turn.mark == self.writer.mark][-1]

    def _numbers(self) -> list[int]:
        names = [name.removesuffix(".json") for name in self.store.names(DIRECTORY)]
        return sorted(int(name) for name in names if name.isdigit())

    def _read(self, numbers: Sequence[int]) -> dict[int, TakeOver]:
        """Raises BadData."""
        files = self.store.read_all([_name(number) for number in numbers])
        return {number: self._parsed(number, data) for number, data in zip(numbers, files, strict=True)}

    def _parsed(self, number: int, data: bytes) -> TakeOver:
        try:
            return TakeOver(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise BadData(
                f"{self.store.url(_name(number))} is not as it was written ({error}): "
                "remove it when no other run writes to spec.checkpoint.path"
            ) from error

    def _created(self, number: int) -> bool:
        turn = TakeOver(
            number=number, mark=self.writer.mark, job=self.writer.job, attempt=self.writer.attempt,
            host=platform.node(), time=_now(), resumed=self._chosen,
        )
        try:
            self.store.create(_name(number), _encoded(turn))
        except FileExistsError:
            return False
        return self._read([number])[number].mark == self.writer.mark  # where two can create one file, the last one has

    def _write(self, turn: TakeOver) -> None:
        self.store.write(_name(turn.number), _encoded(turn))

    def _fenced(self, last: TakeOver) -> Fenced:
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


def _encoded(turn: TakeOver) -> bytes:
    return json.dumps(asdict(turn)).encode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
