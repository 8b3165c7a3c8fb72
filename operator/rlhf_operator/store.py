"""What the API server holds, as far as it concerns jobs: watches, lists and the answers to our own writes fill it,
passes read it.

No I/O and no clock of its own. A watch may lose, repeat or reorder what it tells: of two versions of an object the
newer counts, what was once gone stays gone, and a list removes what it lacks. Kept are projections, by job, so that
a pass costs what the job has and not what the cluster has. Threads may use it at once: kopf has one of its own.
"""

import hashlib
import json
import logging
import marshal
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from rlhf_api.job import DEEPEST
from rlhf_operator.complaints import Complaints
from rlhf_operator.kinds import EVENTS, JOBS, LOCAL_QUEUES, PODS, RAYCLUSTERS, WORKLOADS, Kind
from rlhf_operator.names import FINALIZER, JOB_LABEL, WORKLOAD_UID_LABEL
from rlhf_operator.observed import (
    Cluster,
    Complaint,
    Job,
    Observed,
    Pod,
    Queue,
    ReportedCondition,
    heeded,
    heeded_progress,
    owner_uid,
    read_cluster,
    read_conditions,
    read_job,
    read_pod,
)
from rlhf_operator.presets import NO_PRESETS, Presets
from rlhf_operator.shelf import Held, Key, Rank, Shelf

log = logging.getLogger(__name__)
Raw = dict[str, Any]
Wake = Callable[[Key], None]

WATCHED = (JOBS, RAYCLUSTERS, PODS, WORKLOADS, LOCAL_QUEUES, EVENTS)
# What a pass cannot do without. Events only explain: kopf's own list of them is enough.
LISTED = (JOBS, RAYCLUSTERS, PODS, WORKLOADS, LOCAL_QUEUES)
SELECTORS = {RAYCLUSTERS: JOB_LABEL, PODS: JOB_LABEL}
GONE_MAX = 20_000
BEREFT_MAX = 5_000
LEVELS_KEPT = 2 * DEEPEST
# Containers that wait with these reasons may wait for a volume, which only an Event tells.
SILENT_WAITS = ("ContainerCreating", "PodInitializing", "")


@dataclass(frozen=True, slots=True)
class JobFacts:
    """A job as bytes, in two parts, and the little that is asked of all jobs at once. A driver's report changes
    `fresh` alone, so that the rest is packed and read once for many of them; `lasting` is its fingerprint. `heeded`
    and `heeded_progress` tell whether a change is worth a pass, `made` whether it ever owned anything."""

    lasting: bytes
    packed: bytes
    fresh: bytes
    heeded: bytes
    heeded_progress: bytes
    queue: str
    phase: str
    reason: str
    at_rest: bool
    goodput: float | None
    made: bool

    def unpack(self) -> Raw:
        raw: Raw = marshal.loads(zlib.decompress(self.packed))
        meta, progress = marshal.loads(self.fresh)
        raw["metadata"] |= meta
        if progress is not None:
            raw["status"]["progress"] = progress
        return raw


