"""The only cluster I/O of a pass: look (into the store), act (`perform`), tell (`write_status`, `write_events`).

A pass makes no read. What a write answers goes into the store at once, so that the next pass sees what this one did,
whenever the watch comes to tell it.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf_api import API_VERSION, KIND
from rlhf_api.status import RLHFJobStatus
from rlhf_operator import FIELD_MANAGER, metrics
from rlhf_operator.client import Api, ApiError, KindMissing
from rlhf_operator.clock import stamp
from rlhf_operator.decide import Note
from rlhf_operator.kinds import CLAIMS, EVENTS, JOBS, OF_KIND, RAYCLUSTERS, Kind
from rlhf_operator.names import FINALIZER, JOB_LABEL
from rlhf_operator.observed import Job, Observed, owner_uid
from rlhf_operator.plan import Deletion, Plan
from rlhf_operator.shelf import Key
from rlhf_operator.store import Store

log = logging.getLogger(__name__)
Raw = dict[str, Any]
REFUSALS = (400, 403, 409, 422)
# As the API server names a field of the RayCluster itself that its schema lacks. Below `template` lies the pod, which
# spec.pods may have written.
LACKING = re.compile(r'unknown field "(spec\.(?!\S*\.template\.)[^"]+)"')
TOO_OLD = ("the cluster's RayCluster CRD has no {}: upgrade KubeRay to 1.6 or later, and its CRDs by hand, which Helm "
    "leaves as they are")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the API server did not take a planned object, as a reason of the condition Accepted and in its own words.
    InvalidSpec waits for an edit; NameConflict, KubeRayTooOld and Refused (rights, quotas) may end without one, and are
    tried again at a slow pace."""

    reason: str
    message: str


class InTheWay(Exception):
    """An object of a predecessor of the same name has not gone yet. Nobody needs to do anything but wait a little."""


class Stale(Exception):
    """The job changed between our look and our write, which the API server therefore refused. Look again; it is no
    error."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A status that was sent, and what the API server made of it, both as digests."""

    uid: str
    status: bytes
    kept: bytes


class ClusterIO:
    """Knows what it last sent for each job: a status of which the API server keeps only a part is not sent for ever."""

    def __init__(self, api: Api, store: Store) -> None:
        self.api, self.store = api, store
        self._sent: dict[Key, _Sent] = {}
        # uid of a job -> the version that its pass has seen, and the one that the pass's own patch made of it.
        self._patched: dict[str, tuple[str, str]] = {}

    def job(self, key: Key) -> Job | None:
        """None when it is gone, or going without us: what it owns goes with it."""
        job = self.store.job(key)
        if job is None:
            self._sent.pop(key, None)
        else:
            self._patched.pop(job.meta.uid, None)
        return job

    def observe(self, job: Job) -> Observed:
        return self.store.observe(job)

    async def catch_up(self, job: Job) -> None:
        """After a write that came too late: the newest version of the job, without waiting for the watch."""
        raw = await self.api.get(JOBS, job.meta.namespace, job.meta.name)
        if raw is None:
            self.store.drop(JOBS, job.meta.uid)
        elif raw["metadata"].get("resourceVersion") == job.meta.resource_version:
            raise ApiError(409, "Conflict", "the API server refuses a write to the version that it holds")
        else:
            self.store.put(JOBS, raw)

    async def perform(self, job: Job, plan: Plan) -> Refusal | None:
        """Every step may have been done before. The first refusal ends it; other errors are raised, InTheWay and Stale
        among them.

        The finalizer goes on before anything is made, and off after everything was deleted."""
        if plan.finalizer:
            await self._finalize(job, on=True)
        for deletion in plan.delete:
            await self.delete(plan.namespace, deletion)
        for body in (*plan.ensure, *plan.create):
            try:
                await self._make(plan.namespace, body, update=body in plan.ensure)
            except ApiError as error:
                if error.status not in REFUSALS:
                    raise
                return _refusal(body, error)
        if plan.finalizer is False:
            await self._finalize(job, on=False)
        return None

    async def write_status(self, job: Job, status: RLHFJobStatus) -> bool:
        """One server-side apply of everything but `progress`, and only if it says something new. True when written."""
        new, key = _told(status.to_dict()), (job.meta.namespace, job.meta.name)
        digest = _digest(new)
        if (
            digest == _digest(_told(job.status.to_dict()))
            or not self.store.holds(JOBS, job.meta.uid)
            or self._was_sent(job, key, digest)
        ):
            return False
        meta = {"name": key[1], "namespace": key[0], "uid": job.meta.uid, **self._seen(job)}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "status": new}
        answer = await self._answered(job, self.api.apply(JOBS, key[0], body, status=True))
        if answer is None:
            return False
        self._sent[key] = _Sent(job.meta.uid, digest, _digest(_told(answer.get("status") or {})))
        metrics.told(job.status, status)
        return True

    async def write_events(self, job: Job, notes: Sequence[Note], now: datetime) -> None:
        """After the status, so that no Event tells what was not stored. One that is refused is only logged: it is no
        state."""
        for note in notes:
            try:
                await self.api.create(EVENTS, job.meta.namespace, _event(job, note, now))
            except ApiError as error:
                log.warning(
                    "%s/%s: Event %s was not written: %s", job.meta.namespace, job.meta.name, note.reason, error
                )

    def _was_sent(self, job: Job, key: Key, digest: bytes) -> bool:
        """And nobody changed the status since."""
        sent = self._sent.get(key)
        if sent is None or (sent.uid, sent.status) != (job.meta.uid, digest):
            return False
        there = self.store.raw(key)
        return there is not None and _digest(_told(there.get("status") or {})) == sent.kept

    def _seen(self, job: Job) -> dict[str, str]:
        """The version that this pass decided on, or what its own patch made of that: the precondition of its next
        write."""
        seen, patched = self._patched.get(job.meta.uid, ("", ""))
        version = patched if seen == job.meta.resource_version else job.meta.resource_version
        return {"resourceVersion": version} if version else {}

    async def _answered(self, job: Job, write: Awaitable[Raw]) -> Raw | None:
        """The job after a write to it; None when it is gone. Raises Stale."""
        try:
            answer = await write
        except ApiError as error:
            if error.status == 409:
                raise Stale(error.message) from error
            if error.status != 404 or isinstance(error, KindMissing):
                raise
            self.store.drop(JOBS, job.meta.uid)
            return None
        self.store.put(JOBS, answer, own=True)
        return answer

    async def _finalize(self, job: Job, *, on: bool) -> None:
        """On an object that is being deleted nobody may put one."""
        there = job.meta.finalizers
        if (FINALIZER in there) is on or (on and job.meta.deletion_timestamp):
            return
        wanted = [*there, FINALIZER] if on else [name for name in there if name != FINALIZER]
        patch = {"metadata": {"uid": job.meta.uid, **self._seen(job), "finalizers": wanted}}
        answer = await self._answered(job, self.api.merge(JOBS, job.meta.namespace, job.meta.name, patch))
        if answer is None:
            return
        self._patched[job.meta.uid] = (job.meta.resource_version, answer["metadata"].get("resourceVersion", ""))
        if job.meta.deletion_timestamp and not wanted:
            self._patched.pop(job.meta.uid, None)
            self.store.drop(JOBS, job.meta.uid)

    async def delete(self, namespace: str, deletion: Deletion) -> None:
        log.info("deleting %s %s/%s", deletion.kind, namespace, deletion.name)
        kind = OF_KIND[deletion.kind]
        there = await self.api.delete(kind, namespace, deletion.name, deletion.uid, deletion.grace_seconds)
        if there is None:
            self.store.drop(kind, deletion.uid)
        else:
            self.store.put(kind, there)

    async def _make(self, namespace: str, body: Raw, *, update: bool) -> None:
        kind, name = OF_KIND[body["kind"]], body["metadata"]["name"]
        try:
            self.store.put(kind, await self.api.create(kind, namespace, body))
            log.info("created %s %s/%s", kind.kind, namespace, name)
        except KindMissing:
            self.store.missing(kind)
            raise
        except ApiError as error:
            if error.status != 409 or error.reason != "AlreadyExists":
                raise
            await self._meet(kind, namespace, body, update=update)

    async def _meet(self, kind: Kind, namespace: str, body: Raw, *, update: bool) -> None:
        """What stands where `body` shall be: if it is ours, it is brought up to date where it has to be."""
        there = await self.api.get(kind, namespace, body["metadata"]["name"])
        if there is None:
            raise InTheWay(f"{kind.kind} {body['metadata']['name']} has just gone")
        _check_owner(there, body)
        if update and not _covers(there, body):
            there = await self.api.apply(kind, namespace, body)
        self.store.put(kind, there)


