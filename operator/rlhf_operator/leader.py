"""One operator at a time, by a Lease. A process that loses it ends: a new one starts with nothing in its hands."""

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable
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
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 30, 20, 5
T = TypeVar("T")


class Lock(LeaseLock):  # type: ignore[misc]  # the library is not typed
    """The library's lock ends the election on a network error and may wait minutes for an answer; here both are a failed try."""

    async def get(self, name: str, namespace: str) -> Any:
        return await _tried(super().get(name, namespace), lambda error: (False, error))

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """Not the library's: that passes a `pretty` which its own API object refuses (kubernetes 37.0.2)."""
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        return await _tried(self.api_instance.create_namespaced_lease(namespace, lease), lambda _: None) is not None

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return bool(await _tried(super().update(name, namespace, updated_record), lambda _: False))

    async def release(self) -> None:
        """So that the next operator need not wait for the lease to run out."""
        nobody = {"spec": {"holderIdentity": "", "leaseDurationSeconds": 1}}
        try:
            async with asyncio.timeout(RETRY_SECONDS):
                await self.api_instance.patch_namespaced_lease(self.name, self.namespace, nobody)
        except (ApiException, ClientError, OSError, TimeoutError) as error:
            log.warning("the lease was not released: %s", error)


async def _tried(call: Awaitable[T], otherwise: Any) -> T:
    try:
        async with asyncio.timeout(RETRY_SECONDS):
            return await call
    except (ApiException, ClientError, OSError, TimeoutError) as error:
        log.warning("lease: %s: %s", type(error).__name__, error)
        failed: T = otherwise(ApiException(status=0, reason=str(error)))
        return failed


def identity() -> str:
    """In a cluster the pod's name: a container that restarts takes its own lease over at once. Elsewhere a host may run two."""
    return socket.gethostname() if own_namespace() else f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


class Leadership:
    """`won` is set while the lease is held. `task` ends when it is lost."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self.won = asyncio.Event()
        self.lock = Lock(NAME, namespace, identity(), client)
        election = LeaderElection(Config(self.lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, self._started, self._stopped))
        self.task = asyncio.create_task(election.run(), name="election")

    async def _started(self) -> None:
        self.won.set()

    async def _stopped(self) -> None:
        self.won.clear()
        log.error("the lease is lost")

    async def close(self) -> None:
        self.task.cancel()
        if self.won.is_set():
            await self.lock.release()
