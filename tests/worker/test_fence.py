"""Several drivers on one checkpoint path: who holds it, and that no interleaving of them makes a checkpoint of two, or
takes an earlier one's for the newest.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from rlhf_worker.errors import BadData, Fenced
from rlhf_worker.storage import Store
from rlhf_worker.trainer.checkpoint import RunState, Saver, whole
from rlhf_worker.trainer.fence import Fence, TakeOver, Writer, standing
from tests.worker.buckets import Bucket


@pytest.fixture(params=["directory", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    Bucket.empty()
    return {"directory": str(tmp_path / "run"), "bucket": "bucket://models/run"}[request.param]


def fence(root: str, attempt: int, job: str = "a", driver: str = "") -> Fence:
    return Fence(Store(root), Writer(job, attempt, driver or f"d{attempt}"))


def after(root: str, *writers: Writer) -> list[str]:
    """Each takes the path over in turn; how that ends."""
    ends = []
    for writer in writers:
        try:
            Fence(Store(root), writer).take()
            ends.append("holds")
        except Fenced:
            ends.append("fenced")
    return ends


A1, A2, A2_AGAIN, A3 = Writer("a", 1, "x"), Writer("a", 2, "y"), Writer("a", 2, "z"), Writer("a", 3, "w")
B1, HAND, HAND_AGAIN = Writer("b", 1, "b"), Writer("", 0, "h"), Writer("", 0, "i")


@pytest.mark.parametrize(
    ("writers", "last"),
    [
        ([A1, A2], "holds"), ([A2, A1], "fenced"), ([A2, A2], "holds"),
        ([A2, A2_AGAIN], "holds"),  # the kubelet started the driver again in its pod
        ([A2, B1], "holds"),  # a later job in the same directory
        ([A2, B1, A2], "fenced"), ([A2, B1, A2_AGAIN], "fenced"), ([A2, B1, A1], "fenced"),
        ([A2, B1, A3], "holds"),  # it was suspended, and comes back
        ([A2, B1, A3, B1], "fenced"),
        ([A3, HAND], "holds"), ([HAND, A1], "holds"), ([HAND, HAND_AGAIN], "holds"),
        ([A3, HAND, A3], "fenced"),
    ],
)  # fmt: skip
def test_who_may_take_a_path_over(root: str, writers: list[Writer], last: str) -> None:
    assert after(root, *writers)[-1] == last


def test_who_was_overtaken_is_told_by_whom(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "tiny-trainer-1")
    third, fourth = fence(root, 3), fence(root, 4)
    third.take()
    third.check()
    fourth.take()
    fourth.check()
    with pytest.raises(Fenced, match=rf"attempt 4 of this job \(on tiny-trainer-1 since 20\S+Z\) writes {root} now: "
        r"this driver, attempt 3, is an earlier one"):
        third.check()
    fence(root, 1, job="b").take()
    with pytest.raises(Fenced, match=r"attempt 1 of another job \(uid b\)"):
        fourth.check()


def test_of_two_that_take_over_at_once_the_higher_attempt_holds(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the lower one's look and its claim."""
    low, high = fence(root, 3), fence(root, 4)
    create = Store.create

    def late(self: Store, name: str, data: bytes) -> None:
        monkeypatch.setattr(Store, "create", create)
        high.take()
        create(self, name, data)

    monkeypatch.setattr(Store, "create", late)
    with pytest.raises(Fenced):
        low.take()
    high.check()


def test_where_storage_lets_two_create_one_file_the_higher_attempt_takes_it_back(root: str) -> None:
    low, high = fence(root, 3), fence(root, 4)
    high.take()
    high.resume("step-20")
    low._write(TakeOver(number=1, mark=low.writer.mark, job="a", attempt=3, host="h", time="t"))
    low.check()
    high.check()
    with pytest.raises(Fenced):
        low.check()
    assert [turn.resumed for turn in high.line()] == [None, "step-20"]


