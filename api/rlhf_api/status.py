"""RLHFJobStatus: what the job says of itself. Written by two field managers that never touch each other's fields:
the operator (everything but `progress`) and the driver (`progress`)."""

from enum import StrEnum
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from rlhf_api.base import Model
from rlhf_api.progress import Progress


class Phase(StrEnum):
    PENDING = "Pending"
    QUEUED = "Queued"
    PROVISIONING = "Provisioning"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    ACCEPTED = "Accepted"
    QUOTA_RESERVED = "QuotaReserved"
    CLUSTER_READY = "ClusterReady"
    RUNNING = "Running"
    PROGRESSING = "Progressing"
    WEIGHTS_IN_SYNC = "WeightsInSync"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"
    SUSPENDED = "Suspended"
    DEGRADED = "Degraded"
    RESOURCES_RELEASED = "ResourcesReleased"
    COMPLETE = "Complete"
    FAILED = "Failed"


class FailureClass(StrEnum):
    """Why a driver ended without success. Each has its own budget."""

    APP = "App"
    OOM = "OOM"
    HEAD_LOST = "HeadLost"
    NODE_LOST = "NodeLost"
    PREEMPTED = "Preempted"
    STALLED = "Stalled"


class Condition(Model):
    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str = Field(max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    message: str = Field(max_length=32768)
    observed_generation: int = 0
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})


class Restarts(Model):
    """Driver and cluster restarts already charged, by class."""

    total: int = 0
    app: int = 0
    oom: int = 0
    head_lost: int = 0
    node_lost: int = 0
    preempted: int = 0
    stalled: int = 0


class Failure(Model):
    """The last failure, as its container told it."""

    failure_class: FailureClass = Field(alias="class")
    reason: str
    message: str = Field(max_length=32768)
    exit_code: int | None = None
    pod: str | None = None
    time: str = Field(json_schema_extra={"format": "date-time"})


class PodSeen(Model):
    """One container's restarts already charged. A pod's uid changes when it is made anew, its restart count when it is not."""

    uid: str
    container: str
    restart_count: int = 0


class Record(Model):
    """The operator's whole memory: facts that vanish with the children. Nothing else of the status is ever read back."""

    clusters: int = Field(0, description="RayClusters made so far; the present one's name ends in this number.")
    cluster_created_at: str | None = None
    cluster_uid: str | None = None
    admitted_at: str | None = None
    ready_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    active_seconds: int = Field(0, description="Running time of earlier clusters, for activeDeadlineSeconds.")
    charged: list[PodSeen] = Field(default_factory=list, max_length=256)
    restarts: Restarts = Field(default_factory=Restarts)
    restarts_since_progress: int = 0
    progress_step: int = Field(0, description="Step at which restartsSinceProgress was last set to zero.")
    last_failure: Failure | None = None
    result: Literal["Complete", "Failed"] | None = None
    result_reason: str | None = None
    result_message: str | None = None


class RLHFJobStatus(Model):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    observed_generation: int = 0
    phase: Phase = Field(Phase.PENDING, description="Derived from the conditions.")
    reason: str | None = Field(None, description="Reason of the condition that set the phase.")
    message: str | None = Field(None, max_length=32768, description="Message of the condition that set the phase.")
    cluster_name: str | None = Field(None, description="The job's RayCluster.")
    gpus: int | None = Field(None, description="GPUs that the job asks for.")
    mode: str | None = Field(None, description="placement.mode.")
    queue: str | None = Field(None, description="Queue that admits the job.")
    dashboard: str | None = Field(None, description="Address of Ray's dashboard inside the cluster.")
    restarts: Restarts = Field(default_factory=Restarts)
    last_failure: Failure | None = None
    conditions: list[Condition] = Field(default_factory=list, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]})
    record: Record = Field(default_factory=Record, description="The operator's memory.")
    progress: Progress | None = Field(None, description="What the driver reports; its own field manager.")
