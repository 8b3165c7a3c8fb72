"""The queue: its schedule by tables of calls, its runner with real tasks."""

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_operator import queue as queue_module
from rlhf_operator.client import ApiError
from rlhf_operator.queue import (
    BACKOFF_FIRST,
    BACKOFF_LEAST,
    BACKOFF_MOST,
    PATIENCE,
    SETTLE_SECONDS,
    UNTOLD_SECONDS,
    WORKERS,
    Queue,
    Schedule,
)
from rlhf_operator.shelf import Key, Rank

A, B = ("ns", "a"), ("ns", "b")


def test_many_events_are_one_pass() -> None:
    schedule = Schedule()
    for now in (0.0, 0.01, 0.02):
        schedule.add(A, now)
    assert schedule.take(0.0) is None
    assert schedule.take(SETTLE_SECONDS) == A
    assert schedule.take(10.0) is None


def test_a_key_has_one_worker_and_an_event_meanwhile_is_not_lost() -> None:
    schedule = Schedule()
    schedule.add(A, 0.0)
    assert schedule.take(1.0) == A
    schedule.add(A, 1.0)
    assert schedule.take(5.0) is None
    schedule.done(A, None)
    assert schedule.take(5.0) == A


def test_the_longest_waiting_key_comes_first() -> None:
    schedule = Schedule()
    schedule.add(B, 0.0)
    schedule.add(A, 1.0)
    assert [schedule.take(2.0), schedule.take(2.0)] == [B, A]


def test_what_comes_first_passes_others_by_but_not_for_ever() -> None:
    schedule = Schedule(rank=lambda key: Rank.TOLD if key == A else Rank.NEW)
    schedule.at(B, 0.0)
    schedule.at(A, 1.0)
    assert [schedule.take(2.0), schedule.take(2.0)] == [A, B]
    schedule.done(A, PATIENCE + 1)
    schedule.done(B, 0.5)
    assert schedule.next_due() == 0.5
    assert schedule.take(PATIENCE) == B, "nothing else is due"
    schedule.done(B, 0.5)
    assert [schedule.take(PATIENCE + 2), schedule.take(PATIENCE + 2)] == [B, A]


def test_a_key_that_has_come_to_be_first_is_so_at_its_next_event() -> None:
    firsts: set[Key] = set()
    schedule = Schedule(rank=lambda key: Rank.TOLD if key in firsts else Rank.NEW)
    schedule.at(A, 0.0)
    schedule.at(B, 0.0)
    assert schedule.take(1.0) == A
    firsts.add(A)
    schedule.done(A, 1.0)
    assert [schedule.take(1.0), schedule.take(1.0)] == [A, B]


def test_new_jobs_go_before_statuses_that_do_not_know_their_raycluster_until_one_is_late() -> None:
    jobs = [("default", f"job-{number}") for number in range(30)]
    made: dict[Key, float] = {}
    told: dict[Key, float] = {}
    schedule = Schedule(rank=lambda key: Rank.TOLD if key in told else Rank.UNTOLD if key in made else Rank.NEW)
    for key in jobs:
        schedule.at(key, 0.0)
    now = 0.0
    while (taken := schedule.take(now)) is not None:  # one write a second
        now += 1.0
        (told if taken in made else made)[taken] = now
        schedule.done(taken, None if taken in told else now)
    assert told.keys() == made.keys() == set(jobs)
    assert [key for key in jobs if made[key] <= UNTOLD_SECONDS + 1] == jobs[: int(UNTOLD_SECONDS) + 1]
    behind = [told[key] - made[key] for key in jobs]
    assert max(behind) <= UNTOLD_SECONDS + 2


def test_a_wake_time_holds_until_something_happens() -> None:
    schedule = Schedule()
    schedule.done(A, 100.0)
    assert schedule.next_due() == 100.0
    schedule.add(A, 50.0)
    assert schedule.next_due() == 50.0 + SETTLE_SECONDS


def test_backoff_doubles_to_a_limit_and_ends_with_success() -> None:
    schedule = Schedule()
    delays = fails(schedule, 12)
    assert delays[:3] == [BACKOFF_FIRST, 2 * BACKOFF_FIRST, 4 * BACKOFF_FIRST]
    assert delays[-1] == BACKOFF_MOST
    schedule.done(A, None)
    assert schedule.failed(A, 0.0) == BACKOFF_FIRST


def fails(schedule: Schedule, times: int) -> list[float]:
    """Tries at time 0, each of which fails."""
    delays = []
    for _ in range(times):
        schedule.at(A, 0.0)
        assert schedule.take(0.0) == A
        delays.append(schedule.failed(A, 0.0))
    return delays


def test_an_event_brings_the_next_try_forward_but_not_at_once() -> None:
    schedule = Schedule()
    fails(schedule, 8)
    schedule.add(A, 0.5)
    assert schedule.take(BACKOFF_LEAST - 0.01) is None
    assert schedule.take(BACKOFF_LEAST) == A


