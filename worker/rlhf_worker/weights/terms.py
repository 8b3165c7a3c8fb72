"""What the two ends of a sync agree on when they connect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf, prod

import torch
from vllm.distributed.weight_transfer.base import ParamMeta

from rlhf_worker.weights.control import Meeting
from rlhf_worker.weights.mapped import Handle
from rlhf_worker.weights.plan import Group, Leg, Piece, Places, RankPlan, Shards, joined, pieces, waves, whole
from rlhf_worker.weights.views import dtype_name
from rlhf_worker.weights.wire import SMALL_BYTES, STAGE_BYTES, Address, Link, join


@dataclass(frozen=True, slots=True)
class Order:
    """What an engine rank is told at each sync. It receives at once, and answers when the weights are in place."""

    handles: bytes | None  # pickled, when the trainer's memory has moved
    proof: bool  # also sum up what is gone once it is packed


@dataclass(frozen=True, slots=True)
class Terms:
    """Engines read the memory of trainer ranks on their own node, and get the rest over links. Where no memory is
    shared, trainer and engines count as two nodes.

    handles: of each trainer rank's memory. transient: that memory goes after each sync, and orders bring handles of
    where it is then. """

    link: str  # "nccl" | "gloo"
    metas: tuple[ParamMeta, ...]  # of the trainer's tensors, in its own types
    places: Places  # of those tensors
    shards: tuple[Shards, ...]
    group: Group
    trainers: tuple[str, ...]  # the node of each rank
    engines: tuple[str, ...]  # and of each engine
    transient: bool
    control: Meeting
    deadline_seconds: float
    legs: tuple[Leg, ...] = ()  # to engines that are not alone
    meetings: tuple[tuple[str, int], ...] = ()  # of each leg's members
    handles: tuple[dict[str, Handle], ...] = ()

    def near(self, engine: int) -> list[int]:
        """Trainer ranks whose memory an engine reads."""
        return [rank for rank, node in enumerate(self.trainers) if node == self.engines[engine]]

    def readers(self, node: str) -> list[int]:
        """The engines that read what trainer ranks of the node hold. Each of their ranks is a reader, in this order."""
        return [engine for engine, place in enumerate(self.engines) if place == node]

    def alone(self, engine: int) -> bool:
        """Whether nothing has to come from other nodes."""
        near = {part for rank in self.near(engine) for part in self.shards[rank].items()}
        return all(part in near for own in self.shards for part in own.items() if part[1][0] < part[1][1])

    def read(self, plan: RankPlan, engine: int) -> list[Piece]:
        """What one of its ranks reads in memory, view by view, strided or not."""
        near = self.near(engine)
        return [piece for piece in self.cut(self.joined(plan), near) if piece.rank in near] if near else []

    def sent(self, plan: RankPlan) -> RankPlan:
        """Joined for the links."""
        return self.joined(plan, SMALL_BYTES[self.link])

    def far(self, sent: RankPlan, engine: int) -> list[Piece]:
        """What comes to one of its ranks over links."""
        near = self.near(engine)
        return [piece for piece in self.cut(sent, near, SMALL_BYTES[self.link]) if piece.rank not in near]

    def joined(self, plan: RankPlan, small: float = inf) -> RankPlan:
        return joined(plan, self.places, self._dtypes, small)

    def cut(self, plan: RankPlan, near: Sequence[int] = (), small: float = inf) -> list[Piece]:
        """A joined plan by who gives what."""
        return pieces(plan, self.shards, self._dtypes, small, near)

    @property
    def _dtypes(self) -> dict[str, str]:
        """By parameter of the trainer."""
        return {self.places[meta.name][0]: dtype_name(meta.dtype) for meta in self.metas}

    def whole(self, meta: ParamMeta, dtype: torch.dtype, engine: int) -> list[Piece]:
        """A checkpoint tensor as it is, in the engine's type."""
        plan = whole(meta.name, prod(meta.shape), dtype_name(dtype))
        return self.cut(self.joined(plan, 0), self.near(engine), 0)

    def open(self, number: int, me: int, needs: Mapping[int, Sequence[Piece]], device: torch.device) -> Link:
        """A member's end of a leg. me: its number in the leg's group; needs: by tensor-parallel rank, of every engine
        of the leg. Raises DeadlineExceeded when not every member comes.
        """
        group = self.legs[number].group(self.group.ranks)
        by_rank = [waves(own, rank, group, _stage_limit(group)) for rank, own in needs.items()]
        hops = [[hop for own in wave for hop in own] for wave in zip_longest(*by_rank, fillvalue=())]
        address = Address(self.meetings[number], me, group.size, self.deadline_seconds)
        return Link(self.legs[number], me, join(address, device), hops, device)


def _stage_limit(group: Group) -> int:
    """Bytes a pair may have in one wave, so that no rank stages more than STAGE_BYTES."""
    pairs = max(group.engines * group.ranks, group.trainers + 2 * (group.engines - 1))
    return max(1 << 16, STAGE_BYTES // pairs)
