"""Advantages against numbers worked out by hand, and against their definitions one token at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_worker.algorithm.advantage import by_deviation, centred, gae, leave_one_out, whiten

ONE_IN_FOUR = torch.tensor([1.0, 0, 0, 0])
TOGETHER = torch.zeros(4, dtype=torch.int64)
TABLE = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=6)


def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    return by_deviation(centred(rewards, groups), groups)


def test_one_success_in_four() -> None:
    torch.testing.assert_close(grpo(ONE_IN_FOUR, TOGETHER), torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(leave_one_out(ONE_IN_FOUR, TOGETHER), torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    torch.testing.assert_close(centred(ONE_IN_FOUR, TOGETHER), torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_each_group_is_taken_by_itself_whatever_their_order_and_sizes() -> None:
    rewards, groups = torch.tensor([1.0, 101, 0, 100, 0, 0, 100, 7]), torch.tensor([0, 1, 0, 1, 0, 0, 1, 2])
    for estimate in (grpo, leave_one_out, centred):
        found = estimate(rewards, groups)
        torch.testing.assert_close(found[groups == 0], estimate(ONE_IN_FOUR, TOGETHER))
        torch.testing.assert_close(
            found[groups == 1], estimate(torch.tensor([1.0, 0, 0]), torch.zeros(3, dtype=torch.int64)),
        )
        assert found[7] == 0, "a group of one teaches nothing"


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, 1 / 3, -7.7e5])
def test_a_group_of_equal_rewards_gets_exactly_zero(value: float) -> None:
    groups = torch.tensor([0] * 7 + [1] * 7)
    for estimate in (grpo, leave_one_out, centred):
        assert estimate(torch.full((14,), value), groups).tolist() == [0.0] * 14


@given(TABLE)
def test_grpo_is_centred_and_never_longer_than_its_group_allows(rows: list[list[float]]) -> None:
    advantages = grpo(
        torch.tensor(rows, dtype=torch.float64).flatten(), torch.arange(len(rows)).repeat_interleave(5),
    ).view(-1, 5)
    assert torch.isfinite(advantages).all()
    assert advantages.sum(dim=1).abs().max() < 1e-6
    assert advantages.abs().max() <= 4 / math.sqrt(5) + 1e-9  # (K - 1) / sqrt(K) of unbiased scores


@given(TABLE)
def test_rloo_is_the_reward_less_the_mean_of_the_others(rows: list[list[float]]) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64)
    found = leave_one_out(rewards.flatten(), torch.arange(len(rows)).repeat_interleave(5)).view(-1, 5)
    wanted = [[r - (sum(row) - r) / 4 for r in row] for row in rewards.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def by_the_book(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t as the sum over l of (gamma lambda)^l delta_(t + l)."""
    deltas = [r + gamma * following - v for r, v, following in zip(rewards, values, [*values[1:], 0.0], strict=False)]
    return [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


ROW = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.booleans()), max_size=12)


@given(st.lists(ROW, min_size=1, max_size=4), st.floats(0.1, 1), st.floats(0, 1))
def test_gae_across_observations_is_gae_of_the_tokens_that_count(
    rows: list[list[tuple[float, float, bool]]], gamma: float, lam: float,
) -> None:
    longest = max(1, *map(len, rows))
    padded = [row + [(9.0, 9.0, False)] * (longest - len(row)) for row in rows]
    rewards, values, mask = (torch.tensor([[item[i] for item in row] for row in padded]) for i in range(3))
    found, returns = gae(rewards.double(), values.double(), mask.bool(), gamma, lam)
    assert not found[~mask].any() and not returns[~mask].any()
    for i in range(len(rows)):
        counted = rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist()
        assert found[i][mask[i]].tolist() == pytest.approx(by_the_book(*counted, gamma, lam), abs=1e-6)
    torch.testing.assert_close(returns[mask], (found + values)[mask])


def test_without_values_an_advantage_is_the_reward_to_go() -> None:
    rewards = torch.tensor([[-0.1, 5.0, -0.2, 1.0]])
    found, _ = gae(rewards, torch.zeros(1, 4), torch.tensor([[True, False, True, True]]), 1.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.0, 0.8, 1.0]]))


def test_whitening_is_over_all_that_counts() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True]])
    found = whiten(torch.tensor([[1.0, 2.0, 99.0], [3.0, -99.0, 6.0]]), mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert not found[~mask].any()


@pytest.mark.parametrize("values", [[[0.1 + 0.2, 0.1 + 0.2]], [[5.0, 0.0]]])
def test_whitening_what_is_all_equal_gives_exactly_zero(values: list[list[float]]) -> None:
    table = torch.tensor(values)
    assert not whiten(table, table != 0).any()
