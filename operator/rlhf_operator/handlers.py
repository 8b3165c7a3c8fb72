"""kopf's part: it watches, and every event goes into the store. No handler reads or does anything else."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import kopf
import uvloop

from rlhf_operator import metrics
from rlhf_operator.client import Connection
from rlhf_operator.kinds import Kind
from rlhf_operator.settings import STACK_BYTES, kopf_settings
from rlhf_operator.store import WATCHED, Store, version_of

log = logging.getLogger(__name__)
RESTART_SECONDS = 5.0
Suspect = Callable[[Kind], None]


def registry(store: Store, connection: Connection, suspect: Suspect, ages: metrics.WatchAges) -> kopf.OperatorRegistry:
    """`suspect` is told of a kind that kopf lists although the store holds it already: its watch was broken, and
    what was deleted meanwhile is told by nobody."""
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await credentials(connection)

    for kind in WATCHED:
        kopf.on.event(kind.group, kind.version, kind.plural, registry=found, id=kind.plural)(
            _seen(kind, store, suspect, ages)
        )
    return found


def _seen(kind: Kind, store: Store, suspect: Suspect, ages: metrics.WatchAges) -> Callable[..., Awaitable[None]]:
    async def seen(event: Any, **_: Any) -> None:
        raw, uid = event["object"], event["object"]["metadata"].get("uid", "")
        ages.told(kind.plural)
        if event["type"] == "DELETED":
            store.drop(kind, uid, version_of(raw["metadata"]))
            return
        if event["type"] is None and store.holds(kind, uid):
            suspect(kind)
        store.put(kind, raw)
        _shed(raw)

    return seen


def _shed(raw: Any) -> None:
    """kopf holds an object until the next event of it, or `idle_timeout`, and needs no more of it than its name."""
    for part in ("spec", "status"):
        raw.pop(part, None)
    raw["metadata"].pop("managedFields", None)


async def credentials(connection: Connection) -> kopf.ConnectionInfo:
    """The same that the client uses, from the same place."""
    config = await connection.configuration()
    token = (config.api_key.get("BearerToken") or "").partition(" ")[2] or None
    return kopf.ConnectionInfo(
        server=config.host,
        ca_path=config.ssl_ca_cert,
        insecure=not config.verify_ssl,
        token=token,
        scheme="Bearer" if token else None,
        certificate_path=config.cert_file,
        private_key_path=config.key_file,
        proxy_url=config.proxy,
    )


class Informer:
    """kopf in a thread of its own, and begun anew when it ends: an answer that it takes for fatal (a CRD that goes,
    an error in the middle of a watch) ends no pass and no lease. In our own event loop it would cancel every task
    younger than itself at its end."""

    def __init__(
        self, make: Callable[[], kopf.OperatorRegistry], namespace: str | None, broken: Callable[[], None]
    ) -> None:
        """`broken` is called when all watches were broken off."""
        self._make, self._namespace, self._broken = make, namespace, broken
        self._stopping = threading.Event()
        self._stop_kopf: Callable[[], Any] = lambda: None
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        self._thread.start()
        threading.stack_size(before)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def again(self) -> None:
        """Begin anew: for kinds that kopf cannot notice by itself."""
        self._stop_kopf()

    async def stop(self) -> None:
        self._stopping.set()
        self._stop_kopf()
        if self._thread.ident:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join, RESTART_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                uvloop.run(self._watch())
            except Exception as error:
                log.warning("the watches ended by %s: %s", type(error).__name__, error)
            if not self._stopping.is_set():
                metrics.WATCH_RESTARTS.inc()
                self._broken()
                self._stopping.wait(random.uniform(0.2, 1.0) * RESTART_SECONDS)

    async def _watch(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        self._stop_kopf = lambda: loop.call_soon_threadsafe(stop.set)
        if self._stopping.is_set():
            return
        try:
            await kopf.operator(
                registry=self._make(),
                settings=kopf_settings(self._namespace),
                standalone=True,
                stop_flag=stop,
                clusterwide=self._namespace is None,
                namespaces=[self._namespace] if self._namespace else [],
            )
        finally:
            self._stop_kopf = lambda: None
