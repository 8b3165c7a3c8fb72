"""Raw objects -> typed facts. Pure. Nothing here judges; `decide` does."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from rlhf_api.job import CheckpointSpec, ObjectMeta, PodsSpec, QueueSpec, RLHFJob, RLHFJobSpec, RunPolicySpec
from rlhf_api.overrides import ephemeral
from rlhf_api.parse import QUEUE_LABEL, parse_lenient
from rlhf_api.progress import DRIVER_FIELD_MANAGER
from rlhf_api.status import RLHFJobStatus
from rlhf_operator.clock import moment
from rlhf_operator.edition import edition
from rlhf_operator.names import (
    DRIVER_CONTAINER,
    EDITION_ANNOTATION,
    EPHEMERAL_ANNOTATION,
    HEAD,
    RAY_GROUP_LABEL,
    ROLE_LABEL,
)
from rlhf_operator.presets import NO_PRESETS, Presets
from rlhf_operator.salvage import salvage

Raw = dict[str, Any]
# Ray colours its errors for terminals.
COLOUR = re.compile("\x1b\\[[0-9;]*m")
# Of a log the kubelet keeps the last 2048 bytes, wherever in a line they begin; bytes that are no UTF-8 there grow to
# three each.
LOG_TAIL_BYTES = range(2048, 2048 + 3 * 2 + 1)
NO_IMAGE = "spec.image: set it: this operator has no image for jobs without one (jobs.image of its chart)"


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asks, and what we remember. `parsed` is None exactly when the spec cannot be read; what a job that
    runs already needs of its spec is known all the same, as far as it can be.

    `edition`: of what a RayCluster would be made from now; empty while the spec cannot be right. `ephemeral`: its
    checkpoints die with the trainer's pod; `loss_meant`: and that is meant. `driver_lag`: what the API server's clock
    is ahead of the driver's.
    """

    meta: ObjectMeta
    status: RLHFJobStatus
    parsed: RLHFJob | None = None
    problems: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    suspend: bool = False
    run_policy: RunPolicySpec = field(default_factory=RunPolicySpec)
    queue: QueueSpec | None = None
    edition: str = ""
    ephemeral: bool = False
    loss_meant: bool = False
    driver_lag: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Termination:
    exit_code: int
    reason: str
    message: str
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def signal(self) -> int | None:
        return self.exit_code - 128 if 128 < self.exit_code < 128 + 65 else None


@dataclass(frozen=True, slots=True)
class Container:
    """`last` is the newest termination that the kubelet still knows, whether the container runs again or not."""

    name: str
    ready: bool = False
    restart_count: int = 0
    running_since: datetime | None = None
    waiting_reason: str = ""
    waiting_message: str = ""
    terminated: bool = False
    last: Termination | None = None

    @property
    def failures(self) -> int:
        """Runs that ended without success. The kubelet counts a restart when it happens, not when the run ends."""
        failed_now = self.running_since is None and self.last is not None and self.last.exit_code != 0
        return self.restart_count + failed_now


@dataclass(frozen=True, slots=True)
class Pod:
    """`cluster_uid` is empty for a pod that is no RayCluster's: a stranger's, whatever its labels. `deletion_due`:
    when its grace
    period ends, after which only a kubelet that is gone, or a finalizer, can hold it."""

    name: str
    uid: str
    role: str
    cluster_uid: str = ""
    cluster_name: str = ""
    created_at: datetime | None = None
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    deleting_since: datetime | None = None
    deletion_due: datetime | None = None
    scheduled: bool = True
    unscheduled_reason: str = ""
    unscheduled_message: str = ""
    disruption: str = ""
    disruption_message: str = ""
    disrupted_at: datetime | None = None
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()

    @property
    def driver(self) -> Container | None:
        return next((c for c in self.containers if c.name == DRIVER_CONTAINER), None)

    @property
    def ray(self) -> Container | None:
        """Ray's container, whatever its name: the first that is not the driver's."""
        return next((c for c in self.containers if c.name != DRIVER_CONTAINER), None)

    @property
    def ray_ready(self) -> bool:
        """Of Ray's container alone: the pod as a whole is not ready while its driver rests between two runs."""
        return self.deleting_since is None and self.phase == "Running" and self.ray is not None and self.ray.ready


@dataclass(frozen=True, slots=True)
class ReportedCondition:
    """A condition of somebody else's object."""

    type: str
    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Group:
    """Worker pods of one kind, as many as the RayCluster asks for."""

    name: str
    pods: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """One of the job's RayClusters. `edition`: of the spec that it was made from, empty when nobody wrote it down;
    `ephemeral`: checkpoints die with the trainer's pod, None likewise."""

    name: str
    uid: str
    created_at: datetime | None = None
    deleting: bool = False
    suspended: bool = False
    service: str = ""
    edition: str = ""
    ephemeral: bool | None = None
    groups: tuple[Group, ...] = ()
    conditions: tuple[ReportedCondition, ...] = ()

    def condition(self, kind: str) -> ReportedCondition | None:
        return next((c for c in self.conditions if c.type == kind), None)


