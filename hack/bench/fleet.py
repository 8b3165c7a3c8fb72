"""Many jobs of one kind, and when each of them, its RayCluster and its pods were seen to change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hack.bench.client import JSON, METADATA, Client
from hack.cluster.kube import Object

NAMESPACE = "default"
RAYCLUSTERS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters"
RLHFJOBS = f"/apis/rlhf.dev/v1alpha1/namespaces/{NAMESPACE}/rlhfjobs"
RAYJOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


@dataclass(frozen=True)
class Kind:
    """A kind of job: where it lives, a job of this name, and whether its status knows of its RayCluster."""

    name: str
    path: str
    make: Callable[[str], Object]
    knows: Callable[[Object], bool]


def _rlhfjob(name: str) -> Object:
    """The smallest: a head, and a pod that trainer and engine share."""
    return {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "RLHFJob",
        "metadata": {"name": name},
        "spec": {
            "image": "rlhf-worker:dev",
            "model": {"path": "some/model"},
            "data": {"jsonl": {"path": "/data/prompts.jsonl"}},
            "rewards": [{"name": "exact", "type": "python", "function": "package.module:score"}],
            "trainer": {"steps": 1000},
        },
    }


def _rlhfjob_knows(status: Object) -> bool:
    verdicts = {c["type"]: c["reason"] for c in status.get("conditions") or []}
    return bool(verdicts.get("ClusterReady", "NotCreated") != "NotCreated")


RLHFJOB = Kind("RLHFJob", RLHFJOBS, _rlhfjob, _rlhfjob_knows)


def rayjob(cluster: Object) -> Kind:
    """A RayJob of the very pods of an RLHFJob's RayCluster, without the ServiceAccount that only that one has."""
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"].get("workerGroupSpecs", [])]
    for group in groups:
        group["template"]["spec"].pop("serviceAccountName", None)
    spec = {
        "entrypoint": "python train.py",
        "rayClusterSpec": {k: v for k, v in cluster["spec"].items() if k != "suspend"},
    }

    def make(name: str) -> Object:
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": spec}

    return Kind("RayJob", RAYJOBS, make, lambda status: bool(status.get("rayClusterName")))


def pods_of(cluster: Object) -> int:
    return 1 + sum(int(group.get("replicas") or 0) for group in cluster["spec"].get("workerGroupSpecs", []))


@dataclass
class Seen:
    """Of a job, by time.monotonic(): its RayCluster came, its status told so; what it has, its status last changed."""

    cluster: float | None = None
    known: float | None = None
    changed: float = 0.0
    written: float = 0.0

    def first_lag(self) -> float | None:
        return max(0.0, self.known - self.cluster) if self.cluster and self.known else None

    def last_lag(self) -> float:
        return max(0.0, self.written - self.changed)


@dataclass
class Timeline:
    """Fed by three watches. `moved` is when anything last happened."""

    kind: Kind
    client: Client
    jobs: dict[str, Seen] = field(default_factory=dict)
    clusters: dict[str, str] = field(default_factory=dict)
    pods: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    moved: float = 0.0
    _statuses: dict[str, Object] = field(default_factory=dict)

    async def begin(self) -> None:
        for path in (self.kind.path, RAYCLUSTERS, PODS):
            self.versions[path] = await self.client.version(path)

    async def follow_jobs(self) -> None:
        async for event in self.client.watch(self.kind.path, self.versions[self.kind.path], JSON):
            self._job(event, time.monotonic())

    async def follow_clusters(self) -> None:
        async for event in self.client.watch(RAYCLUSTERS, self.versions[RAYCLUSTERS], METADATA):
            self._owned(event, self.clusters, time.monotonic())

    async def follow_pods(self) -> None:
        async for event in self.client.watch(PODS, self.versions[PODS], METADATA):
            self._owned(event, self.pods, time.monotonic())

    def _job(self, event: Object, now: float) -> None:
        self.moved = now
        name, status = event["object"]["metadata"]["name"], event["object"].get("status") or {}
        if event["type"] == "DELETED":
            self.jobs.pop(name, None)
            return
        seen = self.jobs.setdefault(name, Seen())
        if status != self._statuses.get(name, {}):
            self._statuses[name], seen.written = status, now
        if seen.known is None and self.kind.knows(status):
            seen.known = now

    def _owned(self, event: Object, there: dict[str, str], now: float) -> None:
        self.moved = now
        name, owner = event["object"]["metadata"]["name"], _owner(event["object"])
        if event["type"] == "DELETED":
            there.pop(name, None)
            return
        there[name] = owner
        job = self.clusters.get(owner, owner)
        if seen := self.jobs.get(job):
            seen.changed = now
            seen.cluster = seen.cluster or now


def _owner(found: Object) -> str:
    owners = found["metadata"].get("ownerReferences") or []
    return next((str(owner["name"]) for owner in owners if owner.get("controller")), "")


def lags(timeline: Timeline) -> tuple[list[float], list[float]]:
    """Seconds, sorted: from a RayCluster to the status that knows it, and from the last change to the last status."""
    first = [lag for seen in timeline.jobs.values() if (lag := seen.first_lag()) is not None]
    return sorted(first), sorted(seen.last_lag() for seen in timeline.jobs.values())


def names(count: int) -> list[str]:
    return [f"job-{number}" for number in range(count)]
