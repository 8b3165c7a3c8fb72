"""python -m rlhf_operator: connect, keep a store of what there is, win the lease, run the queue.

Leader and standby watch alike, so that who takes over knows everything already; only the leader runs the queue.
SIGTERM lets the passes that run end and gives the lease back at once. Ends with 1 when the lease is lost or a part
of it ends by itself.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

from kubernetes.aio.config import ConfigException

from rlhf_operator import metrics
from rlhf_operator.client import Connection, KubernetesApi
from rlhf_operator.cluster import ClusterIO
from rlhf_operator.handlers import Informer, registry
from rlhf_operator.health import Health
from rlhf_operator.leader import Leadership
from rlhf_operator.presets import NO_PRESETS, InvalidPresets, Presets
from rlhf_operator.queue import Queue
from rlhf_operator.reconcile import reconcile, utc_now
from rlhf_operator.refresh import Refresher
from rlhf_operator.settings import LEVELS_MAX, Settings, own_namespace, parse, read_presets
from rlhf_operator.shelf import Key
from rlhf_operator.store import Store

log = logging.getLogger("rlhf_operator")
# One event of a watch is a thousand objects, which die with it: a collection at Python's 700 only walks through them,
# a fifth of what an event costs.
YOUNG_OBJECTS = 20_000


class Operator:
    """The parts of one process, put together, in a running event loop. `run` ends when it is told to stop, or when
    one of them can go on no longer."""

    def __init__(
        self, settings: Settings, connection: Connection, api: KubernetesApi, presets: Presets = NO_PRESETS,
    ) -> None:
        sys.setrecursionlimit(max(sys.getrecursionlimit(), LEVELS_MAX))
        self.settings, self.api = settings, api
        self.leading, self.stopped = False, asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.store = Store(self._told, presets=presets)
        home = own_namespace() or settings.namespace or "default"
        work = functools.partial(reconcile, ClusterIO(api, self.store), clock=utc_now, home=home)
        self.leadership = Leadership(api.client, settings.lease_namespace) if settings.lease_namespace else None
        held = self.leadership.late if self.leadership else lambda: False
        self.queue = Queue(work, lambda: self.store.job_keys(at_rest=False), self.store.rank, held)
        ages = metrics.WatchAges()
        self.health = Health(self.queue, self.store, ages)
        self.refresher = Refresher(api, self.store, settings.namespace, lambda kind: self._came())
        watch = functools.partial(registry, self.store, connection, self.refresher.suspect, ages)
        self.informer = Informer(watch, settings.namespace, self.refresher.suspect_all)
        if self.leadership:
            api.may_write = self.leadership.holds

    async def run(self) -> int:
        """Exit status: 0 after `stopped` was set, 1 after losing the lease or a part of the operator."""
        site = await self.health.start(self.settings.health_port)
        if self.leadership:
            log.info("waiting for the lease %s/%s", self.leadership.lock.namespace, self.leadership.lock.name)
        self.informer.start()
        parts = [_task(self.refresher.run(), "refresher"), _task(self._serve(), "queue")]
        ends = [
            _task(self.stopped.wait(), "stop"),
            *([_task(self.leadership.lost.wait(), "lease lost")] if self.leadership else []),
        ]
        try:
            done, _ = await asyncio.wait({*parts, *ends}, return_when=asyncio.FIRST_COMPLETED)
            return 0 if self.stopped.is_set() and not done & {*parts} else _failed(done)
        finally:
            await self._close(parts, ends)
            await site.cleanup()

    async def _close(self, parts: list[asyncio.Task[Any]], ends: list[asyncio.Task[Any]]) -> None:
        """First no more passes, then the lease, so that the next leader need not wait for the rest."""
        for task in (*parts, *ends):
            task.cancel()
        await asyncio.gather(*parts, *ends, return_exceptions=True)
        metrics.LEADER.set(0)
        if self.leadership:
            await self.leadership.close()
        await self.informer.stop()

    async def _serve(self) -> None:
        """For ever, once the lease is ours and every kind was listed."""
        if self.leadership:
            await self.leadership.won.wait()
        await self.refresher.listed.wait()
        self.queue.beat, self.health.serving, self.leading = time.monotonic(), True, True
        metrics.LEADER.set(1)
        log.info("serving %s", self.settings.namespace or "all namespaces")
        for key in self.store.job_keys():
            self.queue.add(key)
        await self.queue.run()

    def _told(self, key: Key) -> None:
        """By the store, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._wake, key)

    def _wake(self, key: Key) -> None:
        """A standby need not keep account: who takes over looks at every job."""
        if self.leading:
            self.queue.add(key)

    def _came(self) -> None:
        """Where CRDs may not be listed, kopf looks for kinds only at its start."""
        if self.settings.namespace is not None:
            self.informer.again()


def _task(part: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    return asyncio.create_task(part, name=name)


def _failed(done: set[asyncio.Task[Any]]) -> int:
    for task in done:
        error = task.exception()
        log.error(
            "ended: %s%s", task.get_name(), f" by {type(error).__name__}: {error}" if error else "", exc_info=error
        )
    return 1


async def run(settings: Settings) -> int:
    """Raises InvalidPresets, ConfigException, OSError."""
    presets = read_presets(settings.presets)
    connection = Connection(settings.kubeconfig)
    api = await KubernetesApi.connect(connection)
    operator, loop = Operator(settings, connection, api, presets), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, operator.stopped.set)
    try:
        return await operator.run()
    finally:
        await api.close()


def main() -> int:
    settings = parse(sys.argv[1:])
    gc.set_threshold(YOUNG_OBJECTS)
    level = logging.DEBUG if settings.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for chatty in ("kopf.activities", "kopf.objects"):  # one line a handler call
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return asyncio.run(run(settings))
    except InvalidPresets as error:
        log.error("%s", error)
    except ConfigException as error:
        log.error("no API server: %s: run in a cluster, or name a kubeconfig by --kubeconfig or KUBECONFIG", error)
    except OSError as error:
        log.error("--health-port %s: %s", settings.health_port, error)
    return 2


if __name__ == "__main__":
    sys.exit(main())
