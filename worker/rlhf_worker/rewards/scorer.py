"""All rewards of a run: each sample gets their weighted sum. A reward that fails ends the run with its own error; it is never a zero."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import RewardFailed
from rlhf_worker.experience import Sample, ScoredSample
from rlhf_worker.rewards.attempt import Failure, Reward, finite
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

    def score(self, samples: Sequence[Sample], models: Mapping[str, Sequence[float]] | None = None) -> list[ScoredSample]:
        """In the order of `samples`; all rewards run side by side. One that does not judge a sample counts 0 for it.

        models: by name of each reward of type model, a value for each sample that it judges. Raises RewardFailed.
        """
        names = [spec.name for spec in self._specs]
        asked = {name: [sample for sample in samples if sample.prompt.judged_by(name)] for name in names}
        answers = self._executor.map(lambda reward: reward.score(asked[reward.spec.name]), self._rewards)
        values = dict(zip((reward.spec.name for reward in self._rewards), answers, strict=True))
        values |= {name: _checked(name, given, asked[name]) for name, given in (models or {}).items()}
        each = {name: iter(given) for name, given in values.items()}
        return [
            self._scored(sample, {name: next(each[name]) if sample.prompt.judged_by(name) else 0.0 for name in names})
            for sample in samples
        ]

    def _scored(self, sample: Sample, parts: dict[str, float]) -> ScoredSample:
        return ScoredSample(sample=sample, reward=sum(spec.weight * parts[spec.name] for spec in self._specs), parts=parts)

    def close(self) -> None:
        """End every subprocess, also in the middle of a call."""
        for reward in self._rewards:
            reward.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(name: str, values: Sequence[float], samples: Sequence[Sample]) -> list[float]:
    try:
        if len(values) != len(samples):
            raise Failure(f"{len(values)} values for {len(samples)} samples")
        return [finite(value) for value in values]
    except Failure as failure:
        raise RewardFailed(f"rewards[{name}], a model: {failure}") from None
