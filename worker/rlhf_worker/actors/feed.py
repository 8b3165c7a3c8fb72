"""The part of a run that needs the files of a trainer pod but no GPU: prompts, rewards, TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rlhf_api.run import RunConfig
from rlhf_worker.pretrained import load_tokenizer

if TYPE_CHECKING:
    from rlhf_worker.experience import Prompt, Sample, ScoredSample


class Feed:
    """Created in the first trainer bundle; `open` does the work, so that a failure is the call's and not the actor's."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def open(self) -> int:
        """Read the data, start the rewards. Returns the number of rows. Raises BadSpec or BadData."""
        from rlhf_worker.data import PromptSampler, PromptSource
        from rlhf_worker.rewards.scorer import Scorer

        source = PromptSource(self.config.data)
        self.sampler = PromptSampler(source, load_tokenizer(self.config.model), self.config.data)
        self.sampler.check(self.config.trainer.steps * self.config.rollout.prompts_per_step)
        self.scorer = Scorer(self.config.rewards)
        return len(source)

    def begin(self, step: int, sampler: dict[str, Any] | None) -> None:
        """Go on after `step` finished steps. Raises BadData for a state of other data."""
        from rlhf_worker.telemetry import Telemetry

        if sampler is not None:
            self.sampler.restore(sampler)
        self.telemetry = Telemetry(Path(self.config.checkpoint.path) / "tensorboard", step + 1)

    def draw(self, count: int) -> "list[Prompt]":
        """Raises BadData."""
        return self.sampler.next(count)

    def sampler_state(self) -> dict[str, Any]:
        return self.sampler.state()

    def score(self, samples: "list[Sample]") -> "list[ScoredSample]":
        """Raises RewardFailed."""
        return self.scorer.score(samples)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.telemetry.log(step, values)

    def close(self) -> None:
        self.scorer.close()
        self.telemetry.close()


RemoteFeed = ray.remote(Feed)