def test_a_path_whose_line_was_removed_is_taken_again(root: str) -> None:
    own = fence(root, 3)
    own.take()
    Store(root).remove("fence")
    own.check()
    assert [turn.attempt for turn in own.line()] == [3]


def test_a_spoilt_line_is_named(root: str) -> None:
    Store(root).write("fence/00000001.json", b"{")
    with pytest.raises(BadData, match=r"fence/00000001\.json is not as it was written .*: remove it when"):
        fence(root, 3).take()


def take_over(root: str, count: int, job: str = "a", first: int = 1) -> list[Fence]:
    """By attempts one after the other, each of which goes on from the checkpoint of the one before."""
    made = [fence(root, attempt, job) for attempt in range(first, first + count)]
    for each in made:
        each.take()
        each.resume(f"step-{each.writer.attempt}")
    return made


def test_of_many_take_overs_none_is_forgotten(root: str) -> None:
    early = take_over(root, 60)
    assert [turn.attempt for turn in fence(root, 99).line()] == [*range(1, 61)]
    assert fence(root, 99).line() == early[0].line()
    for driver in early[:-1]:
        with pytest.raises(Fenced, match="attempt 60 of this job"):
            driver.check()
        with pytest.raises(Fenced, match="attempt 60 of this job"):
            driver.take()
    early[-1].check()
    assert early[-1].earlier() == {driver.writer.mark for driver in early[:-1]}


def test_a_job_that_another_took_the_path_from_stays_out_however_long_ago(root: str) -> None:
    (first, *_), _ = take_over(root, 2), take_over(root, 40, job="b")
    for attempt in (1, 2):
        with pytest.raises(Fenced, match="of another job"):
            fence(root, attempt, driver="again").take()
    fence(root, 3).take()  # it was suspended, and comes back
    with pytest.raises(Fenced):
        first.check()


def line(*resumed: str | None) -> list[TakeOver]:
    return [
        TakeOver(number=i, mark=f"m{i}", job="a", attempt=i, host="h", time="t", resumed=name)
        for i, name in enumerate(resumed, 1)
    ]


@pytest.mark.parametrize(
    ("found", "turns", "counting"),
    [
        ([("step-1", 1, None), ("step-10", 10, None), ("step-9", 9, None)], [], ["step-1", "step-9", "step-10"]),
        ([("step-20", 20, "m1"), ("step-40", 40, "m1")], line("", "step-20"), ["step-20"]),  # 40 came late
        (
            [("step-20", 20, "m1"), ("step-40", 40, "m1"), ("step-30", 30, "m2")], line("", "step-20"),
            ["step-20", "step-30"],
        ),
        # the second has not chosen
        ([("step-20", 20, "m1"), ("step-40", 40, "m1")], line("", None), ["step-20", "step-40"]),
        ([("step-20", 20, None), ("step-40", 40, "gone")], line("step-20"), ["step-20"]),
        ([("step-20", 20, "m1")], line("", ""), []),  # the second began anew: an older one was nothing to it
        # the third chose it all the same
        ([("step-20", 20, "m1"), ("step-40", 40, "m1")], line("", "step-20", "step-40"), ["step-20", "step-40"]),
        ([("step-40", 40, "m1"), ("step-40.b", 40, "m2")], line("", "step-20"), ["step-40.b"]),
    ],
)  # fmt: skip
def test_which_checkpoints_count(
    found: list[tuple[str, int, str | None]], turns: list[TakeOver], counting: list[str],
) -> None:
    assert standing(found, turns) == counting


# Real savers, whose every call of the store waits for its turn.


class Killed(BaseException):
    """As a process ends: nothing of it runs after this."""


