"""RLHFJobStatus: what the job says of itself; each longer text stands in it once. Written by two field managers that
never touch each other's fields: the operator (everything but `progress`) and the driver (`progress`).
"""

from enum import StrEnum
from typing import Literal

from pydantic import ConfigDict, Field, JsonValue
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


# One writer, who writes all of it: the API server then keeps account of one field, not of each leaf, in every write and
# every watcher's event.
WHOLE: dict[str, JsonValue] = {"x-kubernetes-map-type": "atomic"}


class StatusModel(Model):
    """A part of the status. A field that a later operator wrote is passed over, not an error: what else is there must
    be read.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class Condition(StatusModel):
    type: ConditionType = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Unknown: it could not be observed.")
    reason: str = Field(
        max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        description="Why, in one word, for programs.",
    )
    message: str = Field(max_length=1024, description="Why, for people.")
    observed_generation: int = Field(0, description="metadata.generation that this was judged for.")
    last_transition_time: str = Field(
        description="When status last changed.", json_schema_extra={"format": "date-time"},
    )


class Restarts(StatusModel):
    """Driver and cluster restarts already charged, by class."""

    total: int = Field(0, description="All of them.")
    app: int = Field(0, description="The driver ended with an error.")
    oom: int = Field(0, description="A container was killed for memory.")
    head_lost: int = Field(0, description="Ray's head process ended.")
    node_lost: int = Field(0, description="A node took pods with it: it failed, ran out of memory or disk, or a pod "
        "was deleted.")
    preempted: int = Field(0, description="Pods were evicted for others; free.")
    stalled: int = Field(0, description="The run did not get further within runPolicy.stallTimeoutSeconds.")


class Failure(StatusModel):
    """One end of a driver, or the loss that took it. `message` is what happened, `words` what the driver itself said.
    """

    failure_class: FailureClass = Field(alias="class", description="Which budget it was charged to.")
    reason: str = Field(description="Reason in one word, the container's where it has one.")
    message: str = Field(max_length=1024, description="The cause: what was lost under the driver, or how it ended by "
        "itself.")
    words: str | None = Field(None, max_length=4096, description="The driver's own last words, in whole lines.")
    exit_code: int | None = Field(None, description="Exit code of the driver.")
    signal: int | None = Field(None, description="Signal that killed the driver.")
    pod: str | None = Field(None, description="The driver's pod.")
    step: int = Field(0, description="Finished training steps at that time.")
    attempt: int | None = Field(None, description="Number of the head pod (record.attempt) that it happened in.")
    time: str = Field(description="When it happened.", json_schema_extra={"format": "date-time"})


class PodSeen(StatusModel):
    """One container's restarts already charged. A pod's uid changes when it is made anew, its restart count when it is
    not.
    """

    uid: str = Field(description="The pod's uid.")
    container: str = Field(description="The container's name.")
    restart_count: int = Field(0, description="Restarts charged so far.")


class Loss(StatusModel):
    """Something broke under the driver, or is about to: written down when it is seen, for a pod takes its history with
    it.
    """

    uid: str = Field(description="The pod's uid.")
    pod: str = Field(description="The pod's name.")
    container: str | None = Field(None, description="The container that ended, where the pod stays.")
    failure_class: FailureClass = Field(alias="class", description="What a driver's end that follows from it is "
        "charged to.")
    reason: str = Field(description="Reason in one word, as the pod or its container tells it.")
    message: str = Field("", max_length=512, description="The same in words.")
    began: str = Field(description="When it began.", json_schema_extra={"format": "date-time"})
    gone: str | None = Field(
        None, description="When the pod was gone or should have been, or its container had ended.",
        json_schema_extra={"format": "date-time"},
    )


class Attempt(StatusModel):
    """The newest head pod's number, which fences the writers of one checkpoint."""

    number: int = Field(description="Head pods so far.")
    pod_uid: str = Field(description="uid of the head pod that has this number.")


