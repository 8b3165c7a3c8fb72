"""A trainer rank's end of a sync: vLLM's trainer engine `planned`. Each rank gives the rows that it holds, and gathers
nothing.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource

from rlhf_worker.errors import LinkBroken
from rlhf_worker.weights import checksum, mapped, wire
from rlhf_worker.weights.client import EnginesClient
from rlhf_worker.weights.control import Hub, Meeting, Member, portable
from rlhf_worker.weights.plan import Group, Hop, Incomplete, Piece, RankPlan, to_all, unused, waves
from rlhf_worker.weights.source import PolicySource
from rlhf_worker.weights.terms import Order, Terms
from rlhf_worker.weights.views import placed

T = TypeVar("T")


@dataclass
class PlannedTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "planned"

    link: str  # "ipc" | "shm" | "nccl" | "gloo"
    address: tuple[str, int]  # of a free port on rank 0's host
    world: int = 1  # trainer ranks, which are the default process group where there are several
    deadline_seconds: float = field(default=300.0, kw_only=True)
    # parameters whose record did not stand the test
    distrusted: frozenset[str] = field(default=frozenset(), kw_only=True)


class PlannedTrainerWeightTransferEngine(TrainerWeightTransferEngine[PlannedTrainerInitInfo]):
    """Called on every trainer rank. Rank 0 talks to the engines."""

    init_info_cls = PlannedTrainerInitInfo
    client: EnginesClient
    source: PolicySource
    hub: Hub | None = None  # of rank 0
    member: Member | None = None  # of the others
    channel: wire.Channel | None = None
    plans: list[RankPlan]  # of each tensor-parallel rank; engines of one run are alike

    @classmethod
    def trainer_init(
        cls, init_info: PlannedTrainerInitInfo, *, client: EnginesClient, source: WeightSource | None = None,
    ) -> Self:
        """Raises DeadlineExceeded when an engine does not join, and what an engine raised."""
        assert isinstance(source, PolicySource)
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.info = init_info
        engine.connect()
        return engine

    def connect(self) -> None:
        """Plans from the engines, and the link to them. Raises Incomplete when a tensor would be left behind."""
        self.shards = self.source.held()
        self.device = next(iter(self.shards.values())).local.device
        metas = self.source.own_metas()
        self.plans = self._agree(lambda: self.client.plans(pickle.dumps(metas), self.info.distrusted))
        if left := unused(self.plans, [meta.name for meta in metas]):
            raise Incomplete(f"weight sync: vLLM's load_weights takes no notice of {len(left)} of the trainer's "
                f"tensors, such as {left[0]}")
        self.group = Group(self.info.world, len(self.client.engines), len(self.plans))
        extents = self._all({name: shard.extent for name, shard in self.shards.items()})
        mapping = self.info.link in ("ipc", "shm")
        handles = self._all(self._export()) if mapping else None
        control = self._agree(self._open_hub)
        self.terms = Terms(
            self.info.link, metas, self.source.places(), tuple(extents), self.group,
            tuple(handles) if handles else None, self.source.transient, self.info.address, control,
            self.info.deadline_seconds,
        )
        self.needs = [[p for p in self.terms.pieces(plan) if p.rank == self.info.rank] for plan in self.plans]
        joining = self.client.begin_connect(pickle.dumps(self.terms)) if self.is_sender else []
        if not mapping:
            self._join()
        self._meet(joining)

    def _meet(self, joining: list[Any]) -> None:
        """Every other rank opens its connection to rank 0."""
        if self.hub is None:
            self.member = Member(self.terms.control, self.info.rank, self.info.deadline_seconds)
            return
        self.hub.accept(self.group.size - 1, self.info.deadline_seconds, lambda: self.client.failed(joining))
        self.client.end_connect(joining)

    def _open_hub(self) -> Meeting:
        self.hub = Hub(self.info.address[0])
        return self.hub.meeting

    def _agree(self, ask: Callable[[], T]) -> T:
        """What rank 0 learnt, on every rank; or raises what it raised, so that the others do not wait for it."""
        found: list[Any] = [None]
        try:
            found = [ask() if self.is_sender else None]
        except Exception as error:
            found = [pickle.loads(portable(error))]
            raise
        finally:
            if self.info.world > 1:
                dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        if isinstance(found[0], Exception):
            raise found[0]
        return cast("T", found[0])

    def _all(self, own: T) -> list[T]:
        if self.info.world == 1:
            return [own]
        found: list[T] = [own] * self.info.world
        dist.all_gather_object(found, own)
        return found

    def _export(self) -> dict[str, mapped.Handle]:
        handles = mapped.export({name: shard.local for name, shard in self.shards.items()}, self.group.readers)
        self.places = self._places()  # afterwards: on CPU the memory has moved just now
        return handles

    def _moved(self) -> bool:
        """Whether parameters lie elsewhere than at the last sync: offloaded and back, or replaced. Raises RuntimeError
        when they are other parts.
        """
        if self._places() == self.places:
            return False
        shards = self.source.held()
        if changed := [name for name, shard in shards.items() if shard.extent != self.shards[name].extent]:
            raise RuntimeError(f"weight sync: this rank holds other rows of {changed[0]} than when it was connected "
                f"({len(changed)} such tensors)")
        self.shards = shards
        self.places = self._places()
        return True

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.source.local_tensors()]

    def _join(self) -> None:
        address = wire.Address(self.info.address, self.info.rank, self.group.size, self.info.deadline_seconds)
        self.channel = wire.join(address, self.device)
        by_rank = [waves(own, rank, self.group, self.terms.stage_limit) for rank, own in enumerate(self.needs)]
        self.hops = [[hop for hops in wave for hop in hops] for wave in zip_longest(*by_rank, fillvalue=())]
        self.stage = wire.make_stage(self.hops, self.info.rank, self.device)
        self.waves, self.places = self._waves(), self._places()

    def _waves(self) -> list[wire.Wave]:
        dtypes = {target: getattr(torch, name) for plan in self.plans for target, name in plan.dtypes.items()}
        return [self._wave(hops, dtypes, self.stage[number % 2]) for number, hops in enumerate(self.hops)]

    def _wave(self, hops: Sequence[Hop], dtypes: Mapping[str, torch.dtype], stage: Tensor) -> wire.Wave:
        return wire.make_wave(hops, self.info.rank, self._take, lambda piece: dtypes[piece.move.target], stage)

    def _take(self, piece: Piece) -> Tensor:
        return placed(self.shards[piece.move.source].local, piece.move.take)

    def send_weights(self, *, proof: bool = False) -> None:
        """The weights, as they are now, into every engine. On all ranks, after the last optimizer step has ended on all
        of them.

        proof: let the engines note checksums of what they pack away. Raises DeadlineExceeded, LinkBroken, or what an
        engine raised. """
        try:
            if self.channel is None:
                self._let_read(proof)
            else:
                self._send(self.channel, proof)
            if self.hub is not None:
                self.hub.finish(self.info.deadline_seconds)
        except BaseException:
            self.shutdown()  # so that nobody goes on waiting for the others
            raise

    def _send(self, channel: wire.Channel, proof: bool) -> None:
        self._order(None, proof)
        if self._moved():
            self.waves = self._waves()
        try:
            wire.run(channel, self.waves, self._given_up)
            self._send_whole(channel)
        except LinkBroken:
            if self.hub is not None and self.hub.failed():
                self.hub.finish(0.0)  # what an engine said is nearer to the cause
            raise

    def _given_up(self) -> bool:
        return self.hub.failed() if self.hub is not None else self.member is not None and self.member.hung_up()

    def _order(self, handles: bytes | None, proof: bool) -> None:
        """The engines receive from now on."""
        if self.hub is not None:
            self.hub.order(Order(handles, proof), range(self.group.trainers, self.group.size))

    def _let_read(self, proof: bool) -> None:
        moved, handles = self._moved() or self.source.transient, None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.info.world > 1:
            # Also the moment from which every rank's weights are what they should be.
            flag = torch.tensor([moved])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            moved = bool(flag.item())
        if moved:
            handles = pickle.dumps(tuple(self._all(self._export())))
        self._order(handles, proof)

    def _send_whole(self, channel: wire.Channel) -> None:
        """The tensors that engines load by load_weights, one at a time, to every rank that does."""
        for meta in self.terms.metas:
            takers = [rank for rank, plan in enumerate(self.plans) if meta.name in plan.reload]
            if not takers:
                continue
            receivers = [self.group.number(engine, rank) for rank in takers for engine in range(self.group.engines)]
            dtype = self.source.dtype
            hops = to_all([part for part in self.terms.whole(meta, dtype) if part.rank == self.info.rank], receivers)
            wire.run(
                channel,
                [self._wave(hops, {meta.name: dtype}, wire.make_stage([hops], self.info.rank, self.device)[0])],
            )

    def checksums(self) -> list[dict[str, int]]:
        """This rank's share of what every parameter of each tensor-parallel rank must sum up to, modulo 2^64."""
        return [self._sums(plan, own) for plan, own in zip(self.plans, self.needs, strict=True)]

    def _sums(self, plan: RankPlan, own: Sequence[Piece]) -> dict[str, int]:
        totals = {target: torch.zeros((), dtype=torch.int64, device=self.device) for target in plan.dtypes}
        for piece in own:
            checksum.add(
                totals[piece.move.target], self.shards[piece.move.source].local, piece.move,
                getattr(torch, plan.dtypes[piece.move.target]),
            )
        return {target: int(total) for target, total in totals.items()}

    def shutdown(self) -> None:
        for end in (self.hub, self.member, self.channel):
            if end is not None:
                end.close()
        self.channel = None