class Store:
    """`wake` is told of every job that a change concerns. It is called with the lock held: it must not come back."""

    def __init__(
        self, wake: Wake = lambda key: None, clock: Callable[[], float] = time.monotonic,
        presets: Presets = NO_PRESETS,
    ) -> None:
        self._wake, self._lock, self.presets = wake, threading.RLock(), presets
        self.jobs: Shelf[JobFacts] = Shelf()
        self.clusters: Shelf[Cluster] = Shelf()
        self.pods: Shelf[Pod] = Shelf()
        self.workloads: Shelf[tuple[ReportedCondition, ...]] = Shelf()
        self.queues: Shelf[None] = Shelf()
        self.complaints = Complaints(clock)
        self._shelves: dict[Kind, Shelf[Any]] = {
            JOBS: self.jobs,
            RAYCLUSTERS: self.clusters,
            PODS: self.pods,
            WORKLOADS: self.workloads,
            LOCAL_QUEUES: self.queues,
        }
        self._gone: OrderedDict[str, float] = OrderedDict()
        self._bereft: OrderedDict[Key, list[str]] = OrderedDict()
        self._known: dict[Kind, bool] = {}

    # what fills it

    def put(self, kind: Kind, raw: Raw, *, own: bool = False) -> None:
        """As it is or was. `own`: the answer to a write of ours, which tells the operator nothing new of a job. Never
        raises: one object that nobody can read must not keep the others from being told of."""
        with self._lock:
            try:
                if kind is EVENTS:
                    self._complain(raw)
                elif kind in self._shelves:
                    self._put(kind, raw, own)
            except Exception:
                name = raw.get("metadata", {}).get("name")
                log.exception("%s %s cannot be read: what was known of it stays", kind.kind, name)

    def drop(self, kind: Kind, uid: str, version: float = float("inf")) -> None:
        """It is gone, whatever is told later of what it was up to that version. One that only left our sight, with its
        label, comes back with a newer one."""
        if kind is EVENTS:
            return
        with self._lock:
            held = self._shelves[kind].by_uid.get(uid) if kind in self._shelves else None
            if held is not None and held.version > version:
                return
            self._gone[uid] = max(version, self._gone.get(uid, 0.0))
            if len(self._gone) > GONE_MAX:
                self._gone.popitem(last=False)
            if kind in self._shelves and (held := self._shelves[kind].drop(uid)) is not None:
                self._left(kind, held)

    def listed(self, kind: Kind, uids: Collection[str], version: int) -> None:
        """A whole list was put, which is as of `version`: what is not newer and not in it has gone unseen."""
        with self._lock:
            self._exists(kind, True)
            lost = [
                held.uid
                for held in self._shelves[kind].by_uid.values()
                if held.version <= version and held.uid not in uids
            ]
            for uid in lost:
                self.drop(kind, uid, version)

    def missing(self, kind: Kind) -> None:
        """The API server does not know the kind."""
        with self._lock:
            if kind in self._shelves:
                self._exists(kind, False)
                self._shelves[kind].clear()

    # what passes ask

    @property
    def ready(self) -> bool:
        """Every kind was listed once, or is not installed."""
        return not self.unlisted

    @property
    def unlisted(self) -> list[str]:
        return [kind.plural for kind in LISTED if kind not in self._known]

    def listed_once(self, kind: Kind) -> bool:
        return kind in self._known

    def installed(self, kind: Kind) -> bool:
        return self._known.get(kind, False)

    def holds(self, kind: Kind, uid: str) -> bool:
        return kind in self._shelves and uid in self._shelves[kind].by_uid

    def raw(self, key: Key) -> Raw | None:
        """A job as it was last told of."""
        held = self.jobs.named(key)
        return held.facts.unpack() if held else None

    def job(self, key: Key) -> Job | None:
        """None when it is gone, or going without us: what it owns goes with it."""
        raw = self.raw(key)
        if raw is None or _leaves(raw["metadata"]):
            return None
        return read_job(raw, self.presets)

    def observe(self, job: Job) -> Observed:
        key = (job.meta.namespace, job.meta.name)
        with self._lock:
            if not self.installed(RAYCLUSTERS):
                return Observed(kuberay=False)
            clusters = tuple(held.facts for held in self.clusters.of(key) if held.owner == job.meta.uid)
            pods = tuple(held.facts for held in self.pods.of(key))
            return Observed(
                clusters, pods, queue=self._queue(job, clusters), complaints=self._complaints(clusters, pods)
            )

    def take_bereft(self, key: Key) -> list[str]:
        """The uids of jobs of this name that went since this was last asked, and may have left something behind."""
        with self._lock:
            return self._bereft.pop(key, [])

    def owned(self, kind: Kind, key: Key, owners: Collection[str]) -> list[tuple[str, str]]:
        """Name and uid of the RayClusters or pods of that job's name which one of these uids controls."""
        with self._lock:
            return [(held.name[1], held.uid) for held in self._shelves[kind].of(key) if held.owner in owners]

    def rank(self, key: Key) -> Rank:
        with self._lock:
            held = self.jobs.named(key)
            if held is None:
                return Rank.NEW
            if held.facts.made:
                return Rank.TOLD
            return Rank.UNTOLD if any(one.owner == held.uid for one in self.clusters.of(key)) else Rank.NEW

    def job_keys(self, *, at_rest: bool = True) -> list[Key]:
        """Of all jobs, or of those for which something is left to do."""
        with self._lock:
            return [held.name for held in self.jobs.by_uid.values() if at_rest or not held.facts.at_rest]

    def wants_queue(self) -> bool:
        with self._lock:
            return any(held.facts.queue for held in self.jobs.by_uid.values())

    def reasons(self) -> Counter[tuple[str, str]]:
        """Jobs by status.phase and status.reason."""
        with self._lock:
            return Counter((held.facts.phase, held.facts.reason) for held in self.jobs.by_uid.values())

    def goodputs(self) -> list[tuple[Key, float]]:
        with self._lock:
            return [
                (held.name, held.facts.goodput) for held in self.jobs.by_uid.values() if held.facts.goodput is not None
            ]

    def sizes(self) -> dict[str, int]:
        return {kind.plural: len(shelf) for kind, shelf in self._shelves.items()} | {
            EVENTS.plural: len(self.complaints)
        }

    # inside

    def _put(self, kind: Kind, raw: Raw, own: bool) -> None:
        meta, shelf = raw["metadata"], self._shelves[kind]
        name, version = (meta.get("namespace", ""), meta["name"]), version_of(meta)
        if version <= self._gone.get(meta["uid"], -1.0) or shelf.newer(meta["uid"], name, version):
            return
        group = _group(kind, raw)
        if group is None:
            self.drop(kind, meta["uid"], version)
            return
        self._exists(kind, True, listed=False)
        before = shelf.by_uid.get(meta["uid"])
        held = Held(meta["uid"], version, name, group, owner_uid(raw), self._read(kind, raw, before))
        if (replaced := shelf.put(held)) is not None:
            self._gone[replaced.uid] = float("inf")
            self._left(kind, replaced)
        self.complaints.adopt(held.uid)
        if not (own and kind is JOBS) and (before is None or _news(before.facts, held.facts)):
            self._changed(kind, held, new=before is None)

    def _read(self, kind: Kind, raw: Raw, before: Held[Any] | None) -> Any:
        if kind is JOBS:
            return _job_facts(raw, before.facts if before else None)
        if kind is WORKLOADS:
            return read_conditions((raw.get("status") or {}).get("conditions"))
        return read_cluster(raw) if kind is RAYCLUSTERS else read_pod(raw) if kind is PODS else None

    def _left(self, kind: Kind, held: Held[Any]) -> None:
        self.complaints.drop(held.uid)
        if kind is JOBS and held.facts.made:
            self._bereft.setdefault(held.name, []).append(held.uid)
            if len(self._bereft) > BEREFT_MAX:  # a standby's: nobody asks
                self._bereft.popitem(last=False)
        self._changed(kind, held, new=True)

    def _changed(self, kind: Kind, held: Held[Any], *, new: bool) -> None:
        """Wakes those that it concerns. Of a queue only its coming and going counts."""
        if kind is LOCAL_QUEUES:
            for job in self.jobs.by_uid.values() if new else ():
                if (job.name[0], job.facts.queue) == held.name:
                    self._wake(job.name)
        elif kind is WORKLOADS:
            if (cluster := self.clusters.by_uid.get(held.group[1])) is not None:
                self._wake(cluster.group)
        else:
            self._wake(held.group)

    def _complain(self, raw: Raw) -> None:
        uid = raw.get("involvedObject", {}).get("uid", "")
        about = self.pods.by_uid.get(uid) or self.clusters.by_uid.get(uid)
        if self.complaints.put(raw, ours=(uid,) if about else ()) and about:
            self._wake(about.group)

    def _exists(self, kind: Kind, installed: bool, *, listed: bool = True) -> None:
        """An event shows that the kind exists, but only a list that all of it is held."""
        if not listed and (kind not in self._known or self._known[kind] is installed):
            return
        before, self._known[kind] = self._known.get(kind), installed
        if before is not None and before is not installed:
            for held in self.jobs.by_uid.values():
                self._wake(held.name)

    def _queue(self, job: Job, clusters: tuple[Cluster, ...]) -> Queue | None:
        asked = job.queue
        if asked is None:
            return None
        if not (self.installed(LOCAL_QUEUES) and self.installed(WORKLOADS)):
            return Queue(installed=False)
        if not clusters:
            return Queue(found=self.queues.named((job.meta.namespace, asked.name)) is not None)
        waiting = next((c for c in clusters if c.suspended), None)
        found = self.workloads.of((job.meta.namespace, waiting.uid)) if waiting else []
        return Queue(workload=found[0].facts if found else None)

    def _complaints(self, clusters: tuple[Cluster, ...], pods: tuple[Pod, ...]) -> tuple[Complaint, ...]:
        """Only where statuses are silent: of a RayCluster without pods, of a pod that waits without a reason."""
        uids = [c.uid for c in clusters if not any(p.cluster_uid == c.uid for p in pods) and not c.suspended]
        uids += [p.uid for p in pods if p.scheduled and p.phase == "Pending" and _silent(p)]
        return tuple(complaint for uid in uids if (complaint := self.complaints.of(uid)) is not None)