class Driver(threading.Thread):
    """One life: take the path over, restore, save a few steps. It stands still before each of its calls of the store,
    and after each event, until `go`.
    """

    def __init__(self, root: str, keep: int, attempt: int, name: str, log: list["Event"], saves: int = 3) -> None:
        super().__init__(daemon=True)
        self.saver = Saver(root, keep, ("policy",), name, leads=True, seconds=60.0)
        self.attempt, self.log, self.saves, self.at = attempt, log, saves, "start"
        self.may_go, self.stands = threading.Semaphore(0), threading.Semaphore(0)
        self.killed = self.over = False
        self.failed: BaseException | None = None
        self.number = 0

    def gate(self, at: str) -> None:
        self.at = at
        self.stands.release()
        self.may_go.acquire()
        if self.killed:
            raise Killed

    def go(self) -> None:
        self.may_go.release()
        self.stands.acquire()

    def until(self, place: str) -> None:
        """Until it stands before a call, or after an event, that matches."""
        self.go()
        while not self.over and not re.match(place, self.at):
            self.go()

    def kill(self) -> None:
        self.killed = True
        while not self.over:
            self.go()

    def run(self) -> None:
        try:
            self.gate("start")
            self._live()
        except (Fenced, Killed):
            pass
        except BaseException as error:
            self.failed = error
        self.over = True
        self.stands.release()

    def _live(self) -> None:
        asked = len(self.log)
        self.saver.fence("a", self.attempt)
        self.number = self.saver.fenced._own(self.saver.fenced.line()).number
        model = weight(0.0)
        found = self.saver.restore({}, {"policy": model}).state
        base = found.step if found else 0
        assert found is None or model[0].weight.item() == found.loop["value"], "parts of two"
        self._tell(Event("restored", self.number, base, found.loop["by"] if found else 0, asked))
        for step in range(base + 1, base + 1 + self.saves):
            value = 100.0 * self.number + step
            loop = {"by": self.number, "value": value}
            self.saver.begin(
                RunState(step=step, version=step, model={}, sampler={}, loop=loop), {"policy": weight(value)},
            )
            (outcome,) = self.saver.finished(wait=True)
            assert outcome.error is None, outcome.error
            self._tell(Event("saved", self.number, step, self.number, 0))

    def _tell(self, event: "Event") -> None:
        self.log.append(event)
        if self.is_alive():
            self.gate(event.what)


@dataclass(frozen=True)
class Event:
    """`number`: of whose turn; `by`: whose checkpoint; `asked`: events before a restoring driver began to take over."""

    what: str
    number: int
    step: int
    by: int
    asked: int


def weight(value: float) -> tuple[nn.Linear, SGD]:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module, SGD(module.parameters(), lr=0.1)


