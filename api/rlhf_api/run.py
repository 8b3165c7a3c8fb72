"""RunConfig: the run, fully resolved. The operator writes it into a ConfigMap, the driver reads it; no default is left
open.

The operator may be newer than the image that reads. So a value that is its field's default is not written: an image
that does not know the field runs as it always did. A default never changes, then, for the image that reads would take
its own; but for one that decides speed alone (trainer.compile), where that is well. """

from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from rlhf_api.algorithms import Algorithm, fill
from rlhf_api.base import Model
from rlhf_api.job import (
    STALL_TIMEOUT_SECONDS,
    TOKENS_PER_MICRO_BATCH,
    CheckpointSpec,
    CriticSpec,
    DataSpec,
    EvaluationSpec,
    ModelSpec,
    PlacementMode,
    PolicySpec,
    ReferenceSpec,
    RewardSpec,
    RLHFJob,
    RLHFJobSpec,
    RolloutSpec,
    Seconds,
    TelemetrySpec,
    TrainerSpec,
    WeightSyncSpec,
)
from rlhf_api.placement import Placement, plan_placement

# What this code can read. A config is of a higher one only where a field that older code knows means something else.
VERSION = 2  # 2: engines and trainer take turns on a GPU; older code would ask Ray for both shares at once
TRAINED = ("policy", "critic")  # roles with an optimizer; the others are frozen


class JobRef(Model):
    name: str
    namespace: str
    uid: str


class RunConfig(Model):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, protected_namespaces=(),
    )

    version: int = Field(1, ge=1)
    job: JobRef
    model: PolicySpec
    algorithm: Algorithm
    data: DataSpec
    rewards: list[RewardSpec]
    critic: CriticSpec | None = None  # None: the run has none
    reference: ReferenceSpec | None = None
    rollout: RolloutSpec
    trainer: TrainerSpec
    placement: Placement
    weight_sync: WeightSyncSpec
    checkpoint: CheckpointSpec
    evaluation: list[EvaluationSpec]
    telemetry: TelemetrySpec
    # Never written: older images would refuse it. The driver reads it from its job.
    stall_timeout_seconds: Seconds = Field(STALL_TIMEOUT_SECONDS, exclude=True)

    @property
    def roles(self) -> dict[str, ModelSpec]:
        """The models of the trainer's processes, by role: "policy", "critic", "reference", "reward:<name>"."""
        others = {"critic": self.critic, "reference": self.reference} | {
            f"reward:{reward.name}": reward for reward in self.rewards
        }
        return {"policy": self.model} | {name: role.model for name, role in others.items() if role and role.model}

    @property
    def reference_in_policy(self) -> bool:
        """Whether the reference needs no weights of its own: it is the policy without its adapters, on the same ranks.
        """
        return bool(
            self.model.lora and self.reference and self.reference.gpus is None
            and self.reference.model == self.model.base
        )

    def shards(self, ranks: int) -> int:
        """Into how many parts a role of so many ranks is divided; every `ranks / shards`-th rank holds the same one."""
        node = self.placement.groups[0].gpus_per_pod
        return min(ranks, node) if self.trainer.sharding == "Hybrid" else ranks

    @property
    def engines_sleep(self) -> bool:
        """Whether engines lend their memory to the trainer, whose GPUs they share, while it works. False while it is
        open (`on`).
        """
        return self.rollout.sleep is True

    def on(self, device: str) -> "RunConfig":
        """With what follows from the device where the spec leaves it open: rollout.sleep, and on CPUs
        trainer.tokensPerMicroBatch, which on GPUs follows from their memory. device: "cuda" or "cpu".
        """
        rollout, trainer = self.rollout, self.trainer
        if rollout.sleep is None:
            shared = self.placement.mode is PlacementMode.COLOCATED and rollout.engine == "vllm"
            rollout = rollout.model_copy(update={"sleep": shared and device == "cuda"})
        if trainer.tokens_per_micro_batch is None and device == "cpu":
            trainer = trainer.model_copy(update={"tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH})
        return self.model_copy(update={"rollout": rollout, "trainer": trainer})

    @property
    def sampling_seed(self) -> int:
        return self.trainer.seed if self.rollout.seed is None else self.rollout.seed

    def dump(self) -> str:
        return yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True), sort_keys=True,
        )

    @model_validator(mode="wrap")
    @classmethod
    def _of_this_version(cls, data: Any, handler: ModelWrapValidatorHandler["RunConfig"]) -> "RunConfig":
        try:
            config = handler(data)
        except ValidationError as error:
            unknown = [
                ".".join(map(str, one["loc"])) for one in error.errors(include_input=False)
                if one["type"] == "extra_forbidden"
            ]
            if unknown:
                raise ValueError(_newer(data.get("version", 1), unknown)) from None
            raise
        if config.version > VERSION:
            raise ValueError(_newer(config.version, []))
        return config

    @classmethod
    def read(cls, path: Path) -> "RunConfig":
        """Raises OSError, yaml.YAMLError or pydantic.ValidationError."""
        return cls.model_validate(yaml.safe_load(path.read_text()))


def _newer(version: object, unknown: list[str]) -> str:
    sets = f"it sets {', '.join(unknown)}; " if unknown else ""
    return (f"the run config is of a newer operator ({sets}version {version}, the image knows {VERSION}): use a "
        "newer spec.image")


def resolve(job: RLHFJob) -> RunConfig:
    """The one way from a job to its run. The job must have passed `rules.violations`."""
    spec, placement = job.spec, plan_placement(job.spec)
    return RunConfig(
        version=VERSION if placement.takes_turns else 1,
        job=JobRef(name=job.metadata.name, namespace=job.metadata.namespace, uid=job.metadata.uid),
        model=spec.model, algorithm=fill(spec.algorithm, spec.rollout.max_tokens), data=spec.data, rewards=spec.rewards,
        critic=_critic(spec), reference=_reference(spec), rollout=spec.rollout,
        trainer=spec.trainer, placement=placement, weight_sync=spec.weight_sync,
        checkpoint=_checkpoint(spec),
        evaluation=spec.evaluation, telemetry=spec.telemetry,
        stall_timeout_seconds=spec.run_policy.stall_timeout_seconds,
    )


def _checkpoint(spec: RLHFJobSpec) -> CheckpointSpec:
    """What is behind the path is the operator's business."""
    return spec.checkpoint.model_copy(update={"claim": None, "ephemeral": False})


def _critic(spec: RLHFJobSpec) -> CriticSpec | None:
    if spec.algorithm.name != "ppo":
        return None
    critic = spec.critic or CriticSpec()
    return critic.model_copy(update={"model": critic.model or spec.model.base})


def _reference(spec: RLHFJobSpec) -> ReferenceSpec | None:
    if not spec.algorithm.kl.coefficient:
        return None
    reference = spec.reference or ReferenceSpec()
    return reference.model_copy(update={"model": reference.model or spec.model.base})
