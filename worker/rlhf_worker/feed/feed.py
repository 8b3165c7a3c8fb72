"""The part of a run that needs the files of a trainer pod but no GPU: prompts, rewards, telemetry."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from rlhf_api.job import EvaluationSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadData, BadSpec, RewardFailed
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
        from rlhf_worker.rollout.sampling import check_sampling

        telemetry.check(self.config.telemetry)
        tokenizer = load_tokenizer(self.config.model)
        check_sampling(self.config, tokenizer)
        self.sampler = PromptSampler(PromptSource(self.config.data), tokenizer, self.config.data)
        self.sampler.check(self.config.trainer.steps * self.config.rollout.prompts_per_step)
        self.evaluations = {spec.name: self._evaluation(spec, tokenizer) for spec in self.config.evaluation}
        self.scorer = Scorer(self.config.rewards)
        self.judges: dict[str, Scorer] = {}  # evaluation sets' own
        for spec in self.config.evaluation:
            if spec.rewards:
                with _of(spec.name):
                    self.judges[spec.name] = Scorer(spec.rewards)

    def _evaluation(self, spec: EvaluationSpec, tokenizer: Any) -> "list[Prompt]":
        from rlhf_worker.feed.data import PromptSampler, PromptSource

        with _of(spec.name):
            prompts = PromptSampler(PromptSource(spec.data), tokenizer, spec.data).first(spec.limit)
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
        """Each reward on one sample. Raises RewardFailed."""
        from rlhf_worker.experience import Sample

        for judge in ("", *self.judges):
            prompt = self.evaluations[judge][0] if judge else self.sampler.first(1)[0]
            sample = Sample(
                prompt=prompt, token_ids=[], logprobs=[], mask=[], versions=[], text=prompt.text, finish_reason="stop"
            )
            self.score(
                [sample],
                {} if judge else {spec.name: [0.0] for spec in self.config.rewards if spec.type == "model"},
                judge,
            )

    def score(
        self, samples: "list[Sample]", models: Mapping[str, Sequence[float]] | None = None, judge: str = ""
    ) -> "list[ScoredSample]":
        """`models`: what rewards of type model gave, by name; `judge`: a set, by name, with rewards of its own.

        Raises RewardFailed.
        """
        with _of(judge):
            return (self.judges[judge] if judge else self.scorer).score(samples, models)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.telemetry.log(step, values)

    def record(self, step: int, scored: "list[ScoredSample]", advantages: Sequence[Sequence[float]] | None = None) -> None:
        """Keep the samples of a step, with the advantage of each completion token."""
        self.telemetry.record(step, scored, advantages)

    def keep_log(self, attempt: int, text: str) -> None:
        """The next piece of the driver's output. Raises nothing."""
        self.driver_logs.setdefault(attempt, DriverLog(self.config.checkpoint.path, attempt)).add(text)

    def close(self) -> None:
        for scorer in (self.scorer, *self.judges.values()):
            scorer.close()
        self.telemetry.close()


@contextmanager
def _of(evaluation: str) -> Iterator[None]:
    """Names the set in the words of what went wrong with it; "" for the run's own."""
    try:
        yield
    except (BadData, BadSpec, RewardFailed) as error:
        if not evaluation:
            raise
        raise type(error)(f"evaluation[{evaluation}]: {error}") from None


RemoteFeed = ray.remote(Feed)
