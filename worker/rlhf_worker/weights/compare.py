"""What the engines hold against what the trainer has. Pure, and free of torch: the driver compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MODULUS = 1 << 64
Sums = Mapping[str, int]  # of each parameter, by vLLM's names


@dataclass(frozen=True, slots=True)
class EngineSums:
    """Of one engine rank. indirect: parameters that the model computes with only after packing or load_weights, which
    sums do not see.
    """

    sums: Sums
    indirect: int


@dataclass(frozen=True, slots=True)
class Compared:
    wrong: dict[tuple[int, int], list[str]]  # (engine, tensor-parallel rank) -> parameters that differ
    equal: int
    indirect: int


def compare(trainer: Sequence[Sequence[Sums]], engines: Sequence[Sequence[EngineSums]]) -> Compared:
    """trainer: [trainer rank][tensor-parallel rank], each the share of the rows that it holds; engines:
    [engine][tensor-parallel rank].
    """
    expected = [_added(shares) for shares in zip(*trainer, strict=True)]
    wrong, equal, indirect = dict[tuple[int, int], list[str]](), 0, 0
    for index, ranks in enumerate(engines):
        for rank, (want, have) in enumerate(zip(expected, ranks, strict=True)):
            bad = [name for name, value in have.sums.items() if value % MODULUS != want[name]]
            wrong |= {(index, rank): bad} if bad else {}
            equal, indirect = equal + len(have.sums) - len(bad), indirect + have.indirect
    return Compared(wrong, equal, indirect)


def _added(shares: Sequence[Sums]) -> dict[str, int]:
    return {name: sum(share[name] for share in shares) % MODULUS for name in shares[0]}
