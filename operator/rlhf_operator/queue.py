"""The keyed queue: every key at most once, one worker a key, backoff a key, a time to wake a key, a slow resync.

`Schedule` is the logic, without a clock or a task; `Queue` runs it.
"""

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rlhf_operator import metrics
from rlhf_operator.client import ApiError
from rlhf_operator.shelf import Key, Rank

log = logging.getLogger(__name__)
Heap = list[tuple[float, int, Key]]
# Events come in bursts (ten pods, three changes each): one pass a burst is enough.
SETTLE_SECONDS = 0.1
BACKOFF_FIRST, BACKOFF_MOST = 0.5, 60.0
# An event may bring the next try forward, but a stream of events must not make it a stream of failures.
BACKOFF_LEAST = 2.0
# What a watch loses a refresh of the store finds; this keeps what only time changes, such as goodput, from growing old.
RESYNC_SECONDS = 900.0
WORKERS = 16
# What is told of comes before what became due up to so long ago.
PATIENCE = 600.0
# So long a new RayCluster may be one that its job's status does not tell of, while others wait for theirs.
UNTOLD_SECONDS = 8.0
HEARTBEAT_SECONDS = 5.0
HELD_SECONDS = 0.2
# How long passes get to end when the operator stops.
LAST_SECONDS = 3.0
# Errors that say everything in their message.
EXPECTED = (ApiError,)


@dataclass(slots=True)
class Failing:
    """A key that backs off: how often it failed in a row, and when last."""

    times: int
    last: float


@dataclass(slots=True)
class Schedule:
    """Which key is due when. Times are seconds of any one clock. All of it is O(log n): a heap may hold what is no
    longer so (a key that became due earlier, or has a worker), which is passed over when it comes to the top."""

    rank: Callable[[Key], Rank] = lambda key: Rank.TOLD
    due: dict[Key, float] = field(default_factory=dict)
    active: set[Key] = field(default_factory=set)
    failing: dict[Key, Failing] = field(default_factory=dict)
    _heaps: tuple[Heap, ...] = field(default_factory=lambda: tuple([] for _ in Rank))
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    def add(self, key: Key, now: float) -> None:
        """An event. One that comes while its key has a worker is not lost: the pass may have looked before it."""
        failing = self.failing.get(key)
        least = failing.last + BACKOFF_LEAST if failing and key not in self.active else now
        self._at(key, max(now + SETTLE_SECONDS, least))

    def at(self, key: Key, when: float) -> None:
        """Not later than that."""
        self._at(key, when)

    def take(self, now: float) -> Key | None:
        """A key that is due and has no worker; it has one now."""
        heap = self._next(now)
        if heap is None:
            return None
        key = heapq.heappop(heap)[2]
        del self.due[key]
        self.active.add(key)
        return key

    def _next(self, now: float) -> Heap | None:
        """The one whose top comes next."""
        told, untold, new = (heap if heap and heap[0][0] <= now else None for heap in self._pruned())
        late = untold is not None and untold[0][0] + UNTOLD_SECONDS <= now
        others = untold if late else new or untold
        if told and others and others[0][0] + PATIENCE < told[0][0]:
            return others
        return told or others

    def done(self, key: Key, wake_at: float | None) -> None:
        self.failing.pop(key, None)
        self._release(key)
        if wake_at is not None:
            self._at(key, wake_at)

    def failed(self, key: Key, now: float, at_least: float = 0.0) -> float:
        """Seconds until the next try. An event that came meanwhile makes it a short one."""
        times = self.failing[key].times + 1 if key in self.failing else 1
        self.failing[key] = Failing(times, now)
        delay = max(at_least, min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** min(times - 1, 16)))
        if self.due.pop(key, None) is not None:
            delay = max(at_least, min(delay, BACKOFF_LEAST))
        self.active.discard(key)
        self._at(key, now + delay)
        return delay

    def next_due(self) -> float | None:
        return min((heap[0][0] for heap in self._pruned() if heap), default=None)

    def _pruned(self) -> tuple[Heap, ...]:
        """With what is so on top."""
        for heap in self._heaps:
            while heap and (heap[0][2] in self.active or self.due.get(heap[0][2]) != heap[0][0]):
                heapq.heappop(heap)
        return self._heaps

    def _release(self, key: Key) -> None:
        """What became due meanwhile is due now; its place in the heap may have been passed over."""
        self.active.discard(key)
        if key in self.due:
            self._push(key)

    def _at(self, key: Key, when: float) -> None:
        if when < self.due.get(key, float("inf")):
            self.due[key] = when
            self._push(key)

    def _push(self, key: Key) -> None:
        heapq.heappush(self._heaps[self.rank(key)], (self.due[key], next(self._order), key))


class Queue:
    """`work` handles one key and says when to come back; `restless` are the keys that the resync visits; `rank` is
    the schedule's. No pass begins while `held`."""

    def __init__(
        self,
        work: Callable[[Key], Awaitable[datetime | None]],
        restless: Callable[[], Iterable[Key]],
        rank: Callable[[Key], Rank] = lambda key: Rank.TOLD,
        held: Callable[[], bool] = lambda: False,
    ) -> None:
        self._work, self._restless, self._held = work, restless, held
        self._schedule, self._changed = Schedule(rank), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.beat = time.monotonic()

    def add(self, key: Key) -> None:
        self._schedule.add(key, time.monotonic())
        self._changed.set()

    async def run(self) -> None:
        """For ever. When cancelled it lets the passes that run come to their end, for a short time."""
        resync = asyncio.create_task(self._resync(), name="resync")
        try:
            while True:
                self.beat = time.monotonic()
                self._start_due()
                await self._wait()
        finally:
            resync.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=LAST_SECONDS)
            for task in self._tasks:
                task.cancel()

    def _start_due(self) -> None:
        while len(self._tasks) < WORKERS and not self._held() and (key := self._schedule.take(time.monotonic())):
            task = asyncio.create_task(self._one(key), name=f"reconcile {'/'.join(key)}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        metrics.QUEUE_DEPTH.set(len(self._schedule.due))
        metrics.ACTIVE.set(len(self._tasks))

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _wait(self) -> None:
        due = self._schedule.next_due()
        free = len(self._tasks) < WORKERS
        pause = HEARTBEAT_SECONDS
        if due is not None and free:
            pause = min(pause, max(HELD_SECONDS if self._held() else 0.0, due - time.monotonic()))
        try:
            async with asyncio.timeout(pause):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _one(self, key: Key) -> None:
        try:
            with metrics.RECONCILE_SECONDS.time():
                wake_at = await self._work(key)
        except Exception as error:
            delay = self._schedule.failed(key, time.monotonic(), getattr(error, "retry_after", None) or 0.0)
            metrics.RECONCILES.labels(outcome="error").inc()
            log.warning(
                "%s: %s: next try in %.1f s", "/".join(key), error, delay, exc_info=not isinstance(error, EXPECTED)
            )
        else:
            metrics.RECONCILES.labels(outcome="ok").inc()
            self._schedule.done(key, _monotonic(wake_at))
        metrics.LAST_RECONCILE.set_to_current_time()

    async def _resync(self) -> None:
        """What is in the store is looked at again now and then, each key at a moment of its own. It costs no call."""
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            now = time.monotonic()
            for key in self._restless():
                self._schedule.at(key, now + random.uniform(0.0, RESYNC_SECONDS))
            self._changed.set()


def _monotonic(moment: datetime | None) -> float | None:
    return time.monotonic() + (moment - datetime.now(UTC)).total_seconds() if moment else None
