"""Losses, KL estimates and the correction of the mismatch against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import backward

from rlhf_api.algorithms import Algorithm, fill
from rlhf_api.job import AlgorithmSpec
from rlhf_worker.algorithm.correction import alarm, correction, summary
from rlhf_worker.algorithm.divergence import Estimator, kl
from rlhf_worker.algorithm.losses import policy_loss, value_loss

OFF = {"tokenCap": 0}


def algorithm(**given: Any) -> Algorithm:
    return fill(AlgorithmSpec.model_validate({"correction": OFF} | given), 100)


def policy(
    new: Tensor, old: Tensor | None, advantages: Tensor, weights: Tensor, sequence: list[int] | None = None,
    **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    columns = {
        "advantages": advantages, "loss_weights": weights, "token_weights": weights,
        "rollout_logprobs": torch.zeros(len(new)),
    }
    columns |= {} if old is None else {"old_logprobs": old}
    numbers = torch.tensor(sequence or [0] * len(new))
    return policy_loss(algorithm(**options), new, torch.zeros_like(new), columns, numbers)


def loss_of(ratio: float, advantage: float, **options: Any) -> float:
    return policy(
        torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), torch.ones(1), **options,
    )[0].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(2, 1, -1.2), (2, -1, 2.0), (0.5, 1, -0.5), (0.5, -1, 0.8), (1, 1, -1.0), (1, -1, 1.0), (5, -1, 5.0)],
)
def test_clipped_policy_loss(ratio: float, advantage: float, expected: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(expected, rel=1e-6)


def test_clips_are_separate() -> None:
    assert loss_of(2, 1, clipHigh=0.28) == pytest.approx(-1.28)
    assert loss_of(0.5, -1, clipLow=0.3) == pytest.approx(0.7)


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
    assert {
        name: float(metrics[name]) for name in ("ratio", "clip_fraction", "policy_kl")
    } == {"ratio": 1.0, "clip_fraction": 0.0, "policy_kl": 0.0}


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


@pytest.mark.parametrize(("ratio", "advantage", "expected"), [(5, -1, 3.0), (2, -1, 2.0), (5, 1, -1.2), (0.5, -1, 0.8)])
def test_a_dual_clip_bounds_the_loss_of_negative_advantages_only(
    ratio: float, advantage: float, expected: float,
) -> None:
    assert loss_of(ratio, advantage, dualClip=3) == pytest.approx(expected, rel=1e-6)


def test_gspos_ratio_is_the_geometric_mean_of_its_sequence() -> None:
    new = torch.tensor([0.1, 0.3, -0.2], requires_grad=True)
    advantages, weights = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.25, 0.25, 0.5])
    loss, metrics = policy(new, torch.zeros(3), advantages, weights, [0, 0, 1], name="gspo", clipLow=0.5, clipHigh=0.5)
    backward(loss)
    first, second = math.exp(0.2), math.exp(-0.2)
    assert loss.item() == pytest.approx(0.5 * (-first + second), rel=1e-6)
    torch.testing.assert_close(new.grad, torch.tensor([-first / 4, -first / 4, second / 2]))
    assert metrics["ratio"].item() == pytest.approx(0.5 * (first + second))


def test_gspos_gradient_is_that_of_the_paper() -> None:
    """Mean over sequences of -s_i A_i with s_i = exp(mean of the log ratios), differentiated as it stands."""
    torch.manual_seed(0)
    old, new = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.tensor([2.0] * 3 + [-1.0] * 4).double(), torch.tensor(
        [1 / 6] * 3 + [1 / 8] * 4
    ).double()
    loss, _ = policy(new, old, advantages, weights, [0, 0, 0, 1, 1, 1, 1], name="gspo", clipLow=0.99, clipHigh=9)
    paper = (-2.0 * (new - old)[:3].mean().exp() + (new - old)[3:].mean().exp()) / 2
    for a, b in zip(torch.autograd.grad(loss, new), torch.autograd.grad(paper, new), strict=True):
        torch.testing.assert_close(a, b)


def test_a_clipped_sequence_of_gspo_has_no_gradient() -> None:
    new = torch.tensor([0.5, -0.1], requires_grad=True)
    loss, metrics = policy(new, torch.zeros(2), torch.ones(2), torch.full((2,), 0.5), name="gspo")
    backward(loss)
    assert new.grad is not None and not new.grad.any()
    assert loss.item() == pytest.approx(-1.0004)
    assert float(metrics["clip_fraction"]) == 1


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    new = torch.tensor([math.log(2.0), math.log(0.5)], requires_grad=True)
    loss, metrics = policy(
        new, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2), name="cispo", clipHigh=0.5, clipLow=0.2,
    )
    backward(loss)
    torch.testing.assert_close(new.grad, torch.tensor([-1.5, 0.8]))
    assert float(metrics["clip_fraction"]) == 2


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_at_the_first_update_the_ratio_is_exactly_one(name: str) -> None:
    new = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 9
    for old in (None, new.clone()):
        _, metrics = policy(new, old, torch.ones(50), torch.full((50,), 1 / 64), name=name)
        assert float(metrics["ratio"]) == 50 / 64
        assert float(metrics["clip_fraction"]) == float(metrics["policy_kl"]) == 0


def test_an_entropy_bonus_is_weighted_as_the_loss_and_adds_its_own_gradient() -> None:
    new, entropy = (torch.tensor(values, requires_grad=True) for values in ([-1.0, -2.0], [0.5, 1.5]))
    columns = {
        "advantages": torch.tensor([2.0, -1.0]), "loss_weights": torch.tensor([0.75, 0.25]),
        "token_weights": torch.full((2,), 0.5), "rollout_logprobs": torch.zeros(2),
    }  # fmt: skip
    loss, metrics = policy_loss(algorithm(entropyCoefficient=0.1), new, entropy, columns, torch.zeros(2).long())
    backward(loss)
    assert loss.item() == pytest.approx(-(0.75 * 2 - 0.25) - 0.1 * (0.75 * 0.5 + 0.25 * 1.5))
    assert metrics["entropy"].item() == 1.0
    torch.testing.assert_close(new.grad, torch.tensor([-1.5, 0.25]))
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.075, -0.025]))


@pytest.mark.parametrize(
    ("new", "expected"), [(1.1, 0.5 * 0.9**2), (1.9, 0.5 * 0.1**2), (0.0, 0.5 * 2.0**2), (-3.0, 0.5 * 5.0**2)],
)
def test_value_loss(new: float, expected: float) -> None:
    columns = {
        "values": torch.tensor([1.0]), "returns": torch.tensor([2.0]), "loss_weights": torch.ones(1),
        "token_weights": torch.ones(1),
    }
    free = value_loss(algorithm(name="ppo", valueClip=0), torch.tensor([new]), columns)[0].item()
    clipped, metrics = value_loss(algorithm(name="ppo", valueClip=0.2), torch.tensor([new]), columns)
    assert free == pytest.approx(expected)
    assert clipped.item() == pytest.approx(0.5 * max((new - 2) ** 2, (min(max(new, 0.8), 1.2) - 2) ** 2))
    assert float(metrics["value_clip_fraction"]) == (new == 1.9)


def corrected(log_weights: list[float], sequence: list[int], **spec: float) -> tuple[list[float], dict[str, float]]:
    size = len(log_weights)
    options = algorithm(correction=OFF | spec).correction
    factor, metrics = correction(
        options, torch.tensor(log_weights), torch.zeros(size), torch.tensor(sequence), torch.full((size,), 1 / size),
    )
    return factor.tolist(), {name: value.item() for name, value in metrics.items()}


WEIGHTS = [math.log(w) for w in (0.25, 1.0, 4.0, 1.0)]


def test_weights_are_capped_and_masked() -> None:
    assert corrected(WEIGHTS, [0, 0, 0, 0])[0] == [1, 1, 1, 1]
    assert corrected(WEIGHTS, [0, 0, 0, 0], tokenCap=2)[0] == pytest.approx([0.25, 1, 2, 1])
    assert corrected(WEIGHTS, [0, 0, 0, 0], tokenMin=0.5, tokenMax=3)[0] == [0, 1, 0, 1]
    assert corrected(WEIGHTS, [0, 0, 0, 0], tokenCap=2, tokenMax=5)[0] == pytest.approx([0.25, 1, 2, 1])


def test_a_sequence_is_left_out_as_a_whole() -> None:
    assert corrected(WEIGHTS, [0, 0, 1, 1], sequenceMin=0.6, sequenceMax=5)[0] == [0, 0, 1, 1]
    assert corrected(WEIGHTS, [0, 0, 1, 1], sequenceMax=1.9)[0] == [1, 1, 0, 0]
    assert corrected(WEIGHTS, [0, 1, 0, 1], sequenceMin=0.999, sequenceMax=1.001)[0] == [1, 1, 1, 1]


def test_mismatch_metrics() -> None:
    _, found = corrected(WEIGHTS, [0, 0, 1, 1], sequenceMin=0.6)
    assert found["mismatch/abs"] == pytest.approx(math.log(4) / 2)
    assert found["mismatch/kl"] == pytest.approx(((0.25 - 1 + math.log(4)) + (4 - 1 - math.log(4))) / 4, rel=1e-5)
    assert found["mismatch/masked"] == 0.5
    told = summary({"loss": 1.0, **found})
    assert told["mismatch/ess"] == pytest.approx(6.25**2 / (4 * (0.0625 + 1 + 16 + 1)))
    assert set(told) == {"loss", "mismatch/abs", "mismatch/kl", "mismatch/masked", "mismatch/ess"}


def test_the_loss_is_multiplied_and_no_gradient_flows_through_the_weights() -> None:
    new = torch.tensor([math.log(3.0), math.log(0.5)], requires_grad=True)
    loss, _ = policy(new, None, torch.ones(2), torch.full((2,), 0.5), correction={"tokenCap": 2})
    backward(loss)
    assert loss.item() == pytest.approx(-(2 + 0.5) / 2)
    torch.testing.assert_close(new.grad, torch.tensor([-1.0, -0.25]))


def test_the_alarm_names_the_number_and_the_fix() -> None:
    spec = algorithm(correction={"alarm": 0.01}).correction
    assert alarm(spec, {"mismatch/kl": 0.01}) is None
    assert "0.02 nats a token, above spec.algorithm.correction.alarm (0.01)" in (
        alarm(spec, {"mismatch/kl": 0.02}) or ""
    )


def test_far_mismatches_stay_finite() -> None:
    factor, found = corrected([900.0, -900.0, math.inf], [0, 0, 0], tokenCap=2, sequenceMax=2)
    assert all(map(math.isfinite, [*factor, *found.values()]))