def version_of(meta: Raw) -> int:
    """Of one kind they compare as integers (Kubernetes 1.35 and later promise it, etcd always did)."""
    version = str(meta.get("resourceVersion", ""))
    return int(version) if version.isdecimal() else 0


def _group(kind: Kind, raw: Raw) -> Key | None:
    """None for what is nobody's: a pod that lost its label, a Workload of something else than a RayCluster."""
    meta = raw["metadata"]
    namespace, labels = meta.get("namespace", ""), meta.get("labels") or {}
    if kind in (RAYCLUSTERS, PODS):
        return (namespace, labels[JOB_LABEL]) if JOB_LABEL in labels else None
    if kind is WORKLOADS:
        return (namespace, labels[WORKLOAD_UID_LABEL]) if WORKLOAD_UID_LABEL in labels else None
    return namespace, meta["name"]


def _leaves(meta: Raw) -> bool:
    return "deletionTimestamp" in meta and FINALIZER not in (meta.get("finalizers") or ())


def _news(before: Any, after: Any) -> bool:
    if isinstance(before, JobFacts) and isinstance(after, JobFacts):
        return (before.heeded, before.heeded_progress) != (after.heeded, after.heeded_progress)
    return bool(before != after)


def _job_facts(raw: Raw, before: JobFacts | None) -> JobFacts:
    rest, meta, progress = _parted(raw)
    body, status = _packed(rest), rest.get("status") or {}
    lasting, fresh = _digest(body), marshal.dumps((meta, progress))
    stirred = _digest(_canonical(heeded_progress(progress or {}, status.get("record") or {})))
    if before is not None and before.lasting == lasting:
        return replace(before, fresh=fresh, heeded_progress=stirred)
    queue = (raw.get("spec") or {}).get("queue")
    return JobFacts(
        lasting=lasting,
        packed=zlib.compress(body, 1),
        fresh=fresh,
        heeded=_digest(_canonical(heeded(rest))),
        heeded_progress=stirred,
        queue=str(queue.get("name", "")) if isinstance(queue, dict) else "",
        phase=str(status.get("phase") or "Pending"),
        reason=str(status.get("reason") or ""),
        at_rest=_at_rest(status),
        goodput=_number(status.get("goodput")),
        made=bool((status.get("record") or {}).get("clusters")),
    )


