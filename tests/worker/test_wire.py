"""Waves carried out on every rank of a group at once, in one process: what a link would carry is copied from list to
list.
"""

import inspect
import shutil
from collections import deque
from itertools import product, zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.distributed.weight_transfer.base import ParamMeta

from rlhf_worker.errors import BadSpec, LinkBroken
from rlhf_worker.weights import mapped
from rlhf_worker.weights.control import Meeting
from rlhf_worker.weights.mapped import Unreachable, export, open_all
from rlhf_worker.weights.plan import Group, Hop, Move, Piece, RankPlan, View, legs, pieces, waves
from rlhf_worker.weights.sender import PlannedTrainerInitInfo, PlannedTrainerWeightTransferEngine
from rlhf_worker.weights.terms import Terms
from rlhf_worker.weights.views import copy_all, placed
from rlhf_worker.weights.wire import Wave, make_stage, make_wave
from tests.worker.ranks import over_ranks

COLUMNS = 8
DTYPES = {"big": torch.bfloat16, "norm": torch.float32}


def plan(rank: int, ranks: int, rows: int) -> RankPlan:
    """A matrix cut by columns (strided at the trainer, and of another type there), and a vector that every rank holds.
    """
    width = COLUMNS // ranks
    big = Move("big", View(rank * width, (rows, width), (COLUMNS, 1)), "big", View(0, (rows, width), (width, 1)))
    return RankPlan(
        (big.simplified(), Move("norm", View(0, (rows,), (1,)), "norm", View(0, (rows,), (1,)))),
        {"big": "bfloat16", "norm": "float32"}, {}, (),
    )


def carry(posted: dict[int, Wave]) -> None:
    """One wave: every rank packs, then the links carry, then every rank unpacks."""
    links: dict[tuple[int, int], deque[Tensor]] = {}
    for rank, wave in posted.items():
        for into, out in zip(*wave.before, strict=True):
            into.copy_(out)
        for tensor, peer in wave.sends:
            links.setdefault((rank, peer), deque()).append(tensor.clone())
    for rank, wave in posted.items():
        for tensor, peer in wave.receives:
            tensor.copy_(links[peer, rank].popleft())
        for into, out in zip(*wave.after, strict=True):
            into.copy_(out)
    assert not any(links.values())


