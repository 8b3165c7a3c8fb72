"""Each reward on one scale before the sum: against the formula, by hand."""

import statistics
from dataclasses import replace
from typing import Any

import pytest

from rlhf_worker.algorithm.shape import informative
from rlhf_worker.experience import ScoredSample
from rlhf_worker.loop import step_metrics
from rlhf_worker.rewards.normalization import training_rewards
from tests.worker.configs import run_config
from tests.worker.samples import a_sample

GROUPS = [0, 0, 0, 1, 1, 1]
A, B = [1.0, 2.0, 6.0, 4.0, 4.0, 4.0], [100.0, 0.0, 0.0, 50.0, 0.0, 100.0]


def z(values: list[float], among: list[float]) -> list[float]:
    deviation = statistics.stdev(among)
    return [(value - statistics.fmean(among)) / (deviation + 1e-6) for value in values]


def summed(a: list[float], b: list[float]) -> list[float]:
    return [2 * x - y for x, y in zip(a, b, strict=True)]


def config(a: str, b: str, **rollout: Any) -> Any:
    python = {"type": "python", "function": "m:f"}
    first = {**python, "name": "a", "weight": 2.0, "normalize": a}
    rewards = [first, {**python, "name": "b", "weight": -1.0, "normalize": b}]
    return run_config(rewards=rewards, rollout={"maxTokens": 16, "samplesPerPrompt": 3, **rollout})


def scored(a: list[float], b: list[float], **parts: float) -> list[ScoredSample]:
    return [
        ScoredSample(sample=a_sample(i), reward=2 * x - y, parts={"a": x, "b": y, **parts}, metrics=metrics)
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        for metrics in [{"a/n": x} if i else {}]
    ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("none", "none", summed(A, B)),
        ("group", "none", summed([*z(A[:3], A[:3]), 0, 0, 0], B)),
        ("none", "batch", summed(A, z(B, B))),
        ("group", "group", summed([*z(A[:3], A[:3]), 0, 0, 0], [*z(B[:3], B[:3]), *z(B[3:], B[3:])])),
    ],
)
def test_values_are_normalised_weighted_and_summed(a: str, b: str, expected: list[float]) -> None:
    assert training_rewards(config(a, b), scored(A, B), GROUPS) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("how", ["group", "batch"])
def test_samples_that_a_reward_does_not_judge_are_none_of_its_values(how: str) -> None:
    judged = scored(A, [0.0] * 6)[:3]
    others = [replace(item, parts={"a": 0.0, "b": 0.0}) for item in scored(A, [0.0] * 6)[3:]]
    apart = [replace(o, sample=replace(o.sample, prompt=replace(o.sample.prompt, rewards=("b",)))) for o in others]
    expected = [2 * value for value in z(A[:3], A[:3])] + [0.0] * 3
    assert training_rewards(config(how, "none"), [*judged, *apart], GROUPS) == pytest.approx(expected, abs=1e-9)


def test_without_normalisation_the_sum_is_the_very_same() -> None:
    items = scored([0.1] * 6, [0.2] * 6)
    assert training_rewards(config("none", "none"), items, GROUPS) == [item.reward for item in items]


def test_what_an_environment_gave_is_added_by_its_weight() -> None:
    spec = config("group", "group", environment={"code": "class Environment: ...", "weight": 0.5})
    assert training_rewards(spec, scored([3.0] * 6, [1.0] * 6, environment=8.0), GROUPS) == [4.0] * 6


def test_values_that_are_all_equal_teach_nothing_whatever_the_scale() -> None:
    found = training_rewards(config("group", "batch"), scored([0.1 + 0.2] * 6, [1e8 / 3] * 6), GROUPS)
    assert found == [0.0] * 6 and not informative(found)


def test_rewards_that_cancel_on_their_own_scales_may_still_teach() -> None:
    items = scored([0.0, 1.0, 2.0], [0.0, 2.0, 4.0])
    assert not informative([item.reward for item in items])
    assert informative(training_rewards(config("group", "group"), items, [0, 0, 0]))


def test_metrics_keep_the_values_and_the_metrics_beside_them() -> None:
    found = step_metrics(scored(A, B), {}, 1.0)
    assert found["reward/a"] == pytest.approx(21 / 6) and found["reward/a/n"] == 4.0
    assert found["reward/mean"] == pytest.approx((42 - 250) / 6)
