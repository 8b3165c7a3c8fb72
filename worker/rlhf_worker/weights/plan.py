"""Where every element of a sync comes from and where it goes. Pure integers: neither torch nor I/O.

    recorder: Move   a slice of a checkpoint tensor -> a slice of an engine's parameter, one set an engine rank
    joined:   Move   a slice of a trainer's parameter, in which many such tensors may lie -> the same, as few as that
                     allows
    pieces:   Piece  a move cut to the rows that one trainer rank holds
    legs:     Leg    trainer ranks and the engines to which they send what those cannot read in memory
    waves:    Hop    a piece from one rank of a leg to another, in the order in which its link carries them

Ranks of the group: the trainer's first, then every engine's tensor-parallel ranks, engine by engine.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import inf, prod

Extent = tuple[int, int]  # flat elements [start, stop) of a whole tensor
Shards = Mapping[str, Extent]  # what one trainer rank holds, by parameter of the trainer
# by checkpoint tensor: the trainer's parameter in which it lies, and its first element there
Places = Mapping[str, tuple[str, int]]
MOST_RUNS = 1 << 20
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


class Incomplete(Exception):
    """The trainer does not hold what an engine needs."""


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of flat memory, in elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.size)

    @property
    def last(self) -> int:
        """The highest element that it touches."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        return self.last - self.offset + 1 == self.numel and list(self.stride) == sorted(self.stride, reverse=True)

    def narrow(self, dim: int, start: int, stop: int) -> "View":
        size = (*self.size[:dim], stop - start, *self.size[dim + 1 :])
        return View(self.offset + start * self.stride[dim], size, self.stride)

    def runs(self) -> Iterator[Extent]:
        """Its contiguous stretches, in no order."""
        dims = sorted((d for d in zip(self.stride, self.size, strict=True) if d[1] > 1), reverse=True)
        length = 1
        while dims and dims[-1][0] == length:
            length *= dims.pop()[1]
        for index in product(*(range(n) for _, n in dims)):
            start = self.offset + sum(i * s for i, (s, _) in zip(index, dims, strict=True))
            yield start, start + length