class Record(StatusModel):
    """The operator's memory: facts that vanish with the children. With restarts, failures and startTime, all that is
    read back.
    """

    accepted: bool = Field(False, description="The spec was accepted once: one that cannot be read later ends nothing.")
    clusters: int = Field(0, description="RayClusters made so far; the present one's name ends in this number.")
    cluster_created_at: str | None = Field(None, description="When the present RayCluster was made.")
    cluster_uid: str | None = Field(None, description="The present RayCluster's uid: another one by its name is not "
        "ours.")
    admitted_at: str | None = Field(None, description="When the queue admitted the present RayCluster; only with "
        "spec.queue.")
    attempt: Attempt | None = Field(None, description="The newest head pod's number; its driver waits until it is "
        "given.")
    awaited_since: str | None = Field(None, description="Since when pods are awaited: for provisioningDeadlineSeconds "
        "and reprovisioningDeadlineSeconds.")
    first_ready_at: str | None = Field(None, description="When all pods were ready for the first time.")
    ready_at: str | None = Field(None, description="Since when all pods of the present RayCluster are ready.")
    released_at: str | None = Field(None, description="When the RayCluster before the present one was given up.")
    started_at: str | None = Field(None, description="Since when the present RayCluster is at work, for "
        "activeDeadlineSeconds.")
    finished_at: str | None = Field(None, description="When the job ended.")
    active_seconds: int = Field(0, description="Running time of earlier clusters, for activeDeadlineSeconds.")
    allocated_since: str | None = Field(None, description="Since when the job holds scheduled pods.")
    allocated_seconds: int = Field(0, description="Time before that in which it held some, for goodput.")
    charged: list[PodSeen] = Field(default_factory=list, max_length=256, description="Container restarts that are "
        "already counted.")
    losses: list[Loss] = Field(default_factory=list, max_length=32, description="What was lost lately, and may yet "
        "end the driver.")
    restarting: bool = Field(False, description="Something was charged, and training has not begun again.")
    restarts_since_progress: int = Field(0, description="Restarts without a finished step in between; compared with "
        "runPolicy.backoffLimit.")
    progress_step: int = Field(0, description="Step at which restartsSinceProgress was last set to zero.")
    result: Literal["Complete", "Failed"] | None = Field(None, description="How the job ended; never changed once set.")
    result_reason: str | None = Field(None, description="Reason of the end.")
    result_message: str | None = Field(None, max_length=1024, description="Message of the end.")


class RLHFJobStatus(StatusModel):
    observed_generation: int = Field(0, description="metadata.generation that this status was made for.")
    phase: Phase = Field(Phase.PENDING, description="Derived from the conditions.")
    reason: str | None = Field(None, description="Reason of the condition that set the phase.")
    message: str | None = Field(None, max_length=1024, description="Message of the condition that set the phase.")
    cluster_name: str | None = Field(None, description="The job's RayCluster.")
    gpus: int | None = Field(None, description="GPUs that the job asks for.")
    mode: str | None = Field(None, description="placement.mode.")
    queue: str | None = Field(None, description="Queue that admits the job.")
    dashboard: str | None = Field(None, description="Address of Ray's dashboard inside the cluster.")
    restarts: Restarts = Field(default_factory=Restarts, description="Driver and cluster restarts, by class.")
    failures: list[Failure] = Field(default_factory=list, max_length=5, description="The last failures, newest first.")
    start_time: str | None = Field(
        None, description="When the job was first Running.", json_schema_extra={"format": "date-time"},
    )
    completion_time: str | None = Field(
        None, description="When the job ended.", json_schema_extra={"format": "date-time"},
    )
    goodput: str | None = Field(None, description="Time in steps that count, as a share of the time in which pods "
        "were held.")
    conditions: list[Condition] = Field(default_factory=list, description="What is so, and why; docs/status.md "
        "explains each.", json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]})
    record: Record = Field(default_factory=Record, description="The operator's memory.", json_schema_extra=WHOLE)
    progress: Progress | None = Field(None, description="What the driver reports; its own field manager.",
        json_schema_extra=WHOLE)
