"""What the two ends of a sync agree on when they connect."""

from dataclasses import dataclass
from math import inf, prod

import torch
from vllm.distributed.weight_transfer.base import ParamMeta

from rlhf_worker.weights.control import Meeting
from rlhf_worker.weights.mapped import Handle
from rlhf_worker.weights.plan import Group, Piece, Places, RankPlan, Shards, joined, pieces, whole
from rlhf_worker.weights.views import dtype_name
from rlhf_worker.weights.wire import SMALL_BYTES, STAGE_BYTES


@dataclass(frozen=True, slots=True)
class Order:
    """What an engine rank is told at each sync. It receives at once, and answers when the weights are in place."""

    handles: bytes | None  # pickled, when the trainer's memory has moved
    proof: bool  # also sum up what is gone once it is packed


@dataclass(frozen=True, slots=True)
class Terms:
    """handles: of each trainer rank's memory; without them the sync goes over links, whose ranks meet at `address`.
    transient: that memory goes after each sync, and orders bring handles of where it is then. """

    link: str  # "ipc" | "shm" | "nccl" | "gloo"
    metas: tuple[ParamMeta, ...]  # of the trainer's tensors, in its own types
    places: Places  # of those tensors
    shards: tuple[Shards, ...]
    group: Group
    handles: tuple[dict[str, Handle], ...] | None
    transient: bool
    address: tuple[str, int]
    control: Meeting
    deadline_seconds: float

    def pieces(self, plan: RankPlan) -> list[Piece]:
        """What one engine rank needs, cut by who holds it."""
        dtypes = {self.places[meta.name][0]: dtype_name(meta.dtype) for meta in self.metas}
        small = SMALL_BYTES.get(self.link, inf)  # mapped memory is copied view by view, strided or not
        return pieces(joined(plan, self.places, dtypes, small), self.shards, dtypes, small)

    def whole(self, meta: ParamMeta, dtype: torch.dtype) -> list[Piece]:
        """A checkpoint tensor as it is, in the engine's type."""
        dtypes = {self.places[meta.name][0]: dtype_name(meta.dtype)}
        return pieces(
            joined(whole(meta.name, prod(meta.shape), dtype_name(dtype)), self.places, dtypes, 0), self.shards, dtypes,
        )

    @property
    def stage_limit(self) -> int:
        """Bytes a pair may have in one wave, so that no rank stages more than STAGE_BYTES."""
        pairs = max(self.group.engines * self.group.ranks, self.group.trainers + 2 * (self.group.engines - 1))
        return max(1 << 16, STAGE_BYTES // pairs)