def _check_owner(there: Raw, body: Raw) -> None:
    """Raises InTheWay for what a job of the same name left behind and is about to go, and NameConflict for a
    stranger's."""
    meta, job = there["metadata"], body["metadata"]["labels"][JOB_LABEL]
    owner = next((o for o in meta.get("ownerReferences") or [] if o.get("controller")), None)
    labelled = (meta.get("labels") or {}).get(JOB_LABEL) == job
    going = "deletionTimestamp" in meta
    if owner is not None and owner["uid"] == owner_uid(body):
        return
    if body["kind"] == CLAIMS.kind and labelled and owner is None and not going:
        return
    named = f"{body['kind']} {meta['name']}"
    if labelled and (going or (owner is not None and (owner.get("kind"), owner.get("name")) == (KIND, job))):
        raise InTheWay(f"{named} of an earlier job of this name has not gone yet")
    raise ApiError(409, "NameConflict", "it exists and belongs to something else: rename the job or delete that object")


def _covers(there: Any, wanted: Any) -> bool:
    """Whether everything that is wanted is there; what else is there was added by others. Not so in lists: the API
    server adds nothing in those that are planned, and what a rule or a peer no longer names is to go."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(_covers(there.get(key), value) for key, value in wanted.items())
    return bool(there == wanted)


def _refusal(body: Raw, error: ApiError) -> Refusal:
    """400 and 422 are about what the user wrote (a misspelt field in spec.pods, say), unless it is a field of KubeRay's
    own that is missing; the rest is about rights and quotas."""
    if body["kind"] == RAYCLUSTERS.kind and (lacking := LACKING.findall(error.message)):
        return Refusal("KubeRayTooOld", TOO_OLD.format(", ".join(lacking)))
    reason = (
        "NameConflict" if error.reason == "NameConflict" else "InvalidSpec" if error.status in (400, 422) else "Refused"
    )
    return Refusal(reason, f"{body['kind']} {body['metadata']['name']}: {error.message}")


def _told(status: Raw) -> Raw:
    """What the operator tells: all but the driver's part."""
    return {key: value for key, value in status.items() if key != "progress"}


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _event(job: Job, note: Note, now: datetime) -> Raw:
    meta = job.meta
    about = {"apiVersion": API_VERSION, "kind": KIND, "name": meta.name, "namespace": meta.namespace, "uid": meta.uid}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta.name}.{uuid.uuid4().hex[:16]}", "namespace": meta.namespace},
        "involvedObject": about,
        "type": "Warning" if note.warning else "Normal",
        "reason": note.reason,
        "message": note.message[:1024],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "count": 1,
        "firstTimestamp": stamp(now),
        "lastTimestamp": stamp(now),
    }