@dataclass(frozen=True, slots=True)
class Queue:
    """Kueue, as far as the job sees it. `workload` are the conditions of the RayCluster's Workload; None: there is
    none."""

    installed: bool = True
    found: bool = True
    workload: tuple[ReportedCondition, ...] | None = None


@dataclass(frozen=True, slots=True)
class Complaint:
    """A warning Event about one of the job's objects, read where a status says nothing."""

    uid: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Observed:
    """The world as far as it concerns one job. `clusters` are those that this job owns; `kuberay`: the CRD is
    installed."""

    clusters: tuple[Cluster, ...] = ()
    pods: tuple[Pod, ...] = ()
    kuberay: bool = True
    queue: Queue | None = None
    complaints: tuple[Complaint, ...] = field(default=())


def read_job(raw: Raw, presets: Presets = NO_PRESETS) -> Job:
    """With what it inherits from `presets`. Never raises for a bad spec: that is a fact, too."""
    read = parse_lenient(presets.under(raw))
    problems = (*read.problems, *([NO_IMAGE] if read.job and read.job.spec.image is None else []))
    spec = read.job.spec if read.job else _essentials(raw.get("spec"))
    status = salvage(RLHFJobStatus, raw.get("status"))
    return Job(
        ObjectMeta.model_validate(raw["metadata"]), status, read.job, problems, tuple(read.ignored),
        suspend=spec.suspend, run_policy=spec.run_policy, queue=spec.queue,
        edition=_edition(raw, read.job.spec) if read.job and not problems else "",
        ephemeral=ephemeral(spec), loss_meant=spec.checkpoint.ephemeral,
        driver_lag=_driver_lag(raw["metadata"], status),
    )  # fmt: skip


def _edition(raw: Raw, spec: RLHFJobSpec) -> str:
    """Of the job's own spec: an inherited image makes no job another one, nor do pods, whosesoever."""
    return edition(spec.model_copy(update={"image": raw["spec"].get("image")}))


def _essentials(raw: object) -> RLHFJobSpec:
    """Of a spec that cannot be read: what a job that runs already needs of it, and nothing else."""
    spec: Raw = raw if isinstance(raw, dict) else {}
    known: Raw = {
        "suspend": spec.get("suspend") is True, "run_policy": salvage(RunPolicySpec, spec.get("runPolicy")),
        "queue": _read_queue(spec.get("queue")), "checkpoint": salvage(CheckpointSpec, spec.get("checkpoint")),
        "pods": salvage(PodsSpec, spec.get("pods")),
    }  # fmt: skip
    return RLHFJobSpec.model_construct(**known)


def _read_queue(raw: object) -> QueueSpec | None:
    name = raw.get("name") if isinstance(raw, dict) else None
    try:
        return QueueSpec(name=name) if isinstance(name, str) else None
    except ValidationError:
        return None


def _driver_lag(meta: Raw, status: RLHFJobStatus) -> timedelta:
    """The API server writes down when it took the driver's last report, and the report says when it was made."""
    taken = [moment(m.get("time")) for m in meta.get("managedFields") or [] if m.get("manager") == DRIVER_FIELD_MANAGER]
    made = moment(status.progress.report_time) if status.progress else None
    newest = max((t for t in taken if t), default=None)
    return newest - made if newest and made else timedelta(0)


def heeded(raw: Raw) -> Raw:
    """What decisions read of a job, but for its driver's reports and for times and numbers that only the clock brings
    to bear: where nothing of this and of `heeded_progress` changed, there is nothing to decide. The spec is told by its
    generation."""
    meta, status = raw["metadata"], raw.get("status") or {}
    return {
        **{key: meta.get(key) for key in ("uid", "generation", "deletionTimestamp", "finalizers")},
        "queue": (meta.get("labels") or {}).get(QUEUE_LABEL),
        "status": {key: value for key, value in status.items() if key != "progress"},
    }


def heeded_progress(progress: Raw, record: Raw) -> Raw:
    """The same of `status.progress`: a heartbeat changes none of it, nor does a step after which everything is as
    before."""
    sync, step = progress.get("sync") or {}, progress.get("step") or 0
    return {
        **{key: progress.get(key) for key in ("state", "podUid", "attempt", "degraded", "saveError", "preflight")},
        **{key: key in progress for key in ("stepTime", "checkpoint", "sync")},
        "synced": (sync.get("error"), "verifiedVersion" in sync),
        "stepped": step > 0,
        "pays": bool(record.get("restartsSinceProgress")) and step > (record.get("progressStep") or 0),
    }


