"""KubeRay, kubelets and drivers as an operator sees them: pods as KubeRay makes them, statuses that say they run.

Nothing runs. The pods name no node, so the API server removes a deleted one at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hack.bench import fleet
from hack.bench.client import APPLY, JSON, MERGE, Client
from hack.cluster.kube import ApiError, Object
from hack.cluster.kuberay_standin import pods, status

HEAD_ADDRESS = "198.19.0.2"
MAKERS = 16


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Nodes:
    """Makes the pods of every RayCluster that is not suspended, running and ready; not of the jobs `without_pods`.
    `heads`: a job's newest head pod."""

    client: Client
    without_pods: Sequence[str] = ()
    heads: dict[str, Object] = field(default_factory=dict)
    _due: asyncio.Queue[Object] = field(default_factory=asyncio.Queue)

    async def run(self) -> None:
        """For ever. What is there already when it begins is not made."""
        version = await self.client.version(fleet.RAYCLUSTERS)
        async with asyncio.TaskGroup() as group:
            for _ in range(MAKERS):
                group.create_task(self._make_all())
            async for event in self.client.watch(fleet.RAYCLUSTERS, version, JSON):
                if event["type"] == "ADDED" and self._wants_pods(event["object"]):
                    self._due.put_nowait(event["object"])

    def _wants_pods(self, cluster: Object) -> bool:
        return not cluster["spec"].get("suspend") and _job(cluster) not in self.without_pods

    async def _make_all(self) -> None:
        while True:
            cluster = await self._due.get()
            try:
                await self.make(cluster)
            except ApiError as error:
                if error.code != 404:  # the RayCluster was deleted meanwhile
                    raise

    async def make(self, cluster: Object) -> None:
        cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", **cluster}
        head = await self._start(pods.head_pod(cluster))
        workers = [await self._start(pods.worker_pod(cluster, group, HEAD_ADDRESS)) for group in _members(cluster)]
        made = status.compute(cluster, [head, *workers], None, None, stamp())
        path = f"{fleet.RAYCLUSTERS}/{cluster['metadata']['name']}/status"
        await self.client.send("PATCH", path, {"status": made}, MERGE)
        self.heads[_job(cluster)] = head

    async def _start(self, pod: Object) -> Object:
        made = await self.client.send("POST", fleet.PODS, pod)
        return await self.tell(made, {"running": {"startedAt": stamp()}})

    async def tell(self, pod: Object, state: Mapping[str, Any], container: str = "") -> Object:
        """The pod's status: this container (all of them for "") has that state, the others run."""
        running = {"running": {"startedAt": stamp()}}
        told = [
            {
                "name": c["name"],
                "image": c["image"],
                "imageID": "",
                "restartCount": 0,
                "ready": "running" in state or c["name"] != container,
                "state": state if container in ("", c["name"]) else running,
            }
            for c in pod["spec"]["containers"]
        ]
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": stamp()}
            for kind in ("PodScheduled", "Initialized", "Ready")
        ]
        body = {
            "status": {"phase": "Running", "conditions": conditions, "containerStatuses": told, "startTime": stamp()}
        }
        return await self.client.send("PATCH", f"{fleet.PODS}/{pod['metadata']['name']}/status", body, MERGE)


def _members(cluster: Object) -> list[Object]:
    groups = cluster["spec"].get("workerGroupSpecs", [])
    return [group for group in groups for _ in range(status.desired_replicas(group))]


def _job(cluster: Object) -> str:
    return next(str(owner["name"]) for owner in cluster["metadata"]["ownerReferences"] if owner.get("controller"))


async def report(drivers: Client, job: str, head: Object, **progress: Any) -> Object:
    """What the job's driver says, as it says it: server-side apply by its own field manager. Returns the job."""
    told = {"podUid": head["metadata"]["uid"], "attempt": 1, "totalSteps": 1000, "reportTime": stamp(), **progress}
    body = {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "RLHFJob",
        "metadata": {"name": job},
        "status": {"progress": told},
    }
    return await drivers.send(
        "PATCH", f"{fleet.RLHFJOBS}/{job}/status?fieldManager=rlhf-driver&force=true", body, APPLY
    )


def trained(step: int) -> Object:
    """A report after this step, with all that a driver tells of one."""
    return {
        "state": "Training",
        "detail": "generating",
        "step": step,
        "display": f"{step}/1000",
        "stepTime": stamp(),
        "activityTime": stamp(),
        "reward": f"0.{step:03}",
        "mismatch": "0.0012",
        "kl": "0.011",
        "tokensPerSecond": "2134",
        "speed": {
            "mfu": "0.41",
            "generateTokensPerGpu": "3412",
            "trainTokensPerGpu": "16394",
            "idleTrainer": "0.12",
            "idleEngines": "0.12",
            "bottleneck": "generate",
            "advice": "generate: 60% of a step: for a third of that time engines had 10 of 256 sequences: raise "
            "rollout.promptsPerStep, or rollout.staleness (Separated), or lower rollout.maxTokens",
        },
        "etaSeconds": 3600,
        "eta": "1h00m",
        "preflight": {"message": "model, data and rewards were tried", "seconds": "12.3"},
        "sync": {"version": step, "seconds": "0.051", "backend": "nccl", "verifiedVersion": step},
        "checkpoint": {"step": step - step % 10, "path": f"/checkpoints/step-{step - step % 10}", "time": stamp()},
    }
