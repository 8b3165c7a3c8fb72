"""The best step by a metric: what is worth a checkpoint, and which checkpoint it is."""

from typing import Any

import pytest

from rlhf_api.job import BestSpec
from rlhf_worker.best import Best, ranked
from rlhf_worker.errors import BadSpec

EVALUATED, REWARD = BestSpec(metric="eval/a/mean_reward"), BestSpec(metric="reward/mean", mode="min")


def memory(metric: str, score: float) -> dict[str, Any]:
    return {"score": {metric: score}, "best": {metric: score}}


@pytest.mark.parametrize(("mode", "names"), [("max", ["c", "d", "a"]), ("min", ["a", "c", "d"])])
def test_the_best_is_first_and_of_equals_the_oldest(mode: Any, names: list[str]) -> None:
    scores = {"a": 0.1, "c": 0.8, "d": 0.8}
    memories = {"b": {"kl": {}}, "e": memory("x", 9.0)} | {name: memory("m", score) for name, score in scores.items()}
    assert ranked(BestSpec(metric="m", mode=mode), memories) == names


def story(best: Best, *steps: dict[str, float] | str) -> list[bool]:
    """Steps by their metrics, or "save"; whether each step was worth a checkpoint."""
    found = []
    for step in steps:
        if isinstance(step, str):
            best.saved()
        else:
            best.finished()
            best.observe(step)
            found.append(best.improved)
    return found


def score(value: float) -> dict[str, float]:
    return {"reward/mean": value, "eval/a/mean_reward": value}


def test_an_evaluation_that_improves_is_worth_a_checkpoint_and_other_metrics_are_not() -> None:
    steps = (score(0.1), "save", {"reward/mean": 9.0}, score(0.1), score(0.2), "save", score(0.15), score(float("nan")))
    assert story(Best(EVALUATED), *steps) == [True, False, False, True, False, False]
    assert not any(story(Best(REWARD), *steps)) and not any(story(Best(None), *steps))


def test_a_checkpoint_remembers_its_own_score_and_the_best_which_a_resumed_run_goes_on_from() -> None:
    best = Best(EVALUATED)
    story(best, score(0.4), "save", score(0.3))
    told = best.saved()
    assert told == {"score": {EVALUATED.metric: 0.3}, "best": {EVALUATED.metric: 0.4}}
    resumed, other, fresh = Best(EVALUATED), Best(REWARD), Best(EVALUATED)
    resumed.restore(told)
    other.restore(told)
    fresh.restore({"kl": {}})
    assert (resumed.top, other.top, fresh.top) == (0.4, None, None)
    best.finished()
    assert best.saved() == {"best": {EVALUATED.metric: 0.4}}
    assert Best(None).saved() == {}


def test_a_metric_that_no_one_logs_is_told_with_those_that_are() -> None:
    with pytest.raises(
        BadSpec, match=r"checkpoint\.best\.metric: this run logs no eval/a/mean_reward: use one of a, b",
    ):
        Best(EVALUATED).require({"b": 1.0, "a": 1.0}, evaluated=True)
    Best(EVALUATED).require({}, evaluated=False)  # a step's own metrics have no evaluation's
    Best(None).require({}, evaluated=True)
