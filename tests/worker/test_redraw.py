"""A group whose reward or environment failed is sampled anew, once; then another prompt stands in for it."""

from typing import Any

import pytest
import ray

from rlhf_api.job import EvaluationSpec
from rlhf_worker.errors import RewardFailed
from rlhf_worker.experience import Sample, ScoredSample
from rlhf_worker.rollout.admission import Group
from rlhf_worker.rollout.producer import Rollouts
from tests.worker.samples import a_prompt
from tests.worker.test_ray_rollouts import Crew, Feed, cluster, lent, make, rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
assert cluster and lent  # the fixtures


class Ill(Feed):
    """`ill`: how often the samples of a prompt fail, by its row."""

    def __init__(self, ill: dict[int, int]) -> None:
        super().__init__([])
        self.ill = ill

    def score(self, samples: list[Sample], models: dict[str, list[float]], judge: str) -> list[ScoredSample]:
        scored, failing = super().score(samples, models, judge), {row for row, times in self.ill.items() if times}
        for row in failing & {sample.prompt.row for sample in samples}:
            self.ill[row] -= 1
        return [self._failed(item) if item.sample.prompt.row in failing else item for item in scored]

    def _failed(self, item: ScoredSample) -> ScoredSample:
        from dataclasses import replace

        words = f"rewards[r] failed 3 times on prompt {item.sample.prompt.uid}"
        return ScoredSample(sample=replace(item.sample, failure=words), reward=float("nan"), parts={})


RemoteIll: Any = ray.remote(num_cpus=0)(Ill)


def with_ill(ill: dict[int, int], **fields: Any) -> tuple[Rollouts, Crew]:
    rollouts, crew = make(["well"], **fields)
    crew.feed = RemoteIll.remote(ill)
    return rollouts, crew


def test_a_group_that_fails_once_is_trained_in_its_step() -> None:
    rollouts, _ = with_ill({1: 1, 2: 1})
    taken = rollouts.take()
    assert rows(taken) == [0, 1, 2, 3] and all(item.reward in (0, 1) for group in taken for item in group.samples)
    assert (rollouts.metrics["rollout/failed_groups"], rollouts.metrics["rollout/left_out_prompts"]) == (2, 0)


def test_with_staleness_a_group_that_fails_once_is_trained_when_it_is_finished() -> None:
    rollouts, _ = with_ill({1: 1, 2: 1}, staleness=1)
    taken, _, after = rollouts.take(), rollouts.finish(1), rollouts.take()
    assert sorted([*rows(taken), *rows(after)]) == list(range(8))


def test_without_staleness_failed_groups_are_made_after_all_others() -> None:
    rollouts, crew = with_ill({1: 1, 2: 1})
    rollouts.take()
    assert ray.get(crew.fleet.serving[0].asked.remote()) == [2] * 6


def test_a_prompt_that_fails_again_is_left_out_and_another_stands_in_for_it() -> None:
    rollouts, _ = with_ill({1: 9})
    assert rows(rollouts.take()) == [0, 2, 3, 4]
    assert (rollouts.metrics["rollout/failed_groups"], rollouts.metrics["rollout/left_out_prompts"]) == (2, 1)
    assert rollouts.finish(1) == ({"position": 5}, [])  # a resumed run does not draw it either
    assert rows(rollouts.take()) == [5, 6, 7, 8]
    assert rollouts.metrics["rollout/failed_groups"] == 0


def test_more_failures_than_the_spec_allows_stop_the_run_with_the_rewards_own_error() -> None:
    rollouts, _ = with_ill({1: 9, 2: 1}, maxRedraws=2)
    words = r"more than spec\.rollout\.maxRedraws \(2\) groups of a step failed: rewards\[r\] failed 3 times"
    with pytest.raises(RewardFailed, match=words):
        rollouts.take()


def test_an_evaluation_goes_on_without_a_prompt_that_fails_again() -> None:
    rollouts, _ = with_ill({90: 9, 91: 1})
    spec = EvaluationSpec.model_validate({"name": "e", "data": {"jsonl": {"path": "/x"}}})
    found = rollouts.evaluate(spec, [a_prompt(row) for row in (90, 91, 92)])
    assert [group[0].sample.prompt.row for group in found] == [91, 92]
    assert rows(rollouts.take()) == [0, 1, 2, 3]


def test_what_is_sampled_anew_gets_other_seeds() -> None:
    rollouts, _ = make(["well"])
    seeds = {request.seed for failed in (0, 1) for request in rollouts._requests(Group(a_prompt(3), 0, failed=failed))}
    assert len(seeds) == 4