def test_an_event_while_the_retry_runs_is_not_lost() -> None:
    schedule = Schedule()
    due = schedule.failed(A, 0.0)
    assert schedule.take(due) == A
    schedule.add(A, due + 1)
    schedule.done(A, None)
    assert schedule.take(due + 1 + SETTLE_SECONDS) == A


def test_an_event_while_a_retry_fails_makes_the_next_wait_short() -> None:
    schedule = Schedule()
    fails(schedule, 8)
    assert schedule.take(BACKOFF_MOST) == A
    schedule.add(A, BACKOFF_MOST)
    assert schedule.failed(A, BACKOFF_MOST) == BACKOFF_LEAST


def test_what_the_api_server_asks_for_is_the_least() -> None:
    schedule = Schedule()
    assert schedule.failed(A, 0.0, at_least=30.0) == 30.0


def test_a_resync_reaches_also_a_key_that_backs_off() -> None:
    schedule = Schedule()
    schedule.failed(A, 0.0)
    schedule.at(A, 0.1)
    assert schedule.take(0.1) == A


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "at", "take", "done", "fail"]), st.integers(0, 3), st.integers(0, 50)),
        max_size=60,
    )
)
def test_the_schedule_is_what_a_plain_table_would_be(steps: list[tuple[str, int, int]]) -> None:
    """The heap holds leftovers; none of them may show."""
    schedule, now = Schedule(), 0.0
    for what, number, pause in steps:
        key, now = ("ns", str(number)), now + pause / 10
        if what == "add":
            schedule.add(key, now)
        elif what == "at":
            schedule.at(key, now + pause)
        elif what == "done" and key in schedule.active:
            schedule.done(key, now + pause if pause % 2 else None)
        elif what == "fail" and key in schedule.active:
            schedule.failed(key, now)
        ready = {k: when for k, when in schedule.due.items() if k not in schedule.active}
        assert schedule.next_due() == min(ready.values(), default=None)
        if what == "take":
            taken = schedule.take(now)
            assert (taken is None) == (min(ready.values(), default=now + 1) > now)
            assert taken is None or ready[taken] == min(ready.values())


class Worker:
    """Notes what runs. Passes wait for each other until `together` run at once."""

    def __init__(self, wanted: int, together: int = 1) -> None:
        self.wanted, self.together = wanted, together
        self.ran: list[str] = []
        self.running = self.most = 0
        self.gate, self.finished = asyncio.Event(), asyncio.Event()
        self.errors: list[Exception] = []
        self.wake_at: datetime | None = None

    async def __call__(self, key: Key) -> datetime | None:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running >= self.together:
            self.gate.set()
        await self.gate.wait()
        self.running -= 1
        self.ran.append(key[1])
        if len(self.ran) >= self.wanted:
            self.finished.set()
        if self.errors:
            raise self.errors.pop()
        wake, self.wake_at = self.wake_at, None
        return wake


async def drive(worker: Worker, keys: list[Key]) -> None:
    """A queue that is told of these keys, until the worker has what it wanted."""
    queue = Queue(worker, list)
    for key in keys:
        queue.add(key)
    task = asyncio.create_task(queue.run())
    try:
        await asyncio.wait_for(worker.finished.wait(), 60)
    finally:
        task.cancel()


async def test_every_key_is_passed() -> None:
    worker = Worker(2)
    await drive(worker, [A, B])
    assert sorted(worker.ran) == ["a", "b"]


async def test_an_error_is_tried_again() -> None:
    worker = Worker(2)
    worker.errors = [ApiError(500, "InternalError", "no leader")]
    await drive(worker, [A])
    assert worker.ran == ["a", "a"]


async def test_a_bug_in_one_job_does_not_end_the_queue() -> None:
    worker = Worker(3)
    worker.errors = [ZeroDivisionError()]
    await drive(worker, [A, B])
    assert set(worker.ran) == {"a", "b"}


async def test_a_pass_that_asks_for_another_gets_it() -> None:
    worker = Worker(2)
    worker.wake_at = datetime.now(UTC)
    await drive(worker, [A])
    assert worker.ran == ["a", "a"]


async def test_workers_are_bounded() -> None:
    worker = Worker(3 * WORKERS, together=WORKERS)
    await drive(worker, [("ns", str(n)) for n in range(3 * WORKERS)])
    assert worker.most == WORKERS


async def test_the_resync_visits_what_is_not_at_rest_without_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "RESYNC_SECONDS", 0.05)
    worker = Worker(4)
    task = asyncio.create_task(Queue(worker, lambda: [A, B]).run())
    await asyncio.wait_for(worker.finished.wait(), 60)
    task.cancel()
    assert set(worker.ran) == {"a", "b"}


async def test_a_pass_that_runs_comes_to_its_end_when_the_operator_stops() -> None:
    ended, begun = asyncio.Event(), asyncio.Event()

    async def work(key: Key) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        ended.set()

    queue = Queue(work, list)
    queue.add(A)
    task = asyncio.create_task(queue.run())
    await asyncio.wait_for(begun.wait(), 60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert ended.is_set()
