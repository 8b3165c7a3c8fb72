"""Sums of a parameter's parts add up to the sum of the whole, and a change anywhere changes them."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_worker.weights.checksum import MASK, add, whole
from rlhf_worker.weights.plan import Move, View

SHAPE = (6, 8)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def rows(start: int, stop: int) -> Move:
    """From a rank that holds exactly these rows."""
    n = (stop - start) * SHAPE[1]
    return Move("s", View(0, (n,), (1,)), "t", View(start * SHAPE[1], (n,), (1,)))


@settings(deadline=None)
@given(DTYPES, st.lists(st.integers(0, SHAPE[0]), max_size=3))
def test_ranks_sum_up_their_own_rows(dtype: torch.dtype, cuts: list[int]) -> None:
    parameter = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    borders = sorted({0, *cuts, SHAPE[0]})
    shares = []
    for start, stop in pairwise(borders):
        total = torch.zeros((), dtype=torch.int64)
        add(total, parameter[start:stop], rows(start, stop), dtype)
        shares.append(int(total))
    assert sum(shares) & MASK == int(whole(parameter)) & MASK


def test_the_trainer_sums_what_the_engine_will_hold() -> None:
    """Columns of a float32 matrix as a bfloat16 slice."""
    source, total = torch.randn(SHAPE), torch.zeros((), dtype=torch.int64)
    add(total, source, Move("s", View(4, (6, 4), (8, 1)), "t", View(0, (6, 4), (4, 1))), torch.bfloat16)
    assert int(total) == int(whole(source[:, 4:].to(torch.bfloat16).contiguous()))


@settings(deadline=None)
@given(DTYPES, st.integers(0, 47), st.integers(0, 15))
def test_one_flipped_bit_anywhere_is_seen(dtype: torch.dtype, place: int, bit: int) -> None:
    parameter = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    changed = parameter.clone()
    words = changed.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    words[place] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert int(whole(changed)) != int(whole(parameter))


def test_two_exchanged_rows_are_seen_and_padding_adds_nothing() -> None:
    parameter = torch.randn(SHAPE)
    assert int(whole(parameter[[1, 0, 2, 3, 4, 5]])) != int(whole(parameter))
    assert int(whole(torch.cat([parameter, torch.zeros(2, SHAPE[1])]))) == int(whole(parameter))
    assert int(whole(torch.empty(0))) == 0
