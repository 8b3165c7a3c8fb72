"""Each algorithm's own numbers, and what becomes of the user's."""

import typing
from typing import Any

import pytest
import yaml

from hack.generate import ROOT
from rlhf_api.algorithms import OWN, Algorithm, fill
from rlhf_api.job import AlgorithmSpec
from rlhf_api.rules import violations
from tests.api.specs import a_job
from tests.api.test_rules import parsed

NAMES: tuple[str, ...] = typing.get_args(AlgorithmSpec.model_fields["name"].annotation)


def filled(max_tokens: int = 100, **given: Any) -> Algorithm:
    return fill(AlgorithmSpec.model_validate(given), max_tokens)


def test_every_algorithm_has_numbers_of_its_own_and_no_other() -> None:
    assert set(OWN) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_open_and_the_run_config_reads_back(name: str) -> None:
    made = filled(name=name)
    assert {key for key, value in made.model_dump().items() if value is None} == {"advantage", "loss"}
    assert Algorithm.model_validate(yaml.safe_load(yaml.safe_dump(made.to_dict()))) == made


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithms_own_numbers_are_ones_that_a_user_may_set(name: str) -> None:
    made = filled(name=name).to_dict()
    only_ppos = {"gae", "valueClip"} if name != "ppo" else set()
    given = {key: value for key, value in made.items() if key not in {"kl", "overlong", "dynamicSampling", *only_ppos}}
    assert violations(parsed(a_job(algorithm=given))) == []


def test_the_users_options_win_one_by_one() -> None:
    made = filled(name="dapo", clipLow=0.1, correction={"tokenCap": 0}, dynamicSampling={"maxRounds": 3})
    assert (made.clip_low, made.clip_high) == (0.1, 0.28)
    assert (made.correction.token_cap, made.correction.alarm) == (0, 0.05)
    assert (made.dynamic_sampling.enabled, made.dynamic_sampling.max_rounds) == (True, 3)


@pytest.mark.parametrize(
    ("given", "place", "estimator"),
    [
        ({"name": "grpo"}, "loss", "k3"),
        ({"name": "ppo"}, "reward", "k1"),
        ({"name": "ppo", "kl": {"place": "loss"}}, "loss", "k3"),
        ({"name": "reinforce++-baseline"}, "loss", "k2"),
        ({"name": "grpo", "kl": {"place": "reward"}}, "reward", "k1"),
    ],
)
def test_the_estimator_goes_with_the_place(given: dict[str, Any], place: str, estimator: str) -> None:
    made = filled(**given)
    assert (made.kl.place, made.kl.estimator) == (place, estimator)


def test_dapos_buffer_is_a_fifth_of_the_longest_completion() -> None:
    assert filled(20480, name="dapo").overlong.buffer_tokens == 4096
    assert filled(20480, name="dapo", overlong={"bufferTokens": 10}).overlong.buffer_tokens == 10
    assert filled(20480, name="grpo").overlong.buffer_tokens == 0


@pytest.mark.parametrize(
    "given",
    [
        {"clipLow": 0}, {"clipLow": 1.1}, {"clipHigh": -0.1}, {"clipHigh": 10}, {"dualClip": -1},
        {"lossAggregation": "mean"}, {"valueClip": -1},
        {"gae": {"gamma": 0}}, {"gae": {"lambda": 1.1}}, {"kl": {"coefficient": -1}}, {"kl": {"estimator": "k4"}},
        {"kl": {"place": "advantage"}},
        {"kl": {"target": -1}}, {"kl": {"horizon": 0}}, {"dynamicSampling": {"maxRounds": 0}},
        {"overlong": {"bufferTokens": -1}},
        {"overlong": {"penalty": 0}}, {"correction": {"tokenMin": 2}}, {"correction": {"alarm": 0}},
        {"advantageNormalization": "whiten"}, {"epochs": 2},
        {"entropyCoefficient": -0.1}, {"loss": "m:f"}, {"loss": {"function": "x" * 513}}, {"advantage": {"name": "f"}},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        AlgorithmSpec.model_validate(given)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_each_algorithms_numbers(name: str) -> None:
    made = filled(name=name)
    (row,) = [
        line for line in (ROOT / "docs/algorithms.md").read_text().splitlines() if line.startswith(f"| `{name}` |")
    ]
    _, _, _, normalization, _, aggregation, clips, term, _, _ = (cell.strip() for cell in row.split("|"))
    assert normalization == f"`{made.advantage_normalization}`"
    assert aggregation == f"`{made.loss_aggregation}`"
    assert [float(clip) for clip in clips.split(",")] == [made.clip_low, made.clip_high]
    assert term == f"{made.kl.estimator}, `{made.kl.place}`"
