"""The keyed queue: every key at most once, one worker a key, backoff a key, a time to wake a key, a slow resync of all keys.

`Schedule` is the logic, without a clock or a task; `Queue` runs it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rlhf_operator import metrics
from rlhf_operator.client import ApiError
from rlhf_operator.cluster import Key

log = logging.getLogger(__name__)
# Events come in bursts (ten pods, three changes each): one pass a burst is enough.
SETTLE_SECONDS = 0.1
BACKOFF_FIRST, BACKOFF_MOST = 0.5, 60.0
RESYNC_SECONDS = 300.0
WORKERS = 8
HEARTBEAT_SECONDS = 5.0
# Errors that say everything in their message.
EXPECTED = (ApiError,)


@dataclass(slots=True)
class Schedule:
    """Which key is due when. Times are seconds of any one clock."""

    due: dict[Key, float] = field(default_factory=dict)
    active: set[Key] = field(default_factory=set)
    failures: dict[Key, int] = field(default_factory=dict)

    def add(self, key: Key, now: float) -> None:
        """An event. It hastens a waiting key, but not one that backs off: our own error reports are events, too."""
        if key not in self.failures:
            self._at(key, now + SETTLE_SECONDS)

    def resync(self, key: Key, now: float) -> None:
        self._at(key, now)

    def take(self, now: float) -> Key | None:
        """A key that is due and has no worker; it has one now."""
        ready = [(when, key) for key, when in self.due.items() if when <= now and key not in self.active]
        if not ready:
            return None
        key = min(ready)[1]
        del self.due[key]
        self.active.add(key)
        return key

    def done(self, key: Key, wake_at: float | None) -> None:
        self.active.discard(key)
        self.failures.pop(key, None)
        if wake_at is not None:
            self._at(key, wake_at)

    def failed(self, key: Key, now: float) -> float:
        """Seconds until the next try."""
        self.active.discard(key)
        tries = self.failures[key] = self.failures.get(key, 0) + 1
        delay = min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** min(tries - 1, 16))
        self.due[key] = now + delay
        return delay

    def next_due(self) -> float | None:
        return min((when for key, when in self.due.items() if key not in self.active), default=None)

    def waiting(self, now: float) -> int:
        return sum(when <= now for when in self.due.values())

    def _at(self, key: Key, when: float) -> None:
        self.due[key] = min(when, self.due.get(key, when))


class Queue:
    """`work` handles one key and says when to come back; `keys` lists all of them for the resync."""

    def __init__(self, work: Callable[[Key], Awaitable[datetime | None]], keys: Callable[[], Awaitable[list[Key]]]) -> None:
        self._work, self._keys = work, keys
        self._schedule, self._changed = Schedule(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.beat = time.monotonic()

    def add(self, key: Key) -> None:
        self._schedule.add(key, time.monotonic())
        self._changed.set()

    async def run(self) -> None:
        """For ever."""
        resync = asyncio.create_task(self._resync(), name="resync")
        try:
            while True:
                self.beat = time.monotonic()
                self._start_due()
                await self._wait()
        finally:
            for task in (resync, *self._tasks):
                task.cancel()

    def _start_due(self) -> None:
        while len(self._tasks) < WORKERS and (key := self._schedule.take(time.monotonic())):
            task = asyncio.create_task(self._one(key), name=f"reconcile {'/'.join(key)}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        metrics.QUEUE_DEPTH.set(self._schedule.waiting(time.monotonic()))

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _wait(self) -> None:
        due = self._schedule.next_due()
        free = len(self._tasks) < WORKERS
        pause = min(HEARTBEAT_SECONDS, max(0.0, due - time.monotonic())) if due is not None and free else HEARTBEAT_SECONDS
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
            delay = self._schedule.failed(key, time.monotonic())
            metrics.RECONCILES.labels(outcome="error").inc()
            log.warning("%s: %s: next try in %.1f s", "/".join(key), error, delay, exc_info=not isinstance(error, EXPECTED))
        else:
            metrics.RECONCILES.labels(outcome="ok").inc()
            self._schedule.done(key, _monotonic(wake_at))
        metrics.LAST_RECONCILE.set_to_current_time()

    async def _resync(self) -> None:
        """Watches may lose an event; a list loses none."""
        while True:
            try:
                for key in await self._keys():
                    self._schedule.resync(key, time.monotonic())
                self._changed.set()
            except EXPECTED as error:
                log.warning("resync: %s", error)
            await asyncio.sleep(RESYNC_SECONDS)


def _monotonic(moment: datetime | None) -> float | None:
    return time.monotonic() + (moment - datetime.now(UTC)).total_seconds() if moment else None