@settings(max_examples=60, deadline=None)
@given(
    st.builds(Group, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2])), st.integers(1, 7),
    st.sampled_from([16, 64, 1 << 20]), st.sampled_from([0, 1 << 20]),
)
def test_every_engine_rank_ends_with_its_slice(group: Group, rows: int, limit: int, small: int) -> None:
    whole = {"big": torch.randn(rows, COLUMNS), "norm": torch.randn(rows)}
    parts = {name: list(tensor.tensor_split(group.trainers)) for name, tensor in whole.items()}
    shards = [{name: extent(own, rank) for name, own in parts.items()} for rank in range(group.trainers)]
    needs = [
        pieces(plan(rank, group.ranks, rows), shards, {"big": "float32", "norm": "float32"}, small)
        for rank in range(group.ranks)
    ]
    held = {group.number(e, r): {
        "big": torch.zeros(rows, COLUMNS // group.ranks, dtype=torch.bfloat16), "norm": torch.zeros(rows),
    }
            for e in range(group.engines) for r in range(group.ranks)}

    def resolve(rank: int, piece: Piece) -> Tensor:
        if rank < group.trainers:
            return placed(parts[piece.move.source][rank].contiguous(), piece.move.take)
        return placed(held[rank][piece.move.target], piece.move.put)

    order = [waves(own, rank, group, limit) for rank, own in enumerate(needs)]
    for number in range(max(map(len, order))):
        hops = [hop for own in order if number < len(own) for hop in own[number]]
        carry({rank: wave_of(hops, rank, resolve) for rank in range(group.size)})
    for rank, tensors in held.items():
        column = (rank - group.trainers) % group.ranks
        assert torch.equal(tensors["big"], whole["big"].to(torch.bfloat16).chunk(group.ranks, dim=1)[column])
        assert torch.equal(tensors["norm"], whole["norm"])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(0, 3),
    st.sampled_from([16, 1 << 20]),
)
def test_engines_read_on_their_own_node_and_get_the_rest_over_links(
    hosts: int, here: int, ranks: int, copies: int, moved: int, limit: int
) -> None:
    """Every host has `here` trainer ranks and engines, but for engines that lie `moved` hosts on, or on one without a
    trainer.
    """
    trainers = [str(host) for host in range(hosts) for _ in range(here)]
    engines = [str(host + moved) for host in range(hosts) for _ in range(here)]
    rows, parts = 5, len(trainers) // copies or 1
    whole = {"big": torch.randn(rows, COLUMNS), "norm": torch.randn(rows)}
    cut = {name: [part.contiguous() for part in tensor.tensor_split(parts)] for name, tensor in whole.items()}
    shards = tuple({name: extent(own, rank % parts) for name, own in cut.items()} for rank in range(len(trainers)))
    metas = tuple(ParamMeta(name, torch.float32, tuple(tensor.shape)) for name, tensor in whole.items())
    group = Group(len(trainers), len(engines), ranks)
    terms = Terms(
        "gloo", metas, {name: (name, 0) for name in whole}, shards, group, tuple(trainers), tuple(engines),
        False, Meeting("", 0, b""), 1.0,
    )
    held = {group.number(e, r): {
        "big": torch.full((rows, COLUMNS // ranks), torch.nan, dtype=torch.bfloat16), "norm": torch.zeros(rows),
    } for e in range(len(engines)) for r in range(ranks)}  # fmt: skip

    def take(piece: Piece, rank: int) -> Tensor:
        return placed(cut[piece.move.source][rank % parts], piece.move.take)

    for engine, rank in product(range(len(engines)), range(ranks)):
        for piece in terms.read(plan(rank, ranks, rows), engine):
            assert trainers[piece.rank] == engines[engine]
            placed(held[group.number(engine, rank)][piece.move.target], piece.move.put).copy_(take(piece, piece.rank))
    for leg in (leg for leg in legs(trainers, engines) if not terms.alone(leg.engines[0])):
        assert {trainers[rank] for rank in leg.senders}.isdisjoint(engines[engine] for engine in leg.engines)
        own = leg.group(ranks)
        members = [*leg.senders, *(group.number(engine, rank) for engine in leg.engines for rank in range(ranks))]

        def resolve(me: int, piece: Piece, members: list[int] = members, senders: int = own.trainers) -> Tensor:
            if me < senders:
                return take(piece, members[me])
            return placed(held[members[me]][piece.move.target], piece.move.put)

        order = [
            waves(leg.own(terms.far(terms.sent(plan(rank, ranks, rows)), leg.engines[0])), rank, own, limit)
            for rank in range(ranks)
        ]
        for hops in zip_longest(*order, fillvalue=()):
            flat = [hop for one in hops for hop in one]
            carry({me: wave_of(flat, me, resolve) for me in range(own.size)})
    for number, tensors in held.items():
        column = (number - group.trainers) % ranks
        assert torch.equal(tensors["big"], whole["big"].to(torch.bfloat16).chunk(ranks, dim=1)[column])
        assert torch.equal(tensors["norm"], whole["norm"])


def wave_of(hops: list[Hop], rank: int, resolve: object) -> Wave:
    stage = make_stage([hops], rank, torch.device("cpu"))[0]
    return make_wave(
        hops, rank, lambda piece: resolve(rank, piece), lambda piece: DTYPES[piece.move.target], stage,  # type: ignore[operator]
    )


def extent(parts: list[Tensor], rank: int) -> tuple[int, int]:
    start = sum(part.numel() for part in parts[:rank])
    return start, start + parts[rank].numel()


def test_small_pieces_of_a_pair_are_one_send() -> None:
    many = [Piece(0, Move(f"s{i}", View(0, (4,), (1,)), f"t{i}", View(0, (4,), (1,))), 4, True) for i in range(5)]
    hops = waves(many, 0, Group(1, 1, 1), 1 << 20)[0]
    wave = make_wave(
        hops, 0, lambda _: torch.ones(4), lambda _: torch.float32, make_stage([hops], 0, torch.device("cpu"))[0],
    )
    assert len(wave.sends) == 1 and len(wave.before[0]) == 5


def test_strided_and_contiguous_pairs_are_copied_alike() -> None:
    out = [torch.arange(12.0).view(3, 4)[:, :2], torch.arange(4.0), torch.arange(6.0).view(2, 3).T]
    into = [torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(4), torch.zeros(3, 2)]
    copy_all(into, out)
    copy_all([], [])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(into, out, strict=True))


def test_mapped_memory_is_the_trainers_own() -> None:
    weight, empty = torch.arange(12.0).view(3, 4), torch.empty(0)
    view = weight[1:]
    opened = open_all(export({"w": view, "none": empty}, 2), torch.device("cpu"), 1)
    view.mul_(2)
    assert torch.equal(opened["w"], weight[1:].reshape(-1)) and opened["none"].numel() == 0


def test_each_reader_opens_a_handle_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rebuild_cuda_tensor is given: the reader's arguments, its own device, and no event to wait for."""
    asked: list[tuple[Any, ...]] = []

    def rebuilt(*arguments: Any) -> Tensor:
        asked.append(arguments)
        return torch.ones(2, 3)

    monkeypatch.setattr(mapped, "rebuild_cuda_tensor", rebuilt)
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    handles = tuple(tuple(f"{name} {reader}" for name in names) for reader in range(2))
    opened = open_all({"w": mapped.Handle("float32", 6, handles, None)}, torch.device("cuda", 3), 1)
    assert opened["w"].shape == (6,)
    (arguments,) = asked
    own = {name: f"{name} 1" for name in names} | {"storage_device": 3, "event_sync_required": False}
    assert dict(zip(names, arguments, strict=True)) == own


def refuse(rank: int, world: int) -> str:
    engine = object.__new__(PlannedTrainerWeightTransferEngine)
    engine.is_sender = rank == 0
    engine.info = PlannedTrainerInitInfo("shm", "", world, rank=rank)

    def ask() -> str:
        raise LinkBroken("an engine is gone")

    with pytest.raises(LinkBroken, match="an engine is gone"):
        engine._agree(ask)
    return engine._agree(lambda: "again")


def test_what_rank_0_is_refused_leaves_no_other_rank_waiting() -> None:
    assert over_ranks(2, refuse) == ["again", "again"]


def test_too_little_shared_memory_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(BadSpec, match=r"spec\.weightSync\.backend: the parameters need 1 MiB in /dev/shm, which has 0 "
        r"MiB free: set it to gloo"):
        export({"w": torch.ones(1 << 18)}, 1)


def test_memory_of_a_process_that_is_gone_is_unreachable() -> None:
    handle = export({"w": torch.ones(4)}, 1)["w"]
    gone = type(handle)(handle.dtype, handle.numel, (), "/proc/1/fd/999999")
    with pytest.raises(Unreachable, match="memory cannot be opened in the engine's process"):
        open_all({"w": gone}, torch.device("cpu"), 0)
