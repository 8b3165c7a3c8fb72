"""What the two ends of a sync agree on when they connect."""

from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import ParamMeta

from rlhf_worker.weights.mapped import Handle
from rlhf_worker.weights.plan import Group, Shards
from rlhf_worker.weights.wire import SMALL_BYTES, STAGE_BYTES


@dataclass(frozen=True, slots=True)
class Terms:
    """handles: of each trainer rank's memory; without them the sync goes over links, whose ranks meet at `address`."""

    link: str  # "ipc" | "shm" | "nccl" | "gloo"
    metas: tuple[ParamMeta, ...]  # of the trainer's tensors, in its own types
    shards: tuple[Shards, ...]
    group: Group
    handles: tuple[dict[str, Handle], ...] | None
    address: tuple[str, int]
    deadline_seconds: float

    @property
    def dtypes(self) -> dict[str, str]:
        return {meta.name: str(meta.dtype).removeprefix("torch.") for meta in self.metas}

    @property
    def small(self) -> int:
        return SMALL_BYTES if self.link == "nccl" else 0

    @property
    def stage_limit(self) -> int:
        """Bytes a pair may have in one wave, so that no rank stages more than STAGE_BYTES."""
        pairs = max(self.group.engines * self.group.ranks, self.group.trainers + 2 * (self.group.engines - 1))
        return max(1 << 16, STAGE_BYTES // pairs)