def read_cluster(raw: Raw) -> Cluster:
    meta, status = raw["metadata"], raw.get("status") or {}
    notes = meta.get("annotations") or {}
    return Cluster(
        name=meta["name"],
        uid=meta["uid"],
        created_at=moment(meta.get("creationTimestamp")),
        deleting="deletionTimestamp" in meta,
        suspended=bool(raw.get("spec", {}).get("suspend")),
        service=(status.get("head") or {}).get("serviceName", ""),
        edition=notes.get(EDITION_ANNOTATION, ""),
        ephemeral={"true": True, "false": False}.get(notes.get(EPHEMERAL_ANNOTATION, "")),
        groups=tuple(
            Group(g.get("groupName", ""), g.get("replicas") or 0)
            for g in raw.get("spec", {}).get("workerGroupSpecs") or []
        ),
        conditions=read_conditions(status.get("conditions")),
    )


def read_conditions(raw: list[Raw] | None) -> tuple[ReportedCondition, ...]:
    return tuple(
        ReportedCondition(c["type"], c["status"], c.get("reason", ""), c.get("message", "")) for c in raw or []
    )


def read_pod(raw: Raw) -> Pod:
    meta, status = raw["metadata"], raw.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    unscheduled = conditions.get("PodScheduled", {})
    disrupted = conditions.get("DisruptionTarget", {})
    disruption = disrupted if disrupted.get("status") == "True" else {}
    owner = _owning_cluster(meta)
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        role=_role(meta.get("labels") or {}),
        cluster_uid=owner.get("uid", ""),
        cluster_name=owner.get("name", ""),
        created_at=moment(meta.get("creationTimestamp")),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        deleting_since=_deleting_since(meta),
        deletion_due=moment(meta.get("deletionTimestamp")),
        scheduled=unscheduled.get("status") == "True",
        unscheduled_reason=unscheduled.get("reason", ""),
        unscheduled_message=unscheduled.get("message", ""),
        disruption=disruption.get("reason", ""),
        disruption_message=disruption.get("message", ""),
        disrupted_at=moment(disruption.get("lastTransitionTime")),
        containers=_containers(status.get("containerStatuses")),
        init_containers=_containers(status.get("initContainerStatuses")),
    )


def _deleting_since(meta: Raw) -> datetime | None:
    """deletionTimestamp is when the grace period ends; this is when it began."""
    ends = moment(meta.get("deletionTimestamp"))
    return ends - timedelta(seconds=meta.get("deletionGracePeriodSeconds") or 0) if ends else None


def owner_uid(raw: Raw) -> str:
    """uid of the controlling owner; empty for none."""
    return next((str(o["uid"]) for o in raw["metadata"].get("ownerReferences") or [] if o.get("controller")), "")


def _owning_cluster(meta: Raw) -> Raw:
    owners: list[Raw] = [
        o for o in meta.get("ownerReferences") or [] if o.get("controller") and o.get("kind") == "RayCluster"
    ]
    return owners[0] if owners else {}


def _role(labels: dict[str, str]) -> str:
    group = labels.get(RAY_GROUP_LABEL, "")
    return labels.get(ROLE_LABEL) or (HEAD if group == "headgroup" else group)


def _containers(raw: list[Raw] | None) -> tuple[Container, ...]:
    """In the order of the pod's spec is not promised by the kubelet (it sorts by name): find them by name."""
    return tuple(_container(c) for c in raw or [])


def _container(raw: Raw) -> Container:
    state = raw.get("state") or {}
    waiting, ended = state.get("waiting") or {}, state.get("terminated")
    last = ended or (raw.get("lastState") or {}).get("terminated")
    return Container(
        name=raw["name"],
        ready=bool(raw.get("ready")),
        restart_count=raw.get("restartCount", 0),
        running_since=moment((state.get("running") or {}).get("startedAt")),
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        terminated=ended is not None,
        last=_termination(last) if last else None,
    )


def _termination(raw: Raw) -> Termination:
    return Termination(
        exit_code=raw.get("exitCode", 0),
        reason=raw.get("reason", ""),
        message=_whole_lines(raw.get("message") or ""),
        started_at=moment(raw.get("startedAt")),
        finished_at=moment(raw.get("finishedAt")),
    )


def _whole_lines(told: str) -> str:
    cut = len(told.encode()) in LOG_TAIL_BYTES and "\n" in told.rstrip()
    return COLOUR.sub("", told.partition("\n")[2] if cut else told).strip()
