"""/livez, /readyz and /metrics."""

import json
import logging
import time

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Gauge, generate_latest

from rlhf_operator import metrics
from rlhf_operator.queue import HEARTBEAT_SECONDS, Queue
from rlhf_operator.store import Store

log = logging.getLogger(__name__)
DEAD_AFTER_SECONDS = 12 * HEARTBEAT_SECONDS


class Health:
    """Dead is a leader whose queue no longer turns. Quiet is not dead: a cluster where nothing happens sends no
    event."""

    def __init__(self, queue: Queue, store: Store, ages: metrics.WatchAges) -> None:
        self.queue, self.store, self.ages, self.serving = queue, store, ages, False
        self._of_store = CollectorRegistry()
        self._of_store.register(metrics.StoreCollector(store, ages))

    async def start(self, port: int) -> web.AppRunner:
        """Raises OSError where the port is taken."""
        app = web.Application()
        app.add_routes(
            [web.get("/livez", self.livez), web.get("/readyz", self.readyz), web.get("/metrics", self.metrics)]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, port=port).start()
        log.info("health and metrics at %s", runner.addresses)
        return runner

    async def livez(self, _: web.Request) -> web.Response:
        beat = time.monotonic() - self.queue.beat if self.serving else 0.0
        told = {
            "leader": self.serving,
            "listed": self.store.ready,
            "queueBeatAge": round(beat, 1),
            "lastWatchEventAge": self.ages.least,
            "watchEventAges": self.ages.of(),
            "lastReconcileAge": _age(metrics.LAST_RECONCILE),
        }
        return web.Response(
            status=200 if beat < DEAD_AFTER_SECONDS else 503, text=json.dumps(told), content_type="application/json"
        )

    async def readyz(self, _: web.Request) -> web.Response:
        """A standby is ready once it holds what a leader needs: it is ready to take over."""
        return (
            web.Response(status=200, text="ok")
            if self.store.ready
            else web.Response(status=503, text=f"not listed yet: {', '.join(self.store.unlisted)}")
        )

    async def metrics(self, _: web.Request) -> web.Response:
        told = generate_latest(REGISTRY) + generate_latest(self._of_store)
        return web.Response(body=told, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _age(gauge: Gauge) -> float | None:
    """Seconds since the gauge's time; None for never."""
    at = next(iter(gauge.collect())).samples[0].value
    return round(time.time() - at, 1) if at else None
