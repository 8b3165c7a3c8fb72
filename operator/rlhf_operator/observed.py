"""Raw objects -> typed facts. Pure. Nothing here judges; `decide` does."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from rlhf_api.job import ObjectMeta, RLHFJob
from rlhf_api.parse import InvalidJob, parse_job
from rlhf_api.status import RLHFJobStatus
from rlhf_operator.clock import moment
from rlhf_operator.names import DRIVER_CONTAINER, HEAD, RAY_GROUP_LABEL, ROLE_LABEL

Raw = dict[str, Any]
# Ray colours its errors for terminals.
COLOUR = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asks, and what we remember. `parsed` is None exactly when the object does not parse."""

    meta: ObjectMeta
    status: RLHFJobStatus
    parsed: RLHFJob | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Termination:
    exit_code: int
    reason: str
    message: str
    started_at: datetime | None
    finished_at: datetime | None


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
    name: str
    uid: str
    role: str
    cluster_uid: str
    created_at: datetime | None = None
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    deleting_since: datetime | None = None
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
class Cluster:
    """One of the job's RayClusters."""

    name: str
    uid: str
    created_at: datetime | None = None
    deleting: bool = False
    suspended: bool = False
    service: str = ""
    conditions: tuple[ReportedCondition, ...] = ()

    def condition(self, kind: str) -> ReportedCondition | None:
        return next((c for c in self.conditions if c.type == kind), None)


@dataclass(frozen=True, slots=True)
class Queue:
    """Kueue, as far as the job sees it. `workload` are the conditions of the RayCluster's Workload; None: there is none."""

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
    """The world as far as it concerns one job. `clusters` are those that this job owns; `kuberay`: the CRD is installed."""

    clusters: tuple[Cluster, ...] = ()
    pods: tuple[Pod, ...] = ()
    kuberay: bool = True
    queue: Queue | None = None
    complaints: tuple[Complaint, ...] = field(default=())


def heeded(raw: Raw) -> Raw:
    """What decisions read of a job: everything but what the driver reports and what changes with each report."""
    changing = ("resourceVersion", "managedFields")
    meta = {key: value for key, value in raw["metadata"].items() if key not in changing}
    status = raw.get("status") or {}
    return {**raw, "metadata": meta, "status": {**status, "progress": (status.get("progress") or {}).get("state")}}


def read_job(raw: Raw) -> Job:
    """Never raises for a bad spec: that is a fact, too."""
    meta = ObjectMeta.model_validate(raw["metadata"])
    status = _read_status(raw.get("status") or {})
    try:
        return Job(meta, status, parse_job(raw))
    except InvalidJob as error:
        return Job(meta, status, None, tuple(error.problems))


def _read_status(raw: Raw) -> RLHFJobStatus:
    """The status; of one that does not parse, at least the record, which must not be lost."""
    try:
        return RLHFJobStatus.model_validate(raw)
    except ValidationError:
        return RLHFJobStatus.model_validate({"record": raw.get("record", {})})


def read_cluster(raw: Raw) -> Cluster:
    meta, status = raw["metadata"], raw.get("status") or {}
    return Cluster(
        name=meta["name"],
        uid=meta["uid"],
        created_at=moment(meta.get("creationTimestamp")),
        deleting="deletionTimestamp" in meta,
        suspended=bool(raw.get("spec", {}).get("suspend")),
        service=(status.get("head") or {}).get("serviceName", ""),
        conditions=read_conditions(status.get("conditions")),
    )


def read_conditions(raw: list[Raw] | None) -> tuple[ReportedCondition, ...]:
    return tuple(ReportedCondition(c["type"], c["status"], c.get("reason", ""), c.get("message", "")) for c in raw or [])


def read_pod(raw: Raw) -> Pod:
    meta, status = raw["metadata"], raw.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    unscheduled = conditions.get("PodScheduled", {})
    disrupted = conditions.get("DisruptionTarget", {})
    disruption = disrupted if disrupted.get("status") == "True" else {}
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        role=_role(meta.get("labels") or {}),
        cluster_uid=owner_uid(raw),
        created_at=moment(meta.get("creationTimestamp")),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        deleting_since=_deleting_since(meta),
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
        message=COLOUR.sub("", raw.get("message") or "").strip(),
        started_at=moment(raw.get("startedAt")),
        finished_at=moment(raw.get("finishedAt")),
    )
