"""The part of a run that needs the files of a trainer pod but no GPU: prompts, rewards, telemetry."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from rlhf_api.job import EvaluationSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.feed.logs import DriverLog
from rlhf_worker.pretrained import load_tokenizer
from rlhf_worker.roll import Member

if TYPE_CHECKING:
    from rlhf_worker.experience import Prompt, Sample, ScoredSample


class Feed(Member):
    """Created in the first trainer bundle; `open` does the work, so that a failure is the call's and not the actor's."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.driver_logs: dict[int, DriverLog] = {}

    def open(self) -> None:
        """Read the data, start the rewards. Raises BadSpec or BadData."""
        from rlhf_worker.feed import telemetry
        from rlhf_worker.feed.data import PromptSampler, PromptSource
        from rlhf_worker.rewards.scorer import Scorer

        telemetry.check(self.config.telemetry)
        tokenizer = load_tokenizer(self.config.model)
        self.sampler = PromptSampler(PromptSource(self.config.data), tokenizer, self.config.data)
        self.sampler.check(self.config.trainer.steps * self.config.rollout.prompts_per_step)
        self.evaluations = {spec.name: self._evaluation(spec, tokenizer) for spec in self.config.evaluation}
        self.scorer = Scorer(self.config.rewards)

    def _evaluation(self, spec: EvaluationSpec, tokenizer: Any) -> "list[Prompt]":
        from rlhf_worker.feed.data import PromptSampler, PromptSource

        try:
            prompts = PromptSampler(PromptSource(spec.data), tokenizer, spec.data).first(spec.limit)
        except (BadData, BadSpec) as error:
            raise type(error)(f"evaluation[{spec.name}]: {error}") from None
        return [replace(prompt, uid=f"{spec.name}:{prompt.row}") for prompt in prompts]

    def begin(self, step: int, sampler: dict[str, Any] | None) -> None:
        """Go on after `step` finished steps. Raises BadData for a state of other data."""
        from rlhf_worker.feed.telemetry import Telemetry

        if sampler is not None:
            self.sampler.restore(sampler)
        self.telemetry = Telemetry(self.config, step + 1)

    def draw(self, again: list[str], count: int) -> "list[Prompt]":
        """`again`: uids of what a run that ended had drawn and not trained; after them the next `count`. Raises BadData."""
        return [*self.sampler.again(again), *self.sampler.next(count)]

    def draw_evaluation(self, name: str) -> "list[Prompt]":
        """The same prompts each time."""
        return self.evaluations[name]

    def sampler_state(self) -> dict[str, Any]:
        return self.sampler.state()

    def try_rewards(self) -> None:
        """Each reward on the first prompt's text, within its own deadlines. Raises RewardFailed, BadData, BadSpec."""
        from rlhf_worker.experience import Sample

        prompt = self.sampler.first(1)[0]
        empty: dict[str, Any] = {"token_ids": [], "logprobs": [], "mask": [], "versions": [], "finish_reason": "stop"}
        sample = Sample(prompt=prompt, text=prompt.text, **empty)
        self.scorer.try_out([sample] * self.config.rollout.samples_per_prompt)

    def score(self, samples: "list[Sample]", models: Mapping[str, Sequence[float]] | None = None) -> "list[ScoredSample]":
        """`models`: what the rewards of type model gave, by name. Raises RewardFailed."""
        return self.scorer.score(samples, models)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.telemetry.log(step, values)

    def record(self, step: int, scored: "list[ScoredSample]", advantages: Sequence[Sequence[float]] | None = None) -> None:
        """Keep the samples of a step, with the advantage of each completion token."""
        self.telemetry.record(step, scored, advantages)

    def keep_log(self, attempt: int, text: str) -> None:
        """The next piece of the driver's output. Raises nothing."""
        self.driver_logs.setdefault(attempt, DriverLog(self.config.checkpoint.path, attempt)).add(text)

    def close(self) -> None:
        self.scorer.close()
        self.telemetry.close()


RemoteFeed = ray.remote(Feed)
