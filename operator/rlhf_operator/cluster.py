"""The only cluster I/O: look (`observe`), act (`perform`), tell (`write_status`, `write_events`)."""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf_api import API_VERSION, KIND
from rlhf_api.status import RLHFJobStatus
from rlhf_operator import FIELD_MANAGER
from rlhf_operator.client import Api, ApiError, KindMissing
from rlhf_operator.clock import stamp
from rlhf_operator.decide import Note
from rlhf_operator.kinds import EVENTS, JOBS, LOCAL_QUEUES, OF_KIND, PODS, RAYCLUSTERS, WORKLOADS
from rlhf_operator.names import FINALIZER, JOB_LABEL, WORKLOAD_UID_LABEL
from rlhf_operator.observed import (
    Cluster,
    Complaint,
    Job,
    Observed,
    Pod,
    Queue,
    owner_uid,
    read_cluster,
    read_conditions,
    read_job,
    read_pod,
)
from rlhf_operator.plan import Plan

log = logging.getLogger(__name__)
Raw = dict[str, Any]
Key = tuple[str, str]
# Containers that wait with these reasons may wait for a volume, which only an Event tells.
SILENT_WAITS = ("ContainerCreating", "PodInitializing", "")
REFUSALS = (400, 403, 409, 422)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the API server did not take a planned object, as a reason of the condition Accepted and in its own words."""

    reason: str
    message: str


class ClusterIO:
    def __init__(self, api: Api) -> None:
        self.api = api

    async def job(self, key: Key) -> Job | None:
        """None when it is gone or going: what it owns goes with it."""
        raw = await self.api.get(JOBS, *key)
        if raw is None or (raw["metadata"].get("deletionTimestamp") and FINALIZER not in raw["metadata"].get("finalizers", ())):
            return None
        return read_job(raw)

    async def job_keys(self, namespace: str | None) -> list[Key]:
        return [(raw["metadata"]["namespace"], raw["metadata"]["name"]) for raw in await self.api.list(JOBS, namespace)]

    async def observe(self, job: Job) -> Observed:
        """Fresh reads, a few a pass; the job's label keeps them small."""
        namespace, labels = job.meta.namespace, f"{JOB_LABEL}={job.meta.name}"
        try:
            raw_clusters = await self.api.list(RAYCLUSTERS, namespace, labels=labels)
        except KindMissing:
            return Observed(kuberay=False)
        clusters = tuple(read_cluster(raw) for raw in raw_clusters if owner_uid(raw) == job.meta.uid)
        pods = tuple(read_pod(raw) for raw in await self.api.list(PODS, namespace, labels=labels))
        queue, complaints = await asyncio.gather(self._queue(job, clusters), self._complaints(job, clusters, pods))
        return Observed(clusters, pods, queue=queue, complaints=complaints)

    async def perform(self, job: Job, plan: Plan) -> Refusal | None:
        """Every step may have been done before. The first refusal ends it; other errors are raised."""
        if plan.finalizer:
            await self._finalize(job, [*job.meta.finalizers, FINALIZER])
        for deletion in plan.delete:
            log.info("deleting %s %s/%s", deletion.kind, plan.namespace, deletion.name)
            await self.api.delete(OF_KIND[deletion.kind], plan.namespace, deletion.name, deletion.uid, deletion.grace_seconds)
        for body in (*plan.ensure, *plan.create):
            try:
                await self._make(plan.namespace, body, update=body in plan.ensure)
            except ApiError as error:
                if error.status not in REFUSALS:
                    raise
                return _refusal(body, error)
        if plan.finalizer is False:
            await self._finalize(job, [name for name in job.meta.finalizers if name != FINALIZER])
        return None

    async def _finalize(self, job: Job, finalizers: list[str]) -> None:
        await self.api.merge(JOBS, job.meta.namespace, job.meta.name, {"metadata": {"finalizers": finalizers}})

    async def write_status(self, job: Job, status: RLHFJobStatus) -> bool:
        """One server-side apply of everything but `progress`, and only if it says something new. True when written."""
        new = _without_progress(status)
        if new == _without_progress(job.status) and job.status.observed_generation == status.observed_generation:
            return False
        meta = job.meta
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid}, "status": new}
        await self.api.apply(JOBS, meta.namespace, body, status=True)
        return True

    async def write_events(self, job: Job, notes: Sequence[Note], now: datetime) -> None:
        """After the status, so that no Event tells what was not stored. One that is refused is only logged: it is no state."""
        for note in notes:
            try:
                await self.api.create(EVENTS, job.meta.namespace, _event(job, note, now))
            except ApiError as error:
                log.warning("%s/%s: Event %s was not written: %s", job.meta.namespace, job.meta.name, note.reason, error)

    async def _make(self, namespace: str, body: Raw, *, update: bool) -> None:
        kind, name = OF_KIND[body["kind"]], body["metadata"]["name"]
        try:
            await self.api.create(kind, namespace, body)
            log.info("created %s %s/%s", kind.kind, namespace, name)
        except ApiError as error:
            if error.status != 409 or error.reason != "AlreadyExists":
                raise
            await self._check_owner(namespace, body)
            if update:
                await self.api.apply(kind, namespace, body)

    async def _check_owner(self, namespace: str, body: Raw) -> None:
        """Raises a conflict unless the namesake is ours, or has just gone."""
        there = await self.api.get(OF_KIND[body["kind"]], namespace, body["metadata"]["name"])
        if there is not None and owner_uid(there) != owner_uid(body):
            raise ApiError(409, "NameConflict", "it exists and belongs to something else: rename the job or delete that object")

    async def _queue(self, job: Job, clusters: tuple[Cluster, ...]) -> Queue | None:
        asked = job.queue
        if asked is None:
            return None
        try:
            if not clusters:
                return Queue(found=await self.api.get(LOCAL_QUEUES, job.meta.namespace, asked.name) is not None)
            waiting = next((c for c in clusters if c.suspended), None)
            return Queue(workload=await self._workload(job.meta.namespace, waiting) if waiting else None)
        except KindMissing:
            return Queue(installed=False)

    async def _workload(self, namespace: str, cluster: Cluster) -> Any:
        found = await self.api.list(WORKLOADS, namespace, labels=f"{WORKLOAD_UID_LABEL}={cluster.uid}")
        return read_conditions((found[0].get("status") or {}).get("conditions")) if found else None

    async def _complaints(self, job: Job, clusters: tuple[Cluster, ...], pods: tuple[Pod, ...]) -> tuple[Complaint, ...]:
        """Events are read only where statuses are silent: a RayCluster without pods, a pod that waits without a reason."""
        uids = [c.uid for c in clusters if not any(p.cluster_uid == c.uid for p in pods) and not c.suspended]
        uids += [p.uid for p in pods if p.scheduled and p.phase == "Pending" and _silent(p)][:1]
        found = await asyncio.gather(*(self.api.list(EVENTS, job.meta.namespace, fields=f"involvedObject.uid={uid}") for uid in uids))
        return tuple(complaint for events in found if (complaint := _complaint(events)))


