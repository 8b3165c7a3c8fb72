"""python -m rlhf_operator: connect, win the lease, run the queue under kopf. Ends with 1 when any of them ends by itself."""

import asyncio
import functools
import logging
import signal
import sys
import time

import kopf
from kubernetes.aio.config import ConfigException

from rlhf_operator import metrics
from rlhf_operator.client import Connection, DynamicApi
from rlhf_operator.cluster import ClusterIO
from rlhf_operator.handlers import registry
from rlhf_operator.health import Health
from rlhf_operator.leader import Leadership
from rlhf_operator.queue import Queue
from rlhf_operator.reconcile import reconcile
from rlhf_operator.settings import Settings, kopf_settings, parse

log = logging.getLogger("rlhf_operator")


async def run(settings: Settings) -> int:
    """Exit status: 0 after SIGTERM or SIGINT, 1 after losing the lease or a part of the operator."""
    connection = Connection(settings.kubeconfig)
    api = await DynamicApi.connect(connection)
    cluster = ClusterIO(api)
    queue = Queue(functools.partial(reconcile, cluster), functools.partial(cluster.job_keys, settings.namespace))
    health = Health(queue)
    site = await health.start(settings.health_port)
    leadership = Leadership(api.client, settings.lease_namespace) if settings.lease_namespace else None
    try:
        if leadership and not await _won(leadership):
            return 0
        return await _serve(settings, connection, queue, health, leadership)
    finally:
        if leadership:
            await leadership.close()
        await site.cleanup()
        await api.close()


async def _won(leadership: Leadership) -> bool:
    """False when told to stop while waiting."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    log.info("waiting for the lease %s/%s", leadership.lock.namespace, leadership.lock.name)
    waits = {asyncio.create_task(leadership.won.wait()), asyncio.create_task(stopped.wait())}
    await asyncio.wait({*waits, leadership.task}, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if leadership.task.done():
        leadership.task.result()
    return leadership.won.is_set()


async def _serve(settings: Settings, connection: Connection, queue: Queue, health: Health, leadership: Leadership | None) -> int:
    queue.beat, health.serving = time.monotonic(), True
    metrics.LEADER.set(1)
    log.info("serving %s", settings.namespace or "all namespaces")
    informer = kopf.operator(
        registry=registry(queue.add, connection), settings=kopf_settings(settings.namespace), standalone=True,
        clusterwide=settings.namespace is None, namespaces=[settings.namespace] if settings.namespace else [],
    )
    working = asyncio.create_task(queue.run(), name="queue")
    await asyncio.sleep(0)  # kopf waits at its end for tasks that are younger than itself
    watching = asyncio.create_task(informer, name="kopf")
    parts = {watching, working, *([leadership.task] if leadership else [])}
    done, rest = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    for part in rest:
        part.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    errors = [part.exception() for part in done if not part.cancelled()]
    for error in filter(None, errors):
        log.error("ended by %s: %s", type(error).__name__, error)
    return 0 if done == {watching} and not any(errors) else 1


def main() -> int:
    settings = parse(sys.argv[1:])
    level = logging.DEBUG if settings.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for chatty in ("kopf.activities", "kopf.objects"):  # one line a handler call
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return asyncio.run(run(settings))
    except ConfigException as error:
        log.error("no API server: %s: run in a cluster, or name a kubeconfig by --kubeconfig or KUBECONFIG", error)
    except OSError as error:
        log.error("--health-port %s: %s", settings.health_port, error)
    return 2


if __name__ == "__main__":
    sys.exit(main())
