"""Progress: what the driver tells of the run, server-side-applied to `status.progress` of its own job.

Numbers that people read are strings with few digits: a status that changes in the ninth digit is a write without news.
"""

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from rlhf_api.base import Model

DRIVER_FIELD_MANAGER = "rlhf-driver"
RUN_CONFIG_PATH = "/etc/rlhf/run.yaml"
HEARTBEAT_SECONDS = 10.0
DRIVER_PORT = 8266  # of the head pod: there a worker pod that is being deleted tells the driver

# Exit codes of the driver. Everything else is retried.
EXIT_OK = 0
EXIT_BAD_SPEC = 64
EXIT_BAD_DATA = 65


class Sync(Model):
    """The last weight sync."""

    version: int = Field(description="Version that every engine holds: optimizer steps since the base model.")
    seconds: str = Field(description="Time of the last sync, pause and resume included.")
    backend: str = Field(description="Way that the weights took.")
    verified_version: int | None = Field(None, description="Last version whose delivery was proven.")
    error: str | None = Field(None, max_length=1024, description="Why the last sync failed; absent when it did not.")


class Saved(Model):
    """The newest whole checkpoint."""

    step: int = Field(description="Step after which it was made.")
    path: str = Field(max_length=4096, description="Directory, inside the trainer pods.")
    time: str = Field(description="When it was whole.", json_schema_extra={"format": "date-time"})


class Preflight(Model):
    """What was tried before the first step."""

    failed: str | None = Field(None, max_length=64, pattern=r"^[A-Za-z]+$", description="The check that failed; "
        "absent when all passed.")
    message: str = Field(max_length=1024, description="What the failed check found, and the fix; or the checks that "
        "passed.")
    seconds: str = Field(description="Time that all checks took.")


class Speed(Model):
    """Of the last step; what a device or an engine does not tell is absent."""

    mfu: str | None = Field(None, description="Model FLOPs of the training phase, as a share of its GPUs' dense "
        "bfloat16 peak; absent for GPUs that are not known.")
    generate_tokens_per_gpu: str | None = Field(None, description="Generated tokens a second and GPU of the engines, "
        "while they generate.")
    train_tokens_per_gpu: str | None = Field(None, description="Trained tokens, prompts too, a second and GPU of the "
        "trainer, in the training phase.")
    idle_trainer: str = Field(description="Share of the step in which the trainer's GPUs do nothing.")
    idle_engines: str = Field(description="Share of the step in which the engines' GPUs do nothing, or have few of "
        "their sequences.")
    bottleneck: Literal["generate", "score", "forward", "train", "sync", "data"] = Field(description="The phase that "
        "holds the run back.")
    advice: str = Field(max_length=256, description="The same with its figures, and what to change.")


class Progress(Model):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    pod_uid: str | None = Field(None, max_length=64, description="uid of the driver's pod: a report of another pod is "
        "an earlier driver's.")
    attempt: int | None = Field(None, ge=0, description="Number of the driver's head pod (status.record.attempt), "
        "which fences the writers of one checkpoint.")
    productive_seconds: int | None = Field(None, ge=0, description="Time in steps that count: those of the checkpoint "
        "that was resumed from, and those after it.")
    state: Literal[
        "Starting", "Training", "Draining", "Drained", "Done"
    ] = Field("Starting", description="Drained: saved and "
        "idle, the pods may go.")
    detail: str = Field("", max_length=1024, description="What the driver is doing, in words.")
    step: int = Field(0, description="Finished training steps.")
    total_steps: int = Field(0, description="trainer.steps.")
    display: str = Field("", description="step/totalSteps, for the column.")
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint that this driver started from.")
    step_time: str | None = Field(
        None, description="When the last step finished.", json_schema_extra={"format": "date-time"},
    )
    activity_time: str | None = Field(None, description="When the run last got further: a step, a phase of one, or "
        "any report while it does what has a deadline of its own (start, evaluation, export).",
        json_schema_extra={"format": "date-time"})
    report_time: str | None = Field(
        None, description="When this report was made.", json_schema_extra={"format": "date-time"},
    )
    reward: str | None = Field(None, description="Mean reward of the last step's samples.")
    kl: str | None = Field(None, description="Mean KL to the reference model, per token.")
    mismatch: str | None = Field(None, description="Mean |log pi_trainer - log pi_engine| per token.")
    tokens_per_second: str | None = Field(None, description="Generated tokens of the last step over the whole step's "
        "time.")
    speed: Speed | None = Field(None, description="How fast the last step was; docs/telemetry.md tells what is normal.")
    dropped_prompts: int | None = Field(
        None, ge=0, description="Prompts left out so far for their length (data.overlongPrompts), once in each epoch."
    )
    eta_seconds: int | None = Field(None, description="Seconds to the last step at the present pace.")
    eta: str | None = Field(None, description="etaSeconds in words, for the column.")
    preflight: Preflight | None = Field(None, description="The checks before the first step.")
    sync: Sync | None = Field(None, description="The last weight sync.")
    checkpoint: Saved | None = Field(None, description="The newest whole checkpoint.")
    degraded: str | None = Field(None, max_length=1024, description="What is amiss while the run goes on, such as an "
        "engine that is started again; absent when nothing is.")
    save_error: str | None = Field(None, max_length=1024, description="Why the last save failed; absent when it did "
        "not. The run goes on, and fails when its last save does.")