def _parted(raw: Raw) -> tuple[Raw, Raw, Raw | None]:
    """What stays through a driver's reports, and what each changes: of its metadata, and `status.progress`. Of who
    manages which field only who and when is read."""
    meta, status = dict(raw["metadata"]), dict(raw.get("status") or {})
    managers = [
        {k: v for k, v in m.items() if k in ("manager", "time", "subresource")}
        for m in meta.pop("managedFields", None) or ()
    ]
    fresh = {"managedFields": managers, "resourceVersion": meta.pop("resourceVersion", None)}
    progress = status.pop("progress", None)
    return {**raw, "metadata": meta, "status": status}, fresh, progress


def _canonical(value: Raw) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=12).digest()


def _packed(rest: Raw) -> bytes:
    """marshal takes 2,000 levels, the API server 10,000: of a spec that nests without end only that it does is kept,
    for which it is refused."""
    try:
        return marshal.dumps(rest)
    except ValueError:
        return marshal.dumps({**rest, "spec": _cut(rest["spec"], LEVELS_KEPT)})


def _cut(node: Any, levels: int) -> Any:
    if isinstance(node, dict):
        return {key: _cut(value, levels - 1) for key, value in node.items()} if levels else {}
    if isinstance(node, list):
        return [_cut(value, levels - 1) for value in node] if levels else []
    return node


def _at_rest(status: Raw) -> bool:
    true = {c.get("type") for c in status.get("conditions") or () if c.get("status") == "True"}
    return "ResourcesReleased" in true and bool(true & {"Complete", "Failed"})


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _silent(pod: Pod) -> bool:
    waiting = [
        c.waiting_reason
        for c in (*pod.init_containers, *pod.containers)
        if c.running_since is None and not c.terminated
    ]
    return all(reason in SILENT_WAITS for reason in waiting)
