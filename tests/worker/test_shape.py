"""From samples to updates: rewards shaped, weights that sum to what they should, the KL controller."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_api.algorithms import OWN, Algorithm, fill
from rlhf_api.job import AlgorithmSpec
from rlhf_worker.algorithm.control import KLController
from rlhf_worker.algorithm.shape import Shaped, informative, overlong, passes, shape
from rlhf_worker.experience import TrainSequence, mini_batches
from tests.worker.samples import a_sequence, by_token, sequences

LENGTHS = [(2, 4), (1, 2), (3, 0), (1, 6), (2, 3), (2, 1)]
REWARDS, GROUPS = [1.0, 0.0, 0.5, 2.0, 2.0, 2.0], [0, 0, 0, 1, 1, 1]


def algorithm(name: str = "grpo", max_tokens: int = 10, **given: Any) -> Algorithm:
    return fill(AlgorithmSpec.model_validate({"name": name} | given), max_tokens)


def items(**columns: float) -> list[TrainSequence]:
    """Six sequences, each with a constant in every column."""
    return [
        s.with_columns(**{name: np.full(len(s.mask), value) for name, value in columns.items()})
        for s in sequences(LENGTHS)
    ]  # fmt: skip


def shaped(spec: Algorithm, given_: list[TrainSequence] | None = None, updates: int = 1, epochs: int = 1) -> Shaped:
    parts = mini_batches(6, updates, epochs, "0")
    return shape(spec, spec.kl.coefficient, given_ or items(), REWARDS, GROUPS, updates=parts, max_tokens=10)


def sums(made: Shaped, column: str) -> list[float]:
    return [
        sum(value for s in part for value, counts in zip(by_token(s, column), s.mask, strict=True) if counts)
        for part in made.updates
    ]


@given(st.sampled_from(sorted(OWN)), st.integers(1, 6), st.integers(1, 3))
def test_every_update_has_its_own_normaliser(name: str, updates: int, epochs: int) -> None:
    given_ = items(values=0.0)
    made = shaped(algorithm(name), given_, updates, epochs)
    assert sorted(s.index for part in made.updates for s in part) == sorted([s.index for s in given_] * epochs)
    for part in made.updates:
        assert all(s.columns["advantages"] is made.advantages[s.index] for s in part)
    for part, loss, metric in zip(made.updates, sums(made, "loss_weights"), sums(made, "token_weights"), strict=True):
        tokens, filled = sum(s.targets for s in part), sum(s.targets > 0 for s in part)
        wanted = {"tokens": float(tokens > 0), "sequences": filled / len(part), "constant": tokens / (len(part) * 10)}
        assert loss == pytest.approx(wanted[algorithm(name).loss_aggregation])
        assert metric == pytest.approx(float(tokens > 0))


def test_observations_have_no_share_in_the_normaliser() -> None:
    (first, *rest) = items()
    first = a_sequence(
        first.token_ids.tolist(), 2, mask=[True, False, False, True], columns=first.columns,
    )
    (part,) = shaped(algorithm(), [first, *rest]).updates
    assert by_token(part[0], "loss_weights") == [1 / 12] * 4
    assert by_token(part[0], "token_weights")[0] == 1 / 14


def test_a_kl_in_the_reward_is_taken_from_the_samples_reward() -> None:
    spec = algorithm("dr_grpo", kl={"coefficient": 0.5, "place": "reward"})
    (part,) = shaped(spec, items(old_logprobs=-1.0, ref_logprobs=-1.2)).updates
    rewards = [1.0 - 0.5 * 0.2 * 4, 0.0 - 0.5 * 0.2 * 2, 0.5]
    assert by_token(part[0], "advantages") == pytest.approx([rewards[0] - sum(rewards) / 3] * 4)
    assert "kl_weights" not in part[0].columns


def test_a_kl_in_the_reward_falls_on_each_token_of_reinforce() -> None:
    spec = algorithm("reinforce++", advantageNormalization="none", kl={"coefficient": 0.5})
    (part,) = shaped(spec, items(old_logprobs=-1.0, ref_logprobs=-1.2)).updates
    assert by_token(part[0], "advantages") == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert by_token(part[1], "advantages") == pytest.approx([-0.2, -0.1])


def test_a_kl_in_the_loss_has_weights_of_its_own() -> None:
    spec = algorithm(kl={"coefficient": 0.5})
    made = shape(spec, 0.25, items(), REWARDS, GROUPS, updates=[range(6)], max_tokens=10)
    assert made.metrics == {"kl/coefficient": 0.25}
    for s in made.updates[0]:
        assert by_token(s, "kl_weights") == pytest.approx([0.25 * w for w in by_token(s, "loss_weights")])


def test_ppo_learns_values_before_whitening() -> None:
    (part,) = shaped(algorithm("ppo", gae={"lambda": 1}), items(values=0.25)).updates
    assert by_token(part[0], "returns") == pytest.approx([1.0] * 4)
    assert by_token(part[3], "returns") == pytest.approx([2.0] * 6)
    counted = [value for s in part for value in by_token(s, "advantages")]
    assert sum(counted) == pytest.approx(0, abs=1e-6)
    assert "returns" not in shaped(algorithm()).updates[0][0].columns


def test_the_last_reward_is_given_at_the_last_token_that_counts() -> None:
    (first, *rest) = items(values=0.0)
    first = a_sequence(
        first.token_ids.tolist(), 2, mask=[True, True, False, False], columns=first.columns,
    )
    (part,) = shaped(
        algorithm("ppo", advantageNormalization="none", gae={"gamma": 0.5, "lambda": 1}), [first, *rest],
    ).updates
    assert by_token(part[0], "advantages") == pytest.approx([0.5, 1.0, 0.0, 0.0])


@pytest.mark.parametrize(("length", "loss"), [(0, 0), (6, 0), (7, 0.5), (8, 1), (10, 2)])
def test_soft_overlong_punishment(length: int, loss: float) -> None:
    spec = algorithm(overlong={"bufferTokens": 4, "penalty": 2})
    assert overlong(spec, [length], 10).tolist() == pytest.approx([loss])
    assert overlong(algorithm(), [length], 10).tolist() == [0]


def test_the_overlong_are_told_of() -> None:
    made = shaped(algorithm("dapo", overlong={"bufferTokens": 8}))
    assert made.metrics["reward/overlong"] == pytest.approx(-(2 + 0 + 0 + 4 + 1 + 0) / 8 / 6)


@pytest.mark.parametrize(
    ("rewards", "wanted"), [([0, 0, 0], False), ([1, 1], False), ([0, 1, 0], True), ([0.5], False)],
)
def test_a_group_is_informative_when_its_rewards_differ(rewards: list[float], wanted: bool) -> None:
    assert informative(rewards) is wanted


@pytest.mark.parametrize(
    ("spec", "updates", "wanted"),
    [
        (algorithm(), 1, {}),
        (algorithm(), 2, {"old_logprobs": "policy"}),
        (algorithm(kl={"coefficient": 0.1}), 1, {"ref_logprobs": "reference"}),
        (algorithm("rloo", kl={"coefficient": 0.1}), 1, {"old_logprobs": "policy", "ref_logprobs": "reference"}),
        (algorithm("ppo"), 1, {"values": "critic"}),
    ],
)
def test_only_the_passes_that_are_needed(spec: Algorithm, updates: int, wanted: dict[str, str]) -> None:
    assert passes(spec, updates) == wanted


def controller(target: float, horizon: int = 100) -> KLController:
    return KLController(algorithm(kl={"coefficient": 0.1, "target": target, "horizon": horizon}).kl)


@pytest.mark.parametrize(("kl", "wanted"), [(0.02, 0.1), (0.5, 0.11), (0.0, 0.09), (0.022, 0.105), (-5.0, 0.09)])
def test_an_adaptive_coefficient_moves_towards_the_target(kl: float, wanted: float) -> None:
    made = controller(0.02)
    made.observe(kl, 50)
    assert made.coefficient == pytest.approx(wanted)


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 10_000)), max_size=50))
def test_an_adaptive_coefficient_stays_positive_and_moves_by_a_fifth_at_most(steps: list[tuple[float, int]]) -> None:
    made = controller(0.02)
    for kl, samples in steps:
        before = made.coefficient
        made.observe(kl, samples)
        assert 0 < before * 0.8 * (1 - 1e-9) <= made.coefficient <= before * 1.2 * (1 + 1e-9)
        assert (made.coefficient >= before) == (kl >= 0.02)


def test_the_coefficient_is_saved_and_a_fixed_one_is_the_specs() -> None:
    made, again, fixed = controller(0.02), controller(0.02), controller(0)
    made.observe(1.0, 100)
    again.restore(made.state())
    fixed.observe(1.0, 100)
    fixed.restore(made.state())
    assert again.coefficient == made.coefficient == pytest.approx(0.12)
    assert fixed.coefficient == 0.1
