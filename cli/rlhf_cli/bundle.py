"""`kubectl rlhf bundle`: one archive of what somebody who helps wants to see of a job, without its secrets.

What cannot be had, for it is gone or the user lacks the right, is told in `missing.txt`: the rest is made all the same.
"""

import io
import json
import tarfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_api import GROUP
from rlhf_cli import redact
from rlhf_cli.exits import Wrong
from rlhf_cli.options import Target
from rlhf_client import names
from rlhf_client.errors import ClientError

if TYPE_CHECKING:
    from rlhf_client.client import Client

Raw = dict[str, Any]
LINES = 20_000  # of one log
OPERATOR = "rlhf-system"


class Archive:
    """Files by name, redacted as they come in."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.missing: list[str] = []

    def add(self, name: str, content: Any) -> None:
        made = redact.text(content) if isinstance(content, str) else json.dumps(redact.value(content), indent=2)
        self.files[name] = made

    async def collect(self, name: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What was asked for; None where it cannot be had."""
        try:
            found = await ask()
        except ClientError as error:
            self.missing.append(f"{name}: {error}")
            return None
        self.add(name, found)
        return found

    def write(self, path: Path, folder: str) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in {**self.files, "missing.txt": redact.text("\n".join(self.missing) + "\n")}.items():
                data = content.encode()
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size, entry.mtime = len(data), int(time.time())
                archive.addfile(entry, io.BytesIO(data))


async def bundle(target: Target, name: str, out: Path | None) -> None:
    """Raises NotFound for no such job, Wrong for a file that cannot be written."""
    async with target.client() as client:
        archive = Archive()
        job = await client.get(name)
        archive.add("job.json", job.raw)
        for file, ask in _questions(client, name, job.status.cluster_name).items():
            await archive.collect(file, ask)
        pods = await archive.collect("pods.json", lambda: client.pods(name)) or []
        for pod in pods:
            await _logs(client, archive, name, pod)
    path = out or Path(f"{name}-bundle.tar.gz")
    try:
        archive.write(path, f"{name}-bundle")
    except OSError as error:
        raise Wrong(f"--out {path}: {error.strerror}") from None
    print(path)


def _questions(client: "Client", name: str, cluster: str | None) -> dict[str, Callable[[], Awaitable[Any]]]:
    own = f"/namespaces/{client.namespace}"
    found: dict[str, Callable[[], Awaitable[Any]]] = {
        "events.json": lambda: client.events(name),
        "version.json": lambda: client.read("/version"),
        "crd.json": lambda: client.read(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rlhfjobs.{GROUP}"),
        "run-config.json": lambda: client.read(f"/api/v1{own}/configmaps/{names.run_config(name)}"),
        "operator.json": lambda: client.read(f"/apis/apps/v1/namespaces/{OPERATOR}/deployments"),
    }
    if cluster:
        found["raycluster.json"] = lambda: client.read(f"/apis/ray.io/v1{own}/rayclusters/{cluster}")
    return found


async def _logs(client: "Client", archive: Archive, name: str, pod: Raw) -> None:
    """Of each container, now and before its last restart."""
    status, own = pod.get("status") or {}, str(pod["metadata"]["name"])
    restarted = {one["name"] for one in status.get("containerStatuses") or () if one.get("restartCount")}
    for container in (one["name"] for one in (pod.get("spec") or {}).get("containers") or ()):
        for previous in (False, True) if container in restarted else (False,):

            async def ask(container: str = container, previous: bool = previous) -> str:
                lines = client.logs(name, pod=own, container=container, previous=previous, tail=LINES)
                return "\n".join([line async for line in lines]) + "\n"

            await archive.collect(f"logs/{own}.{container}{'.previous' if previous else ''}.log", ask)
