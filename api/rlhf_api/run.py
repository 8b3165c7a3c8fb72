"""RunConfig: the run, fully resolved. The operator writes it into a ConfigMap, the driver reads it; no default is left open."""

from pathlib import Path

import yaml
from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from rlhf_api.base import Model
from rlhf_api.job import AlgorithmSpec, CheckpointSpec, DataSpec, ModelSpec, RewardSpec, RLHFJob, RolloutSpec, TrainerSpec, WeightSyncSpec
from rlhf_api.placement import Placement, plan_placement


class JobRef(Model):
    name: str
    namespace: str
    uid: str


class RunConfig(Model):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, protected_namespaces=())

    job: JobRef
    model: ModelSpec
    algorithm: AlgorithmSpec
    data: DataSpec
    rewards: list[RewardSpec]
    rollout: RolloutSpec
    trainer: TrainerSpec
    placement: Placement
    weight_sync: WeightSyncSpec
    checkpoint: CheckpointSpec

    @property
    def sampling_seed(self) -> int:
        return self.trainer.seed if self.rollout.seed is None else self.rollout.seed

    def dump(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=True)

    @classmethod
    def read(cls, path: Path) -> "RunConfig":
        """Raises OSError, yaml.YAMLError or pydantic.ValidationError."""
        return cls.model_validate(yaml.safe_load(path.read_text()))


def resolve(job: RLHFJob) -> RunConfig:
    """The one way from a job to its run. The job must have passed `rules.violations`."""
    spec = job.spec
    return RunConfig(
        job=JobRef(name=job.metadata.name, namespace=job.metadata.namespace, uid=job.metadata.uid),
        model=spec.model, algorithm=spec.algorithm, data=spec.data, rewards=spec.rewards, rollout=spec.rollout,
        trainer=spec.trainer, placement=plan_placement(spec), weight_sync=spec.weight_sync, checkpoint=spec.checkpoint,
    )
