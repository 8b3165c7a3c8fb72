"""All rewards of a run: each sample gets their weighted sum.

A reward that fails ends the run with its own error, or has the group drawn anew; it is never a zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Self

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import RewardFailed
from rlhf_worker.experience import Sample, ScoredSample
from rlhf_worker.rewards.attempt import Failure, Judgement, Reward, finite
from rlhf_worker.rewards.http import HttpReward
from rlhf_worker.rewards.judge import JudgeReward
from rlhf_worker.rewards.pool import PythonReward

KINDS: Mapping[str, Callable[[RewardSpec], Reward]] = {"python": PythonReward, "http": HttpReward, "judge": JudgeReward}


class Scorer:
    """Starts every reward, and loads its function: what cannot be loaded raises BadSpec here, before the first step.

    Rewards of type model are computed by the trainer's ranks; `score` is handed their values.
    """

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        self._specs = specs
        self._rewards: list[Reward] = []
        self._executor = ThreadPoolExecutor(len(specs), thread_name_prefix="rewards")
        try:
            for spec in specs:
                if spec.type != "model":
                    self._rewards.append(KINDS[spec.type](spec))
        except BaseException:
            self.close()
            raise

    def score(
        self, samples: Sequence[Sample], models: Mapping[str, Sequence[float]] | None = None
    ) -> list[ScoredSample]:
        """In the order of `samples`, those of one prompt side by side; all rewards are computed at the same time.

        `models`: by name of each reward of type model, a value for each sample that it judges. A reward that does not
        judge a sample counts 0 for it. Where a sample's episode failed no reward is asked about its group. Raises
        RewardFailed, BadData, BadSpec.
        """
        failed = {sample.prompt.uid for sample in samples if sample.failure}
        whole = [sample for sample in samples if sample.prompt.uid not in failed]
        answers = self._executor.map(lambda reward: reward.score(_judged(reward.spec.name, whole)), self._rewards)
        each = {reward.spec.name: iter(answer) for reward, answer in zip(self._rewards, answers, strict=True)}
        for name, values in (models or {}).items():
            judged = _judged(name, samples)
            pairs = zip(judged, _checked(name, values, judged), strict=True)
            each[name] = iter([judgement for sample, judgement in pairs if sample.prompt.uid not in failed])
        return [
            _unscored(sample) if sample.prompt.uid in failed
            else self._scored(sample, {n: next(given) for n, given in each.items() if sample.prompt.judged_by(n)})
            for sample in samples
        ]

    def _scored(self, sample: Sample, judgements: Mapping[str, Judgement]) -> ScoredSample:
        """`judgements`: by the name of each reward that judges it."""
        if failure := next((judgement.failure for judgement in judgements.values() if judgement.failure), ""):
            return _unscored(replace(sample, failure=failure))
        parts = {s.name: _clipped(s, judgements[s.name].value) if s.name in judgements else 0.0 for s in self._specs}
        metrics = {f"{name}/{key}": value for name, given in judgements.items() for key, value in given.metrics.items()}
        reward = sum(spec.weight * parts[spec.name] for spec in self._specs)
        return ScoredSample(sample=sample, reward=reward, parts=parts, metrics=metrics)

    def try_out(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Each reward on a sample of each group that it judges, or on the whole group where it wants one, within its
        own deadlines, all side by side.

        Raises RewardFailed, which tells of every one that failed; BadData, BadSpec.
        """
        if failures := list(filter(None, self._executor.map(partial(_tried_out, groups), self._rewards))):
            raise RewardFailed("; ".join(failures))

    def close(self) -> None:
        """End every subprocess, also in the middle of a call."""
        for reward in self._rewards:
            reward.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _judged(name: str, samples: Iterable[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.prompt.judged_by(name)]


def _tried_out(groups: Sequence[Sequence[Sample]], reward: Reward) -> str:
    """What is wrong; empty for nothing."""
    count = None if reward.spec.scope == "group" else 1
    judged = [group[:count] for group in groups if group[0].prompt.judged_by(reward.spec.name)]
    try:
        judgements = [judgement for samples in judged for judgement in reward.score(samples)]
    except RewardFailed as error:
        return str(error)
    return next((judgement.failure for judgement in judgements if judgement.failure), "")


def _unscored(sample: Sample) -> ScoredSample:
    """Of a group in which an episode or a reward failed."""
    return ScoredSample(sample=sample, reward=math.nan, parts={})


def _clipped(spec: RewardSpec, value: float) -> float:
    return value if spec.clip is None else min(max(value, spec.clip.low), spec.clip.high)


def _checked(name: str, values: Sequence[float], samples: Sequence[Sample]) -> list[Judgement]:
    try:
        if len(values) != len(samples):
            raise Failure(f"{len(values)} values for {len(samples)} samples")
        return [Judgement(finite(value)) for value in values]
    except Failure as failure:
        raise RewardFailed(f"rewards[{name}], a model: {failure}") from None
