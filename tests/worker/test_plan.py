"""The plan's arithmetic against what torch itself does with the same views."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_worker.weights.plan import (
    Group,
    Incomplete,
    Move,
    Piece,
    Places,
    RankPlan,
    View,
    fills_once,
    joined,
    legs,
    pieces,
    unused,
    waves,
)


def viewed(tensor: torch.Tensor, view: View) -> torch.Tensor:
    return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)


@st.composite
def moves(draw: st.DrawFn) -> tuple[Move, tuple[int, ...], int]:
    """A slice of a matrix or cube, perhaps transposed, into a fused parameter that is larger; (move, source shape,
    numel of target).
    """
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
def test_pieces_of_any_sharding_make_the_same_parameter(
    case: tuple[Move, tuple[int, ...], int], ranks: int, limit: int,
) -> None:
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


BF16 = {"t": "bfloat16"}


def experts(count: int, heights: list[int], width: int, *, by_part: bool = False) -> tuple[Places, dict[str, int]]:
    """Where the parts (gate, up) of each expert lie in one parameter: expert by expert, or part by part; and the height
    of each.
    """
    order = [
        (e, p) for p, e in product(range(len(heights)), range(count))
    ] if by_part else [*product(range(count), range(len(heights)))]
    places, start = {}, 0
    for e, p in order:
        places[f"{e}.{p}"] = ("w", start)
        start += heights[p] * width
    return places, {f"{e}.{p}": heights[p] for e, p in order}


def slices(
    heights: dict[str, int], width: int, rows: tuple[int, int], columns: tuple[int, int], gaps: list[int],
) -> RankPlan:
    """The same rows (counted in halves of a tensor) and columns of each tensor, one behind the other in one parameter
    of an engine, gaps[i % n] between them.
    """
    found, end = [], 0
    for i, (name, height) in enumerate(heights.items()):
        start, stop = (height * half // 2 for half in rows)
        size = (stop - start, columns[1] - columns[0])
        found.append(Move(name, View(start * width + columns[0], size, (width, 1)), "t", View(end, size, (size[1], 1))))
        end += size[0] * size[1] + gaps[i % len(gaps)]
    return RankPlan(tuple(move.simplified() for move in found if move.put.numel), BF16, {}, ())


def located(plan: RankPlan, places: Places) -> RankPlan:
    """What `joined` makes of a plan in which it finds no neighbours."""
    return replace(plan, moves=tuple(
        Move(
            places[m.source][0], replace(m.take, offset=places[m.source][1] + m.take.offset), m.target, m.put,
        ) for m in plan.moves
    ))


def moved(found: list[Piece], starts: list[int], numel: int) -> torch.Tensor:
    """By element of the target: the element of the source that came there, or -1; every one at most once."""
    source, target = torch.arange(numel), torch.full((2 * numel,), -1)
    for piece in found:
        assert (viewed(target, piece.move.put) == -1).all()
        viewed(target, piece.move.put).copy_(viewed(source[starts[piece.rank] :], piece.move.take))
    return target


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_joined_moves_move_the_same_elements_in_no_more_pieces(data: st.DataObject) -> None:
    draw = data.draw
    count, width, heights = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(
        st.lists(st.integers(1, 4), min_size=1, max_size=3)
    )
    places, sizes = experts(count, heights, width, by_part=draw(st.booleans()))
    sizes = {name: sizes[name] for name in (draw(st.permutations([*sizes])) if draw(st.booleans()) else sizes)}
    columns = draw(st.sampled_from([(0, width), (0, (width + 1) // 2), (width // 2, width)]))
    plan = slices(
        sizes, width, draw(st.sampled_from([(0, 2), (0, 1), (1, 2)])), columns,
        draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)),
    )
    plan = replace(plan, moves=tuple(move for move in plan.moves if draw(st.integers(0, 5))))
    numel, small, dtypes = count * sum(heights) * width, draw(st.integers(0, 40)), {
        "w": draw(st.sampled_from(["bfloat16", "float32"]))
    }
    borders = [0, *sorted(draw(st.lists(st.integers(0, numel), max_size=3))), numel]
    shards = [{"w": extent} for extent in pairwise(borders)]
    fewer = joined(plan, places, dtypes, small)
    before, after = (pieces(each, shards, dtypes, small) for each in (located(plan, places), fewer))
    assert torch.equal(moved(after, borders, numel + 12 * count), moved(before, borders, numel + 12 * count))
    assert len(after) <= len(before) and len(fewer.moves) <= len(plan.moves)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.booleans(), st.sampled_from([(0, 2), (0, 1)]),
    st.lists(st.integers(0, 2), min_size=1, max_size=2), st.integers(0, 40),
)
def test_a_large_stretch_stays_one(
    count: int, width: int, by_part: bool, rows: tuple[int, int], gaps: list[int], small: int,
) -> None:
    """It goes from memory to memory, and would be packed as a part of what is strided."""
    places, sizes = experts(count, [2, 4], width, by_part=by_part)
    plan, dtypes = slices(sizes, width, rows, (0, width), gaps), {"w": "bfloat16"}
    direct = [sum(
        p.move.put.numel for p in pieces(each, [{"w": (0, 6 * count * width)}], dtypes, small) if not p.packed
    )
              for each in (located(plan, places), joined(plan, places, dtypes, small))]
    assert direct[1] >= direct[0]


@pytest.mark.parametrize(("rows", "columns", "made"), [
    ((0, 2), (0, 6), ((64 * 4 * 6,), (1,), (1,))),  # all of it, as it is
    ((0, 1), (0, 6), ((128, 6), (12, 1), (6, 1))),  # half of the rows of gate, then of up
    ((0, 2), (3, 6), ((64 * 4, 3), (6, 1), (3, 1))),  # half of the columns
])
def test_a_layers_experts_are_one_move_and_a_piece_a_trainer_rank(
    rows: tuple[int, int], columns: tuple[int, int], made: tuple[tuple[int, ...], ...],
) -> None:
    places, sizes = experts(64, [2, 2], 6)
    plan = joined(slices(sizes, 6, rows, columns, [0]), places, {"w": "bfloat16"}, 1 << 20)
    assert [(m.put.size, m.take.stride, m.put.stride) for m in plan.moves] == [made]
    shards = [{"w": (start * 24, stop * 24)} for start, stop in [(0, 25), (25, 50), (50, 64), (64, 64)]]
    assert [p.rank for p in pieces(plan, shards, {"w": "bfloat16"}, 1 << 20)] == [0, 1, 2]


def test_parts_that_would_have_to_be_packed_stay_apart_unless_they_are_of_another_type() -> None:
    places, sizes = experts(8, [2, 2], 6)
    plan = slices(sizes, 6, (0, 1), (0, 6), [0])
    assert [len(joined(plan, places, {"w": dtype}, 0).moves) for dtype in ("bfloat16", "float32")] == [16, 1]


def test_tensors_of_other_parameters_stay_apart() -> None:
    plan = slices({"q": 2, "k": 2}, 6, (0, 2), (0, 6), [0])
    assert [
        m.source
        for m in joined(plan, {"q": ("a", 0), "k": ("b", 0)}, {"a": "bfloat16", "b": "bfloat16"}, 1 << 20).moves
    ] == ["a", "b"]


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


def test_a_border_may_lie_within_rows_of_which_no_whole_one_is_held() -> None:
    move = Move("s", View(4, (2, 4), (8, 1)), "t", View(0, (2, 4), (4, 1)))
    assert [
        (p.rank, p.move.put.offset, p.move.put.numel)
        for p in pieces(plan(move), [{"s": (0, 13)}, {"s": (13, 16)}], F32)
    ] == [(0, 0, 4), (0, 4, 1), (1, 5, 3)]


@settings(max_examples=60, deadline=None)
@given(st.builds(Group, st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)), st.integers(1, 64))
def test_every_engine_gets_every_piece_once_and_sends_only_what_it_has(group: Group, limit: int) -> None:
    needs = [
        Piece(
            t, Move(f"s{i}", View(0, (6, 2), (2, 1)), f"t{i}", View(t * 12, (6, 2), (2, 1))), 2, i == 1,
        ) for i in range(3) for t in range(group.trainers)
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.lists(st.sampled_from("abcd"), min_size=1))
def test_legs_join_pairs_of_nodes_once_and_nobody_waits_in_a_circle(trainers: list[str], engines: list[str]) -> None:
    """Every member runs its own, in their order; one is run when all of its members have come to it."""
    found = legs(trainers, engines)
    pairs = [(sender, engine) for leg in found for sender in leg.senders for engine in leg.engines]
    assert sorted(pairs) == [(i, j) for i, a in enumerate(trainers) for j, b in enumerate(engines) if a != b]
    left = {("t", i): [leg for leg in found if i in leg.senders] for i in range(len(trainers))}
    left |= {("e", j): [leg for leg in found if j in leg.engines] for j in range(len(engines))}
    while any(left.values()):
        members = {leg: [*(("t", i) for i in leg.senders), *(("e", j) for j in leg.engines)] for leg in found}
        ready = [leg for leg in found if all(left[one][:1] == [leg] for one in members[leg])]
        assert ready
        for leg in ready:
            for one in members[leg]:
                left[one].pop(0)


def test_among_nodes_every_way_out_and_in_is_used_at_once() -> None:
    places = [node for node in "abc" for _ in range(2)]
    rounds = [[(places[leg.senders[0]], places[leg.engines[0]]) for leg in legs(places, places)[i : i + 3]]
              for i in (0, 3)]  # fmt: skip
    assert rounds == [[("a", "b"), ("b", "c"), ("c", "a")], [("a", "c"), ("b", "a"), ("c", "b")]]


def test_a_near_holder_gives_and_equal_ones_share() -> None:
    many = RankPlan(tuple(Move(f"s{i}", View(0, (8,), (1,)), f"t{i}", View(0, (8,), (1,))) for i in range(4)),
                    {f"t{i}": "float32" for i in range(4)}, {}, ())  # fmt: skip
    dtypes, shards = {f"s{i}": "float32" for i in range(4)}, [{f"s{i}": (0, 8) for i in range(4)}] * 3
    assert [p.rank for p in pieces(many, shards, dtypes, 0, [2])] == [2] * 4
    assert [p.rank for p in pieces(many, shards, dtypes)] == [0, 1, 2, 0]


def test_a_tensor_that_reaches_nothing_is_named() -> None:
    assert unused(
        [plan(Move("a", View(0, (1,), (1,)), "t", View(0, (1,), (1,)))), RankPlan((), {}, {"b": "quantised"}, ())],
        ["a", "b", "c"],
    ) == ["c"]
