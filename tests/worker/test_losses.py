"""Advantages and losses against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import backward

from rlhf_api.job import AlgorithmSpec
from rlhf_worker.algorithm.advantage import grpo
from rlhf_worker.algorithm.losses import Estimator, kl, mismatch, policy_loss


def policy(new: Tensor, old: Tensor | None, advantages: Tensor, weights: Tensor, low: float = 0.2, high: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    columns = {"advantages": advantages, "loss_weights": weights, "token_weights": weights, "rollout_logprobs": torch.zeros(len(new))}
    columns |= {} if old is None else {"old_logprobs": old}
    return policy_loss(AlgorithmSpec(clip_low=low, clip_high=high), new, columns, torch.zeros(len(new), dtype=torch.int64))


def loss_of(ratio: float, advantage: float, low: float = 0.2, high: float = 0.2) -> float:
    return policy(torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), torch.ones(1), low, high)[0].item()


def test_grpo_of_one_success_in_four() -> None:
    torch.testing.assert_close(grpo(torch.tensor([[1.0, 0, 0, 0]])), torch.tensor([[1.5, -0.5, -0.5, -0.5]]), atol=1e-5, rtol=0)


def test_grpo_takes_each_group_by_itself() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [101, 100, 100, 100]])
    torch.testing.assert_close(grpo(rewards)[0], grpo(rewards)[1])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, 1 / 3, -7.7e5])
def test_a_group_of_equal_rewards_gets_exactly_zero(value: float) -> None:
    assert grpo(torch.full((2, 7), value)).tolist() == [[0.0] * 7] * 2


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_grpo_refuses_what_is_no_table_of_groups(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        grpo(torch.zeros(shape))


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_grpo_is_centred_and_never_longer_than_its_group_allows(rows: list[list[float]]) -> None:
    advantages = grpo(torch.tensor(rows, dtype=torch.float64))
    assert torch.isfinite(advantages).all()
    assert advantages.sum(dim=1).abs().max() < 1e-6
    assert advantages.abs().max() <= 4 / math.sqrt(5) + 1e-9  # (K - 1) / sqrt(K) of unbiased scores


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(2, 1, -1.2), (2, -1, 2.0), (0.5, 1, -0.5), (0.5, -1, 0.8), (1, 1, -1.0), (1, -1, 1.0), (5, -1, 5.0)],
)
def test_clipped_policy_loss(ratio: float, advantage: float, expected: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(expected, rel=1e-6)


def test_clips_are_separate() -> None:
    assert loss_of(2, 1, high=0.28) == pytest.approx(-1.28)
    assert loss_of(0.5, -1, low=0.3) == pytest.approx(0.7)


def test_gradient_stops_at_the_clip_only_where_it_would_go_further() -> None:
    new = torch.tensor([math.log(2.0), math.log(2.0), math.log(0.5), math.log(0.5)], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy(new, torch.zeros(4), advantages, torch.full((4,), 0.25))
    backward(loss)
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 0.5, -0.125, 0.0]))
    assert float(metrics["clip_fraction"]) == 0.5


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, metrics = policy(new, None, torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5]))
    backward(loss)
    torch.testing.assert_close(new.grad, torch.tensor([-1.0, 0.5]))
    assert {name: float(metrics[name]) for name in ("ratio", "clip_fraction", "policy_kl")} == {"ratio": 1.0, "clip_fraction": 0.0, "policy_kl": 0.0}


def test_policy_kl_is_of_the_old_policy_that_sampled() -> None:
    _, metrics = policy(torch.tensor([math.log(2.0)]), torch.zeros(1), torch.ones(1), torch.ones(1))
    assert metrics["policy_kl"].item() == pytest.approx(2 - 1 - math.log(2))
    assert metrics["ratio"].item() == pytest.approx(2)


def test_far_log_ratios_stay_finite() -> None:
    new = torch.tensor([500.0, -500.0, math.inf], requires_grad=True)
    loss, metrics = policy(new, torch.zeros(3), -torch.ones(3), torch.ones(3))
    backward(loss)
    assert torch.isfinite(loss)
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())


def test_a_token_of_weight_zero_counts_nowhere() -> None:
    new = torch.tensor([-1.0, 3.0], requires_grad=True)
    loss, metrics = policy(new, torch.tensor([-1.0, 0.0]), torch.ones(2), torch.tensor([1.0, 0.0]))
    backward(loss)
    assert loss.item() == -1.0
    assert new.grad is not None
    assert new.grad[1] == 0
    assert float(metrics["ratio"]) == 1.0


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.693147), ("k2", 0.240227), ("k3", 0.193147)])
def test_kl_estimators_at_d_log_two(estimator: Estimator, expected: float) -> None:
    assert float(kl(estimator, torch.tensor(math.log(2)), torch.tensor(0.0))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_the_same_model_is_exactly_zero_and_far_ones_are_clamped(estimator: Estimator) -> None:
    same = torch.tensor([-0.3, -7.0])
    assert kl(estimator, same, same).tolist() == [0, 0]
    assert kl(estimator, torch.tensor([900.0, -900.0]), torch.zeros(2)).abs().max() <= 10


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_no_gradient_flows_into_the_reference_or_the_old_policy(estimator: Estimator) -> None:
    new, fixed = (torch.full((3,), value, requires_grad=True) for value in (-1.0, -1.1))
    loss, _ = policy(new, fixed, torch.ones(3), torch.ones(3))
    backward(loss + kl(estimator, new, fixed).sum())
    assert new.grad is not None
    assert fixed.grad is None


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator: Estimator) -> None:
    torch.manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(6, dtype=torch.float64), 0) for _ in range(2))
    expectation = (p.exp() * kl(estimator, p, q)).sum()
    torch.testing.assert_close(expectation, (p.exp() * (p - q)).sum())


def test_k2_has_the_gradient_of_the_kl_on_policy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.randn(5, dtype=torch.float64), 0)
    p = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (sampled,) = torch.autograd.grad((p.detach().exp() * kl("k2", p, q)).sum(), logits)
    torch.testing.assert_close(exact, sampled)


def test_mismatch() -> None:
    found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]), torch.tensor([0.5, 0.5]))
    assert float(found["mismatch"]) == pytest.approx(0.25)
    assert float(found["mismatch_kl"]) == pytest.approx(0.5 * (math.exp(0.5) - 1 - 0.5), rel=1e-5)