@dataclass(frozen=True, slots=True)
class Move:
    """`take` of the contiguous tensor `source` fills `put` of the contiguous parameter `target`; both views are of one
    size.
    """

    source: str  # a tensor of the checkpoint; in a joined plan a parameter of the trainer
    take: View
    target: str
    put: View

    def narrow(self, dim: int, start: int, stop: int) -> "Move":
        return Move(self.source, self.take.narrow(dim, start, stop), self.target, self.put.narrow(dim, start, stop))

    @property
    def contiguous(self) -> bool:
        return self.take.contiguous and self.put.contiguous

    @property
    def dims(self) -> list[tuple[int, int, int]]:
        """Size and both steps of each."""
        return [*zip(self.take.size, self.take.stride, self.put.stride, strict=True)]

    def followed_by(self, other: "Move") -> "Move | None":
        """Both as one, if `other` lies behind this one on both sides and continues or repeats it. Both are simplified
        and of the same two tensors.
        """
        (n, take, put), *row = self.dims
        ahead = other.take.offset - self.take.offset, other.put.offset - self.put.offset
        if other.take.offset <= self.take.last or other.put.offset <= self.put.last:
            return None
        rows = 1 if other.dims == row else other.dims[0][0] if other.dims[0][1:] == (
            take, put,
        ) and other.dims[1:] == row else 0
        if rows and ahead == (n * take, n * put):
            return self._of([(n + rows, take, put), *row])
        return self._of([(2, *ahead), *self.dims]) if other.dims == self.dims else None

    def simplified(self) -> "Move":
        """The same elements in as few dimensions as both views allow."""
        return self._of(self.dims)

    def _of(self, own: Sequence[tuple[int, int, int]]) -> "Move":
        dims: list[tuple[int, int, int]] = []
        for n, take, put in own:
            if n == 1:
                continue
            if dims and dims[-1][1] == n * take and dims[-1][2] == n * put:
                dims[-1] = (dims[-1][0] * n, take, put)
            else:
                dims.append((n, take, put))
        size, takes, puts = (tuple(column) for column in zip(*dims, strict=True)) if dims else ((1,), (1,), (1,))
        return Move(self.source, View(self.take.offset, size, takes), self.target, View(self.put.offset, size, puts))

    def cut(self, start: int, stop: int) -> Iterator["Move"]:
        """The parts that take from elements [start, stop) of the source."""
        take = self.take
        if start <= take.offset and take.last < stop:
            yield self
        elif take.last >= start and take.offset < stop and take.numel > 1:
            # Along the widest step, at most two indices straddle a border; those are cut along the next.
            dim = max((d for d, n in enumerate(take.size) if n > 1), key=lambda d: take.stride[d])
            step, inner = take.stride[dim], take.last - take.offset - (take.size[dim] - 1) * take.stride[dim]
            first = max(0, -((take.offset - start) // step))
            end = min(take.size[dim], (stop - 1 - inner - take.offset) // step + 1)
            if first < end:
                yield self.narrow(dim, first, end)
            for index in {first - 1, end} if first <= end else range(max(0, end), min(first, take.size[dim])):
                if 0 <= index < take.size[dim]:
                    yield from self.narrow(dim, index, index + 1).cut(start, stop)

    def chunks(self, limit: int) -> Iterator["Move"]:
        """Parts of at most `limit` elements each."""
        if self.put.numel <= limit:
            yield self
            return
        dim = next(d for d, n in enumerate(self.put.size) if n > 1)
        inner = self.put.numel // self.put.size[dim]
        step = max(1, limit // inner)
        for start in range(0, self.put.size[dim], step):
            yield from self.narrow(dim, start, min(start + step, self.put.size[dim])).chunks(limit)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one engine rank needs. A tensor named in `reload` comes whole and goes through the model's own load_weights.
    """

    moves: tuple[Move, ...]
    dtypes: Mapping[str, str]  # of the parameters that the moves fill, such as "bfloat16"
    reload: Mapping[str, str]  # checkpoint tensor -> why it cannot be written in place
    kept: tuple[str, ...]  # parameters that no checkpoint tensor fills: they stay as they were loaded


@dataclass(frozen=True, slots=True)
class Piece:
    """A move from trainer rank `rank`, whose `take` counts from the first element that this rank holds."""

    rank: int
    move: Move
    itemsize: int  # bytes an element on the wire, which is as wide as the engine's parameter
    # travels in one send with others of its wave: it is strided, of another type than the trainer's, or small
    packed: bool

    @property
    def nbytes(self) -> int:
        return self.move.put.numel * self.itemsize


def fills_once(views: Sequence[View], numel: int) -> bool:
    """Whether the views touch every one of `numel` elements exactly once."""
    if sum(view.numel for view in views) != numel:
        return False
    if sum(view.numel // max(1, _run_length(view)) for view in views) > MOST_RUNS:
        return False
    runs = sorted(run for view in views for run in view.runs())
    return all(stop == start for (_, stop), (start, _) in pairwise([(0, 0), *runs, (numel, numel)]))


def _run_length(view: View) -> int:
    start, stop = next(view.runs(), (0, 0))
    return stop - start


def joined(plan: RankPlan, places: Places, dtypes: Mapping[str, str], small: float) -> RankPlan:
    """The plan, of simplified moves, with the trainer's parameters for its sources. Moves that neighbour each other on
    both sides become one: a layer's experts are a tensor each in the checkpoint, one parameter at the trainer and in
    the engine. dtypes, small: as for `pieces`. """
    groups: dict[tuple[str, str], list[Move]] = {}
    for move in plan.moves:
        source, start = places[move.source]
        take = View(start + move.take.offset, move.take.size, move.take.stride)
        groups.setdefault((source, move.target), []).append(Move(source, take, move.target, move.put))
    made: list[Move] = []
    for (source, target), moves in groups.items():
        made += _join(moves, small / ITEMSIZE[plan.dtypes[target]] if dtypes[source] == plan.dtypes[target] else inf)
    return replace(plan, moves=tuple(made))


def _join(moves: list[Move], small: float) -> list[Move]:
    """small: elements."""
    made: list[Move] = []
    for move in sorted(moves, key=lambda move: move.put.offset):
        one = made[-1].followed_by(move) if made else None
        # What is strided must be packed. That costs nothing where the parts are packed anyway: strided themselves, of
        # another type, or small. A large contiguous part goes from memory to memory, and becomes part of another only
        # where that does too.
        if one is None or not (
            one.contiguous or all(not part.contiguous or part.put.numel < small for part in (made[-1], move))
        ):
            made.append(move)
        else:
            made[-1] = one
    return made if len(made) == len(moves) else _join(made, small)


def pieces(
    plan: RankPlan, shards: Sequence[Shards], dtypes: Mapping[str, str], small: float = 0, near: Collection[int] = (),
) -> list[Piece]:
    """The moves of a joined plan, cut by who holds what. dtypes: the trainer's, by parameter; small: bytes below which
    a piece is packed.

    Where several trainer ranks hold the same, one that is `near` gives it, and among equals the one that has given
    least. Raises Incomplete.
    """
    found: list[Piece] = []
    given = Counter[int]()
    for move in plan.moves:
        reached, have, dtype = 0, 0, plan.dtypes[move.target]
        for (start, stop), holders in _holders(move.source, shards):
            rank = min(holders, key=lambda holder: (holder not in near, given[holder], holder))
            for part in move.cut(max(start, reached), stop):
                own = Move(
                    move.source, View(part.take.offset - start, part.take.size, part.take.stride), move.target,
                    part.put,
                ).simplified()
                packed = dtypes[move.source] != dtype or not own.contiguous or own.put.numel * ITEMSIZE[dtype] < small
                found.append(Piece(rank, own, ITEMSIZE[dtype], packed))
                have, given[rank] = have + part.put.numel, given[rank] + part.put.numel
            reached = max(reached, stop)
        if have != move.put.numel:
            raise Incomplete(f"the trainer holds {have} of the {move.put.numel} elements of {move.source} that "
                f"{move.target} needs")
    return found


def unused(plans: Sequence[RankPlan], names: Sequence[str]) -> list[str]:
    """Checkpoint tensors that reach no parameter of any rank."""
    used = {move.source for plan in plans for move in plan.moves} | {name for plan in plans for name in plan.reload}
    return [name for name in names if name not in used]


def _holders(source: str, shards: Sequence[Shards]) -> list[tuple[Extent, list[int]]]:
    """The parts of the tensor, in order, with the ranks that hold each."""
    found: dict[Extent, list[int]] = {}
    for rank, own in enumerate(shards):
        if source in own and own[source][0] < own[source][1]:
            found.setdefault(own[source], []).append(rank)
    return sorted(found.items())


@dataclass(frozen=True, slots=True)
class Hop:
    """One send and its receive. An engine rank sends on from the same view of the same parameter that it received."""

    sender: int
    receiver: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Group:
    """Who takes part in a sync: trainer ranks 0 .. trainers - 1, then `ranks` tensor-parallel ranks of each engine."""

    trainers: int
    engines: int
    ranks: int

    def number(self, engine: int, rank: int) -> int:
        return self.trainers + engine * self.ranks + rank

    @property
    def size(self) -> int:
        return self.number(self.engines, 0)


@dataclass(frozen=True, slots=True)
class Leg:
    """Trainer ranks, and the engines to which they send, over a link of their own. Its members count anew: the senders
    first.
    """

    senders: tuple[int, ...]
    engines: tuple[int, ...]

    def group(self, ranks: int) -> Group:
        return Group(len(self.senders), len(self.engines), ranks)

    def own(self, needs: Sequence[Piece]) -> list[Piece]:
        """Those that come over this leg, by their senders' numbers on it."""
        return [replace(p, rank=self.senders.index(p.rank)) for p in needs if p.rank in self.senders]


def legs(trainers: Sequence[str], engines: Sequence[str]) -> list[Leg]:
    """By the node of each trainer rank and of each engine: what links there may be between nodes, in the order in which
    their members run them.

    In round r each node sends to the r-th after it, and receives from the r-th before: every node's way out and way in
    are used at once, and nobody waits for someone who waits for a later round.
    """
    nodes = sorted({*trainers, *engines})

    def at(places: Sequence[str], node: str) -> tuple[int, ...]:
        return tuple(number for number, place in enumerate(places) if place == node)

    pairs = [(at(trainers, node), at(engines, nodes[(i + r) % len(nodes)])) for r in range(1, len(nodes))
             for i, node in enumerate(nodes)]  # fmt: skip
    return [Leg(senders, receivers) for senders, receivers in pairs if senders and receivers]


def waves(needs: Sequence[Piece], rank: int, group: Group, limit: int) -> list[list[Hop]]:
    """The order in which the links carry what tensor-parallel rank `rank` of every engine needs.

    All members of the group run a wave's hops at once, and the waves one after the other. limit: bytes that a pair may
    pack, or pass on, in one wave; what goes straight from memory to memory knows no limit. One engine: trainer ranks
    send to it. Several: each piece leaves the trainer once, for one engine in turn, which passes it on to the others
    while the trainer sends the next wave (as a broadcast does, without a communicator for each pair: a trainer's link
    carries every slice once, however many engines there are). """
    made: list[list[Hop]] = []
    filled: dict[tuple[int, int], tuple[int, int]] = {}  # pair -> its wave and the bytes in it
    turn: dict[int, int] = {}
    for part in (part for piece in needs for part in _parts(piece, group.engines, limit)):
        first = group.number(turn.get(part.rank, 0) % group.engines, rank)
        turn[part.rank] = turn.get(part.rank, 0) + 1
        wave = _room(filled, (part.rank, first), part.nbytes if part.packed or group.engines > 1 else 0, limit)
        _put(made, wave, Hop(part.rank, first, part))
        for receiver in (group.number(engine, rank) for engine in range(group.engines)):
            if receiver != first:
                _put(made, wave + 1, Hop(first, receiver, part))
    return made


def _parts(piece: Piece, engines: int, limit: int) -> Iterator[Piece]:
    if not piece.packed and engines == 1:
        yield piece
        return
    for move in piece.move.chunks(max(1, limit // piece.itemsize)):
        yield Piece(piece.rank, move, piece.itemsize, piece.packed)


def _room(filled: dict[tuple[int, int], tuple[int, int]], pair: tuple[int, int], nbytes: int, limit: int) -> int:
    """The first wave in which the pair can carry this many bytes more."""
    wave, used = filled.get(pair, (0, 0))
    if used and used + nbytes > limit:
        wave, used = wave + 1, 0
    filled[pair] = (wave, used + nbytes)
    return wave


def _put(made: list[list[Hop]], wave: int, hop: Hop) -> None:
    made.extend([] for _ in range(len(made), wave + 1))
    made[wave].append(hop)


def whole(source: str, numel: int, dtype: str) -> RankPlan:
    """A checkpoint tensor as it is: what an engine's own load_weights takes."""
    view = View(0, (numel,), (1,))
    return RankPlan((Move(source, view, source, view),), {source: dtype}, {}, ())


def to_all(parts: Sequence[Piece], receivers: Sequence[int]) -> list[Hop]:
    return [Hop(part.rank, receiver, part) for part in parts for receiver in receivers]
