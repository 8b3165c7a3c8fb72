"""kopf's part: it watches and wakes the queue. No handler reads what happened, and none does anything else."""

from collections.abc import Callable
from typing import Any

import kopf

from rlhf_api import GROUP, PLURAL, VERSION
from rlhf_operator import metrics
from rlhf_operator.client import Connection
from rlhf_operator.cluster import Key
from rlhf_operator.names import JOB_LABEL

Wake = Callable[[Key], None]


def registry(wake: Wake, connection: Connection) -> kopf.OperatorRegistry:
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await credentials(connection)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=found)
    async def job(**about: Any) -> None:
        _woken(wake, about["namespace"], about["name"])

    @kopf.on.event("ray.io", "v1", "rayclusters", labels={JOB_LABEL: kopf.PRESENT}, registry=found)
    async def raycluster(**about: Any) -> None:
        _woken(wake, about["namespace"], about["labels"][JOB_LABEL])

    @kopf.on.event("", "v1", "pods", labels={JOB_LABEL: kopf.PRESENT}, registry=found)
    async def pod(**about: Any) -> None:
        _woken(wake, about["namespace"], about["labels"][JOB_LABEL])

    return found


def _woken(wake: Wake, namespace: str, name: str) -> None:
    metrics.LAST_WATCH_EVENT.set_to_current_time()
    wake((namespace, name))


async def credentials(connection: Connection) -> kopf.ConnectionInfo:
    """The same that the client uses, from the same place."""
    config = await connection.configuration()
    token = (config.api_key.get("BearerToken") or "").partition(" ")[2] or None
    return kopf.ConnectionInfo(
        server=config.host, ca_path=config.ssl_ca_cert, insecure=not config.verify_ssl, token=token, scheme="Bearer" if token else None,
        certificate_path=config.cert_file, private_key_path=config.key_file, proxy_url=config.proxy,
    )