@dataclass
class Gated:
    """Store's calls, each after the gate of the driver whose store it is."""

    drivers: dict[int, Driver] = field(default_factory=dict)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("names", "read", "write", "create", "remove", "rename"):
            monkeypatch.setattr(Store, name, self._wrapped(getattr(Store, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(store: Store, *args: Any) -> Any:
            if driver := self.drivers.get(id(store)):
                driver.gate(f"{call.__name__} {args[0] if args else ''}")
            return call(store, *args)

        return wrapped


def _check(log: list[Event]) -> None:
    restores = [event for event in log if event.what == "restored"]
    for index, event in enumerate(log):
        if event.what == "restored":
            for before in (one for one in restores if log.index(one) < event.asked and one.number < event.number):
                assert event.by >= before.number or (event.by, event.step) == (
                    before.by, before.step,
                ), "an earlier driver's became the newest"
            known = [
                one for one in log[: event.asked]
                if one.what == "saved" and one.number == max((b.number for b in log[: event.asked]), default=0)
            ]
            assert event.step >= max((one.step for one in known), default=0), "what was saved is lost"
        elif event.what == "saved":
            assert all(
                one.number <= event.number or one.step >= event.step or one.asked <= index for one in restores
            ), "a save after a later driver restored"


@contextmanager
def standing_still(
    root: str, keep: int, attempts: list[int], saves: int = 3,
) -> Iterator[tuple[list[Driver], list[Event]]]:
    """Drivers that have not begun, and what they will tell. At the end all of them end, and one more restores and
    saves.
    """
    torch.set_num_threads(1)
    gates, log = Gated(), list[Event]()
    drivers = [Driver(root, keep, attempt, f"driver {i}", log, saves) for i, attempt in enumerate(attempts)]
    gates.drivers = {id(driver.saver.store): driver for driver in drivers}
    with pytest.MonkeyPatch.context() as patched:
        gates.install(patched)
        for driver in drivers:
            driver.start()
            driver.stands.acquire()
        try:
            yield drivers, log
        finally:  # whatever hypothesis draws or gives up: a thread that stands still keeps the process from ending
            for driver in drivers:
                while not driver.over:
                    driver.go()
                driver.join()
                driver.saver.thread.shutdown()
        assert [driver.failed for driver in drivers] == [None] * len(drivers)
    Driver(root, keep, max(attempts) + 1, "the last", log)._live()
    _check(log)


PLACES = ("create", "restored", "write fence", r"write .*/run\.json", "rename", "write latest", "remove", "saved")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dies", [True, False])
def test_what_an_earlier_driver_publishes_late_never_counts(root: str, dies: bool) -> None:
    """It had looked, and nobody was there; before its next call a later one took over and went on from the checkpoint
    before.
    """
    with standing_still(root, 2, [1, 2]) as ((early, late), log):
        early.until("saved")
        early.until(r"write step-2.*/run\.json" if root.startswith("bucket") else r"rename \.step-2")
        late.until("restored")
        if dies:
            late.kill()
        while not early.over:
            early.go()
        assert any(name.startswith("step-2.attempt-1") for name in whole(Store(root)))  # too late to be kept from it
        assert [
            (event.what, event.number, event.step) for event in log
        ] == [("restored", 1, 0), ("saved", 1, 1), ("restored", 2, 1)]
    assert [(event.by, event.step) for event in log if event.what == "restored"][-1] == ((1, 1) if dies else (2, 4))


@pytest.mark.usefixtures("group")
def test_a_late_word_of_the_newest_is_put_right_by_who_gave_it(root: str) -> None:
    """It had looked, and before it wrote `latest` a later driver saved three more."""
    with standing_still(root, 2, [1, 2]) as ((early, late), _):
        early.until("write latest")
        while not late.over:
            late.go()
        while not early.over:
            early.go()
        assert Store(root).read("latest").startswith(b"step-4.attempt-2")


@pytest.mark.usefixtures("group")
def test_who_finds_its_own_removed_by_a_later_driver_is_fenced(tmp_path: Path) -> None:
    """And is not told of a disk that has room."""
    with standing_still(str(tmp_path), 1, [1, 2]) as ((early, late), log):
        early.until("rename")
        while not late.over:
            late.go()
        while not early.over:
            early.go()
    assert [(event.number, event.step) for event in log if event.what == "saved"][:3] == [(2, 1), (2, 2), (2, 3)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), attempts=st.sampled_from([[1, 2], [1, 1], [1, 2, 3], [2, 1, 3], [1, 1, 2]]),
    keep=st.sampled_from([1, 2]),
)
@pytest.mark.usefixtures("group")
def test_no_interleaving_of_drivers_mixes_them_or_goes_back(
    root: str, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, attempts: list[int], keep: int
) -> None:
    store = Store(root)
    for name in store.names():
        store.remove(name)
    with standing_still(root, keep, attempts, saves=2) as (drivers, _):
        for _ in range(12):
            if not (living := [driver for driver in drivers if not driver.over]):
                break
            driver = data.draw(st.sampled_from(living))
            if place := data.draw(st.sampled_from([*PLACES, "kill", ""])):
                driver.kill() if place == "kill" else driver.until(place)
            else:
                driver.go()
    assert len(whole(store)) <= keep
