"""The planner: which pods there are, and which role has which GPU. Pure. The operator makes pods from it, the worker
actors.

A *slot* is one GPU, counted from 0. Slots are dense by pod: the slots of one pod follow each other, so an engine whose
slots are consecutive lies on one node. """

from typing import Literal

from pydantic import Field

from rlhf_api.base import Model
from rlhf_api.job import PlacementMode, RLHFJobSpec

GroupName = Literal["trainer", "rollout"]


class PodGroup(Model):
    """`pods` equal pods with `gpus_per_pod` GPUs each; its slots start at `first_slot`."""

    name: GroupName
    pods: int
    gpus_per_pod: int
    first_slot: int

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + self.pods * self.gpus_per_pod)

    @property
    def ray_resource(self) -> str:
        """The Ray resource, one a GPU, that ties a slot to a pod of this group."""
        return f"rlhf-{self.name}"


class Placement(Model):
    mode: PlacementMode
    resource_name: str
    groups: list[PodGroup]
    trainer_slots: list[int] = Field(description="Slot of each FSDP rank.")
    trainer_fraction: float = Field(description="Of a GPU's memory, that a rank may fill while it trains.")
    role_slots: dict[str, list[int]] = Field(description="Slots of the ranks of each role that has GPUs of its own: "
        "they follow the trainer's, in its pods.")
    engine_slots: list[list[int]] = Field(description="Slots of each engine's tensor-parallel ranks; none for "
        "rollout.engine hf.")
    engine_fraction: float = Field(description="Of a GPU's memory, that an engine's rank has while it generates.")

    @property
    def takes_turns(self) -> bool:
        """Whether trainer and engines are promised more of a GPU together than there is."""
        shared = self.mode is PlacementMode.COLOCATED and bool(self.engine_slots)
        return shared and self.trainer_fraction + self.engine_fraction > 1

    @property
    def gpus(self) -> int:
        return sum(group.pods * group.gpus_per_pod for group in self.groups)


def _group(name: GroupName, gpus: int, most: int, first_slot: int) -> PodGroup:
    """`gpus` GPUs in as few equal pods of at most `most` GPUs as there can be; the rules made sure that it divides."""
    pods = -(-gpus // max(most, 1))
    return PodGroup(name=name, pods=pods, gpus_per_pod=gpus // pods, first_slot=first_slot)


def own_gpus(spec: RLHFJobSpec) -> dict[str, int]:
    """GPUs of each role that does not share the trainer's: "critic", "reference", "reward:<name>"."""
    roles = {"critic": spec.critic, "reference": spec.reference} | {
        f"reward:{reward.name}": reward for reward in spec.rewards
    }
    return {name: role.gpus for name, role in roles.items() if role and role.gpus}


def plan_placement(spec: RLHFJobSpec) -> Placement:
    """Roles to slots. Of a spec that breaks the rules the answer is not to be used, but there is one."""
    rollout, trainer, placement = spec.rollout, spec.trainer, spec.placement
    size, colocated = rollout.tensor_parallel_size, placement.mode is PlacementMode.COLOCATED
    own, end = {}, trainer.gpus
    for role, gpus in own_gpus(spec).items():
        own[role] = list(range(end, end + gpus))
        end += gpus
    groups = [_group("trainer", end, placement.gpus_per_node, 0)]
    if not colocated:
        most = placement.gpus_per_node // size * size
        groups.append(_group("rollout", rollout.engines * size, most, end))
    first, engines = 0 if colocated else end, 0 if rollout.engine == "hf" else rollout.engines
    return Placement(
        mode=placement.mode,
        resource_name=placement.resource_name,
        groups=groups,
        trainer_slots=list(range(trainer.gpus)),
        trainer_fraction=placement.fractions.trainer if colocated and engines else 1.0,
        role_slots=own,
        engine_slots=[list(range(first + e * size, first + (e + 1) * size)) for e in range(engines)],
        engine_fraction=placement.fractions.rollout if colocated else 1.0,
    )
