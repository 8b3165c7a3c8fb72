"""One operator at a time, by a Lease. A process that loses it ends: a new one starts with nothing in its hands.

The lease is held for 12 s from when its last renewal was sent; the holder stops acting after 10 of them, by a clock
that no one sets and that goes on while the process is stopped. Others wait for the whole of it, counted from when
they saw the renewal.
"""

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from aiohttp import ClientError
from kubernetes.aio.client import ApiClient, V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from rlhf_operator.settings import own_namespace

log = logging.getLogger(__name__)
NAME = "rlhf-operator"
# A try is two calls, which wait behind the operator's own when a thousand jobs come at once. One that gets no answer to
# either leaves time for another before the holder must stop.
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, ANSWER_SECONDS = 12, 9, 1, 3.0
ACT_SECONDS = 10.0
# The API server has too much to do, and we may be why: a renewal, each second, is more urgent than any pass.
LATE_SECONDS = 4.0
T = TypeVar("T")


class Lock(LeaseLock):  # type: ignore[misc]  # the library is not typed
    """The library's lock ends the election on a network error and may wait minutes for an answer; here both are a
    failed try."""

    def __init__(
        self, name: str, namespace: str, identity: str, client: ApiClient, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(name, namespace, identity, client)
        self.clock = clock
        self.renewed = float("-inf")

    async def get(self, name: str, namespace: str) -> Any:
        """A lease that was released is nobody's: the library would wait for it to run out."""
        found, record = await _tried(super().get(name, namespace), lambda error: (False, error))
        return found, None if found and not record.holder_identity else record

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """Not the library's: that passes a `pretty` which its own API object refuses (kubernetes 37.0.2)."""
        lease, sent = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record)), self.clock()
        return self._renewed(
            await _tried(self.api_instance.create_namespaced_lease(namespace, lease), lambda _: None) is not None, sent
        )

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        sent = self.clock()
        return self._renewed(bool(await _tried(super().update(name, namespace, updated_record), lambda _: False)), sent)

    async def release(self) -> None:
        """So that the next operator need not wait for the lease to run out."""
        nobody = {"spec": {"holderIdentity": "", "leaseDurationSeconds": 1}}
        self.renewed = float("-inf")
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.api_instance.patch_namespaced_lease(self.name, self.namespace, nobody)
        except (ApiException, ClientError, OSError, TimeoutError) as error:
            log.warning("the lease was not released: %s", error)

    def _renewed(self, done: bool, sent: float) -> bool:
        """From when it was sent: the API server cannot have taken it before."""
        if done:
            self.renewed = sent
        return done


async def _tried(call: Awaitable[T], otherwise: Any) -> T:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await call
    except (ApiException, ClientError, OSError, TimeoutError) as error:
        log.warning("lease: %s: %s", type(error).__name__, getattr(error, "reason", None) or error)
        failed: T = otherwise(error if isinstance(error, ApiException) else ApiException(status=0, reason=str(error)))
        return failed


def identity() -> str:
    """In a cluster the pod's name: a container that restarts takes its own lease over at once. Elsewhere a host may
    run two."""
    return socket.gethostname() if own_namespace() else f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


class Leadership:
    """`won` is set once the lease is held, `lost` once it no longer is."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self.won, self.lost = asyncio.Event(), asyncio.Event()
        self.lock = Lock(NAME, namespace, identity(), client)
        election = LeaderElection(
            Config(self.lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, self._started, self._stopped)
        )
        self._tasks = [
            asyncio.create_task(election.run(), name="election"),
            asyncio.create_task(self._watch(), name="lease watch"),
        ]
        self._tasks[0].add_done_callback(self._ended)

    def holds(self) -> bool:
        """Whether this process may act. Asked before each write."""
        return self._age() < ACT_SECONDS

    def late(self) -> bool:
        """Whether the next renewal lets itself be waited for: then nothing else should be asked of the API server."""
        return self._age() > LATE_SECONDS

    def _age(self) -> float:
        """Seconds since the last renewal was sent; infinite before the first."""
        return self.lock.clock() - self.lock.renewed

    async def close(self) -> None:
        """Gives the lease back, if it is ours."""
        for task in self._tasks:
            task.cancel()
        if self.won.is_set() and self.holds():
            await self.lock.release()

    async def _started(self) -> None:
        self.won.set()

    async def _stopped(self) -> None:
        self.lost.set()

    def _ended(self, election: "asyncio.Task[None]") -> None:
        if not election.cancelled() and (error := election.exception()) is not None:
            log.error("the election ended by %s: %s", type(error).__name__, error)
            self.lost.set()

    async def _watch(self) -> None:
        """The library gives up by the wall clock and only between two tries: this is what counts."""
        await self.won.wait()
        while True:
            left = ACT_SECONDS - self._age()
            if left <= 0:
                break
            await asyncio.sleep(left)
        log.error("the lease is lost")
        self.lost.set()