def _silent(pod: Pod) -> bool:
    waiting = [c.waiting_reason for c in (*pod.init_containers, *pod.containers) if c.running_since is None and not c.terminated]
    return all(reason in SILENT_WAITS for reason in waiting)


def _complaint(events: list[Raw]) -> Complaint | None:
    """The newest warning that tells of a refusal or of a volume. KubeRay's mere warnings begin with `RayCluster spec warning`."""
    telling = [
        e for e in events if e.get("type") == "Warning" and not e.get("message", "").startswith("RayCluster spec warning")
        and (e.get("reason", "").startswith("InvalidRayCluster") or e.get("reason") in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"))
    ]
    if not telling:
        return None
    newest = max(telling, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or e["metadata"].get("creationTimestamp") or "")
    return Complaint(newest["involvedObject"]["uid"], newest["reason"], newest["message"])


def _refusal(body: Raw, error: ApiError) -> Refusal:
    """400 and 422 are about what the user wrote (a misspelt field in spec.pods, say); the rest is about rights and quotas."""
    reason = "NameConflict" if error.reason == "NameConflict" else "InvalidSpec" if error.status in (400, 422) else "Refused"
    return Refusal(reason, f"{body['kind']} {body['metadata']['name']}: {error.message}")


def _without_progress(status: RLHFJobStatus) -> Raw:
    return {key: value for key, value in status.to_dict().items() if key != "progress"}


def _event(job: Job, note: Note, now: datetime) -> Raw:
    meta = job.meta
    about = {"apiVersion": API_VERSION, "kind": KIND, "name": meta.name, "namespace": meta.namespace, "uid": meta.uid}
    return {
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": f"{meta.name}.{uuid.uuid4().hex[:16]}", "namespace": meta.namespace},
        "involvedObject": about, "type": "Warning" if note.warning else "Normal", "reason": note.reason, "message": note.message[:1024],
        "source": {"component": FIELD_MANAGER}, "reportingComponent": FIELD_MANAGER, "count": 1,
        "firstTimestamp": stamp(now), "lastTimestamp": stamp(now),
    }
