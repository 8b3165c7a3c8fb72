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
    PREFLIGHT_PASSED = "PreflightPassed"
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


class StatusModel(Model):
    """A part of the status. A field that a later operator wrote is passed over, not an error: what else is there must be read."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class Condition(StatusModel):
    type: ConditionType = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Unknown: it could not be observed.")
    reason: str = Field(max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", description="Why, in one word, for programs.")
    message: str = Field(max_length=32768, description="Why, for people.")
    observed_generation: int = Field(0, description="metadata.generation that this was judged for.")
    last_transition_time: str = Field(description="When status last changed.", json_schema_extra={"format": "date-time"})


class Restarts(StatusModel):
    """Driver and cluster restarts already charged, by class."""

    total: int = Field(0, description="All of them.")
    app: int = Field(0, description="The driver ended with an error.")
    oom: int = Field(0, description="A container was killed for memory.")
    head_lost: int = Field(0, description="Ray's head process ended.")
    node_lost: int = Field(0, description="A pod vanished with its node.")
    preempted: int = Field(0, description="Pods were evicted for others; free.")
    stalled: int = Field(0, description="No step was finished within runPolicy.stallTimeoutSeconds.")


class Failure(StatusModel):
    """The last failure, as its container told it."""

    failure_class: FailureClass = Field(alias="class", description="Which budget it was charged to.")
    reason: str = Field(description="Reason in one word, the container's where it has one.")
    message: str = Field(max_length=32768, description="The error itself: the container's last words.")
    exit_code: int | None = Field(None, description="Exit code of the container.")
    pod: str | None = Field(None, description="Pod of the container.")
    time: str = Field(description="When it ended.", json_schema_extra={"format": "date-time"})


class PodSeen(StatusModel):
    """One container's restarts already charged. A pod's uid changes when it is made anew, its restart count when it is not."""

    uid: str = Field(description="The pod's uid.")
    container: str = Field(description="The container's name.")
    restart_count: int = Field(0, description="Restarts charged so far.")


class Record(StatusModel):
    """The operator's whole memory: facts that vanish with the children. Nothing else of the status is ever read back."""

    clusters: int = Field(0, description="RayClusters made so far; the present one's name ends in this number.")
    cluster_created_at: str | None = Field(None, description="When the present RayCluster was made.")
    cluster_uid: str | None = Field(None, description="The present RayCluster's uid: another one by its name is not ours.")
    admitted_at: str | None = Field(None, description="When the queue admitted the present RayCluster.")
    ready_at: str | None = Field(None, description="When all pods of the present RayCluster were first ready.")
    started_at: str | None = Field(None, description="When the job was first Running.")
    finished_at: str | None = Field(None, description="When the job ended.")
    active_seconds: int = Field(0, description="Running time of earlier clusters, for activeDeadlineSeconds.")
    charged: list[PodSeen] = Field(default_factory=list, max_length=256, description="Container restarts that are already counted.")
    restarts: Restarts = Field(default_factory=Restarts, description="Restarts so far, by class.")
    restarts_since_progress: int = Field(0, description="Restarts without a finished step in between; compared with runPolicy.backoffLimit.")
    progress_step: int = Field(0, description="Step at which restartsSinceProgress was last set to zero.")
    last_failure: Failure | None = Field(None, description="The last failure.")
    result: Literal["Complete", "Failed"] | None = Field(None, description="How the job ended; never changed once set.")
    result_reason: str | None = Field(None, description="Reason of the end.")
    result_message: str | None = Field(None, max_length=32768, description="Message of the end.")


class RLHFJobStatus(StatusModel):
    observed_generation: int = Field(0, description="metadata.generation that this status was made for.")
    phase: Phase = Field(Phase.PENDING, description="Derived from the conditions.")
    reason: str | None = Field(None, description="Reason of the condition that set the phase.")
    message: str | None = Field(None, max_length=32768, description="Message of the condition that set the phase.")
    cluster_name: str | None = Field(None, description="The job's RayCluster.")
    gpus: int | None = Field(None, description="GPUs that the job asks for.")
    mode: str | None = Field(None, description="placement.mode.")
    queue: str | None = Field(None, description="Queue that admits the job.")
    dashboard: str | None = Field(None, description="Address of Ray's dashboard inside the cluster.")
    restarts: Restarts = Field(default_factory=Restarts, description="Driver and cluster restarts, by class.")
    last_failure: Failure | None = Field(None, description="The last failure, as its container told it.")
    goodput: str | None = Field(None, description="Time in steps that count, as a share of the time in which pods were held.")
    conditions: list[Condition] = Field(default_factory=list, description="What is so, and why; docs/status.md explains each.", json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]})
    record: Record = Field(default_factory=Record, description="The operator's memory.")
    progress: Progress | None = Field(None, description="What the driver reports; its own field manager.")
