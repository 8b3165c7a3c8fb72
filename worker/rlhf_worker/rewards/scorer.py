"""All rewards of a run: each sample gets their weighted sum. A reward that fails ends the run with its own error; it is never a zero."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from rlhf_api.job import RewardSpec
from rlhf_worker.experience import Sample, ScoredSample
from rlhf_worker.rewards.http import HttpReward
from rlhf_worker.rewards.pool import PythonReward


class Reward(Protocol):
    spec: RewardSpec

    def score(self, samples: Sequence[Sample]) -> list[float]: ...
    def close(self) -> None: ...


class Scorer:
    """Starts every reward, and loads its function: what cannot be loaded raises BadSpec here, before the first step."""

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        self._rewards: list[Reward] = []
        self._executor = ThreadPoolExecutor(len(specs), thread_name_prefix="rewards")
        try:
            for spec in specs:
                self._rewards.append(PythonReward(spec) if spec.type == "python" else HttpReward(spec))
        except BaseException:
            self.close()
            raise

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample]:
        """In the order of `samples`; all rewards run side by side. Raises RewardFailed."""
        values = list(self._executor.map(lambda reward: reward.score(samples), self._rewards))
        return [self._scored(sample, row) for sample, row in zip(samples, zip(*values, strict=True), strict=True)]

    def _scored(self, sample: Sample, values: Sequence[float]) -> ScoredSample:
        total = sum(reward.spec.weight * value for reward, value in zip(self._rewards, values, strict=True))
        return ScoredSample(sample=sample, reward=total, parts={r.spec.name: v for r, v in zip(self._rewards, values, strict=True)})

    def close(self) -> None:
        """End every subprocess, also in the middle of a call."""
        for reward in self._rewards:
            reward.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
