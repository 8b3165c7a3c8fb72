"""The plan's arithmetic against what torch itself does with the same views."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_worker.weights.plan import Group, Incomplete, Move, Piece, RankPlan, View, fills_once, pieces, unused, waves


def viewed(tensor: torch.Tensor, view: View) -> torch.Tensor:
    return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)


@st.composite
def moves(draw: st.DrawFn) -> tuple[Move, tuple[int, ...], int]:
    """A slice of a matrix or cube, perhaps transposed, into a fused parameter that is larger; (move, source shape, numel of target)."""
    shape = tuple(draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 3))))
    source = torch.arange(torch.Size(shape).numel()).view(shape)
    view = source
    for dim in range(view.ndim):
        start = draw(st.integers(0, view.shape[dim] - 1))
        view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
    if draw(st.booleans()) and view.ndim > 1:
        view = view.transpose(0, 1)
    before = draw(st.integers(0, 3))
    width = view.shape[-1] + draw(st.integers(0, 2))
    target = torch.zeros((before + view.shape[0], *view.shape[1:-1], width) if view.ndim > 1 else (before + width,))
    put = target[before:, ..., : view.shape[-1]] if view.ndim > 1 else target[before : before + view.shape[0]]
    take = View(int(view.storage_offset()), tuple(view.shape), view.stride())
    return Move("s", take, "t", View(int(put.storage_offset()), tuple(put.shape), put.stride())), shape, target.numel()


F32 = {"s": "float32", "model.norm.weight": "float32"}


def plan(move: Move) -> RankPlan:
    return RankPlan((move,), {move.target: "float32"}, {}, ())


@settings(max_examples=300, deadline=None)
@given(moves(), st.integers(1, 4), st.integers(1, 9))
def test_pieces_of_any_sharding_make_the_same_parameter(case: tuple[Move, tuple[int, ...], int], ranks: int, limit: int) -> None:
    move, shape, numel = case
    source = torch.randn(shape)
    whole = torch.zeros(numel)
    viewed(whole, move.put).copy_(viewed(source, move.take))
    rows = [chunk.numel() for chunk in source.chunk(ranks)] + [0] * ranks
    starts = [sum(rows[:r]) for r in range(ranks)]
    shards = [{"s": (start, start + n)} for start, n in zip(starts, rows, strict=False)]
    made, written = torch.zeros(numel), torch.zeros(numel)
    for piece in pieces(plan(move), shards, F32):
        local = source.view(-1)[starts[piece.rank] : starts[piece.rank] + rows[piece.rank]]
        for part in piece.move.chunks(limit):
            assert part.put.numel <= limit
            viewed(made, part.put).copy_(viewed(local, part.take))
            viewed(written, part.put).add_(1)
    assert torch.equal(made, whole)
    assert written.max() <= 1 and written.sum() == move.put.numel


def test_a_fused_parameter_is_filled_once() -> None:
    q, k = View(0, (4, 8), (8, 1)), View(32, (2, 8), (8, 1))
    assert fills_once([q, k], 48)
    assert fills_once([View(0, (6, 5), (8, 1)), View(5, (6, 3), (8, 1))], 48)
    assert fills_once([View(0, (8, 6), (1, 8))], 48)


@pytest.mark.parametrize("views", [
    [View(0, (40,), (1,))],  # a hole at the end
    [View(0, (40,), (1,)), View(32, (8,), (1,))],  # as many elements, one stretch twice
    [View(0, (48,), (1,)), View(0, (1,), (1,))],  # one too many
])
def test_holes_and_overlaps_are_no_proof(views: list[View]) -> None:
    assert not fills_once(views, 48)


def test_rows_that_nobody_holds_are_named() -> None:
    move = Move("model.norm.weight", View(0, (8,), (1,)), "norm", View(0, (8,), (1,)))
    with pytest.raises(Incomplete, match=r"6 of the 8 elements of model\.norm\.weight"):
        pieces(plan(move), [{"model.norm.weight": (0, 4)}, {"model.norm.weight": (4, 6)}], F32)


def test_what_several_ranks_hold_comes_from_the_first() -> None:
    move = Move("s", View(0, (8,), (1,)), "t", View(0, (8,), (1,)))
    assert [(p.rank, p.move.put) for p in pieces(plan(move), [{"s": (0, 8)}, {"s": (0, 8)}], F32)] == [(0, move.put)]


@settings(max_examples=60, deadline=None)
@given(st.builds(Group, st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)), st.integers(1, 64))
def test_every_engine_gets_every_piece_once_and_sends_only_what_it_has(group: Group, limit: int) -> None:
    needs = [
        Piece(t, Move(f"s{i}", View(0, (6, 2), (2, 1)), f"t{i}", View(t * 12, (6, 2), (2, 1))), 2, i == 1) for i in range(3) for t in range(group.trainers)
    ]
    has: dict[int, list[tuple[str, View]]] = {}
    for wave in waves(needs, group.ranks - 1, group, limit):
        arrived = []
        for hop in wave:
            what = (hop.piece.move.target, hop.piece.move.put)
            assert hop.sender < group.trainers or what in has[hop.sender]
            arrived.append((hop.receiver, what))
        for receiver, what in arrived:
            assert what not in has.get(receiver, [])
            has.setdefault(receiver, []).append(what)
    for engine in range(group.engines):
        assert sum(view.numel for _, view in has[group.number(engine, group.ranks - 1)]) == group.trainers * 36


def test_a_slice_leaves_the_trainer_once_whatever_the_number_of_engines() -> None:
    needs = [Piece(0, Move("s", View(0, (64,), (1,)), "t", View(0, (64,), (1,))), 2, True)]
    for engines in (1, 2, 5):
        hops = [hop for wave in waves(needs, 0, Group(1, engines, 1), 16) for hop in wave]
        assert sum(hop.piece.move.put.numel for hop in hops if hop.sender == 0) == 64
        assert len(hops) == 8 * engines


def test_a_tensor_that_reaches_nothing_is_named() -> None:
    assert unused([plan(Move("a", View(0, (1,), (1,)), "t", View(0, (1,), (1,)))), RankPlan((), {}, {"b": "quantised"}, ())], ["a", "b", "c"]) == ["c"]
