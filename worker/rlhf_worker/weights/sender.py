"""A trainer rank's end of a sync: vLLM's trainer engine `planned`. Each rank gives the rows that it holds, and gathers
nothing.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar, cast

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, TrainerWeightTransferEngine, WeightSource

from rlhf_worker.addresses import free_port
from rlhf_worker.errors import LinkBroken
from rlhf_worker.weights import checksum, mapped, wire
from rlhf_worker.weights.client import EnginesClient
from rlhf_worker.weights.control import Hub, Meeting, Member, portable
from rlhf_worker.weights.plan import Group, Incomplete, Leg, Piece, RankPlan, legs, to_all, unused
from rlhf_worker.weights.source import PolicySource
from rlhf_worker.weights.terms import Order, Terms
from rlhf_worker.weights.views import placed

T = TypeVar("T")


@dataclass
class PlannedTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "planned"

    link: str  # "ipc" | "shm" | "nccl" | "gloo"
    host: str  # of rank 0
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
    links: list[wire.Link]  # of this rank's legs
    plans: list[RankPlan]  # of each tensor-parallel rank; engines of one run are alike

    @classmethod
    def trainer_init(
        cls, init_info: PlannedTrainerInitInfo, *, client: EnginesClient, source: WeightSource | None = None,
    ) -> Self:
        """Raises DeadlineExceeded when an engine does not join, and what an engine raised."""
        assert isinstance(source, PolicySource)
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.info, engine.links = init_info, []
        engine.connect()
        return engine

    def connect(self) -> None:
        """Plans from the engines, and the way to them. Raises Incomplete when a tensor would be left behind."""
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
        trainers = self._all(ray.get_runtime_context().get_node_id()) if mapping else ["trainer"] * self.info.world
        engines = self._agree(self.client.nodes) if mapping else ["engines"] * self.group.engines
        link = "nccl" if self.device.type == "cuda" else "gloo"
        self.terms = Terms(
            link, metas, self.source.places(), tuple(extents), self.group, tuple(trainers), tuple(engines),
            self.source.transient, self._agree(self._open_hub), self.info.deadline_seconds,
        )
        self._meet_at([leg for leg in legs(trainers, engines) if not self.terms.alone(leg.engines[0])])
        self.places = self._places()
        if mapping:
            self.terms = replace(self.terms, handles=tuple(self._all(self._export())))
        joining = self.client.begin_connect(pickle.dumps(self.terms)) if self.is_sender else []
        self._open_links()
        self.stage = wire.shared_stage(self.links, self.device)
        self._prepare()
        self._meet(joining)

    def _meet_at(self, found: Sequence[Leg]) -> None:
        """Legs become the terms', with a place where each one's first sender is met."""
        leads = [number for number, leg in enumerate(found) if leg.senders[0] == self.info.rank]
        told = self._all({number: self._address() for number in leads})
        meetings = {number: address for one in told for number, address in one.items()}
        self.terms = replace(
            self.terms, legs=tuple(found), meetings=tuple(meetings[number] for number in range(len(found))),
        )

    def _open_links(self) -> None:
        own = [(number, leg) for number, leg in enumerate(self.terms.legs) if self.info.rank in leg.senders]
        plans = [self.terms.sent(plan) for plan in self.plans] if own else []
        for number, leg in own:
            needs = {rank: leg.own(self.terms.far(plan, leg.engines[0])) for rank, plan in enumerate(plans)}
            self.links.append(self.terms.open(number, leg.senders.index(self.info.rank), needs, self.device))

    def _address(self) -> tuple[str, int]:
        host = ray.util.get_node_ip_address() if self.info.rank else self.info.host
        return host, free_port(host)

    def _meet(self, joining: list[Any]) -> None:
        """Every other rank opens its connection to rank 0."""
        if self.hub is None:
            self.member = Member(self.terms.control, self.info.rank, self.info.deadline_seconds)
            return
        self.hub.accept(self.group.size - 1, self.info.deadline_seconds, lambda: self.client.failed(joining))
        self.client.end_connect(joining)

    def _open_hub(self) -> Meeting:
        self.hub = Hub(self.info.host)
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
        """For the engines on this node, if there are any."""
        readers = len(self.terms.readers(self.terms.trainers[self.info.rank])) * self.group.ranks
        own = self.shards if readers else {}
        handles = mapped.export({name: shard.local for name, shard in own.items()}, readers)
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

    def _prepare(self) -> None:
        dtypes = {target: getattr(torch, name) for plan in self.plans for target, name in plan.dtypes.items()}
        for link in self.links:
            link.prepare(self._take, lambda piece: dtypes[piece.move.target], self.stage)

    def _take(self, piece: Piece) -> Tensor:
        return placed(self.shards[piece.move.source].local, piece.move.take)

    def send_weights(self, *, proof: bool = False) -> None:
        """The weights, as they are now, into every engine. On all ranks, after the last optimizer step has ended on all
        of them.

        proof: let the engines note checksums of what they pack away. Raises DeadlineExceeded, LinkBroken, or what an
        engine raised. """
        try:
            self._send(proof)
            if self.hub is not None:
                self.hub.finish(self.info.deadline_seconds)
        except BaseException:
            self.shutdown()  # so that nobody goes on waiting for the others
            raise

    def _send(self, proof: bool) -> None:
        moved = self._moved()
        handles = self._new_handles(moved or self.source.transient) if self.terms.handles else None
        if self.hub is not None:  # the engines receive from now on
            self.hub.order(Order(handles, proof), range(self.group.trainers, self.group.size))
        if moved:
            self._prepare()
        try:
            for link in self.links:
                link.run(self._given_up)
            for meta in self.terms.metas:
                self._send_whole(meta)
        except LinkBroken:
            if self.hub is not None and self.hub.failed():
                self.hub.finish(0.0)  # what an engine said is nearer to the cause
            raise

    def _given_up(self) -> bool:
        return self.hub.failed() if self.hub is not None else self.member is not None and self.member.hung_up()

    def _new_handles(self, moved: bool) -> bytes | None:
        """Pickled, where any rank's memory has moved. Collective: when it returns, every rank's weights are what they
        should be.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.info.world > 1:
            flag = torch.tensor([moved])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            moved = bool(flag.item())
        return pickle.dumps(tuple(self._all(self._export()))) if moved else None

    def _send_whole(self, meta: ParamMeta) -> None:
        """One at a time, to every rank that loads it."""
        takers = [rank for rank, plan in enumerate(self.plans) if meta.name in plan.reload]
        for link in self.links if takers else ():
            group = link.leg.group(self.group.ranks)
            receivers = [group.number(engine, rank) for rank in takers for engine in range(group.engines)]
            whole = self.terms.whole(meta, self.source.dtype, link.leg.engines[0])
            parts = [part for part in link.leg.own(whole) if part.rank == link.me]
            link.once(to_all(parts, receivers), self._take, self.source.dtype, self._given_up)

    def checksums(self) -> list[dict[str, int]]:
        """This rank's share of what every parameter of each tensor-parallel rank must sum up to, modulo 2^64."""
        return [self._sums(plan, own) for plan, own in zip(self.plans, self._shares, strict=True)]

    @cached_property
    def _shares(self) -> list[list[Piece]]:
        """Of each plan: every element is one rank's, whoever sends it."""
        cut = [self.terms.cut(self.terms.joined(plan)) for plan in self.plans]
        return [[piece for piece in own if piece.rank == self.info.rank] for own in cut]

    def _sums(self, plan: RankPlan, own: Sequence[Piece]) -> dict[str, int]:
        totals = {target: torch.zeros((), dtype=torch.int64, device=self.device) for target in plan.dtypes}
        for piece in own:
            checksum.add(
                totals[piece.move.target], self.shards[piece.move.source].local, piece.move,
                getattr(torch, plan.dtypes[piece.move.target]),
            )
        return {target: int(total) for target, total in totals.items()}

    def shutdown(self) -> None:
        for end in (self.hub, self.member, *(link.channel for link in self.links)):
            if end is not None:
                end.close()
        self.links = []
