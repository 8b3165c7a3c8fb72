"""The queue: its schedule by tables of calls, its runner with real tasks."""

import asyncio
from datetime import UTC, datetime

from rlhf_operator.client import ApiError
from rlhf_operator.cluster import Key
from rlhf_operator.queue import BACKOFF_FIRST, BACKOFF_MOST, SETTLE_SECONDS, WORKERS, Queue, Schedule

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


def test_a_wake_time_holds_until_something_happens() -> None:
    schedule = Schedule()
    schedule.done(A, 100.0)
    assert schedule.next_due() == 100.0
    schedule.add(A, 50.0)
    assert schedule.next_due() == 50.0 + SETTLE_SECONDS


def test_backoff_doubles_to_a_limit_and_ends_with_success() -> None:
    schedule = Schedule()
    delays = [schedule.failed(A, 0.0) for _ in range(12)]
    assert delays[:3] == [BACKOFF_FIRST, 2 * BACKOFF_FIRST, 4 * BACKOFF_FIRST]
    assert delays[-1] == BACKOFF_MOST
    schedule.done(A, None)
    assert schedule.failed(A, 0.0) == BACKOFF_FIRST


def test_our_own_error_report_does_not_shorten_the_backoff() -> None:
    schedule = Schedule()
    due = schedule.failed(A, 0.0)
    schedule.add(A, 0.0)
    assert schedule.take(due - 0.01) is None
    assert schedule.take(due) == A


def test_a_resync_reaches_also_a_key_that_backs_off() -> None:
    schedule = Schedule()
    schedule.failed(A, 0.0)
    schedule.resync(A, 0.1)
    assert schedule.take(0.1) == A


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
    """A queue over these keys until the worker has what it wanted."""

    async def listed() -> list[Key]:
        return keys

    task = asyncio.create_task(Queue(worker, listed).run())
    try:
        await asyncio.wait_for(worker.finished.wait(), 10)
    finally:
        task.cancel()


async def test_every_key_of_the_list_is_passed_without_an_event() -> None:
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
