"""The part of a run that needs the files of a trainer pod but no GPU: prompts, rewards, telemetry."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from rlhf_api.job import EvaluationSpec, RewardSpec, SourceSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadData, BadSpec, RewardFailed, together
from rlhf_worker.feed.logs import DriverLog
from rlhf_worker.pretrained import embedding_rows, load_tokenizer
from rlhf_worker.roll import Member

if TYPE_CHECKING:
    from rlhf_worker.experience import Column, Prompt, Sample, ScoredSample
    from rlhf_worker.feed.rows import Origin
    from rlhf_worker.rewards.scorer import Scorer


class Feed(Member):
    """Created in the first trainer bundle; `open` does the work, so that a failure is the call's and not the actor's.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.driver_logs: dict[int, DriverLog] = {}

    def open(self) -> None:
        """Read the data, start the rewards. Raises BadSpec or BadData, with the words of all that is wrong."""
        from rlhf_worker.feed import telemetry
        from rlhf_worker.rollout.sampling import check_sampling

        tokenizer, vocabulary = load_tokenizer(self.config.model), embedding_rows(self.config.model)
        judging = [spec for spec in self.config.evaluation if spec.rewards]
        with ExitStack() as opened:
            checks: list[Callable[[], Any]] = [
                partial(self._open_rewards, opened, self.config.rewards),
                partial(telemetry.check, self.config.telemetry),
                partial(check_sampling, self.config, tokenizer), partial(self._open_data, tokenizer, vocabulary),
                *(partial(self._open_rewards, opened, spec.rewards or [], spec.name) for spec in judging),
                *(partial(self._evaluation, spec, tokenizer, vocabulary) for spec in self.config.evaluation),
            ]  # fmt: skip
            scorer, _, _, _, *rest = together(checks)
            opened.pop_all()
        self.scorer: Scorer = scorer
        self.judges: dict[str, Scorer] = dict(zip((spec.name for spec in judging), rest, strict=False))
        names = [spec.name for spec in self.config.evaluation]
        self.evaluations: dict[str, list[Prompt]] = dict(zip(names, rest[len(judging) :], strict=True))

    def _open_rewards(self, opened: ExitStack, specs: Sequence[RewardSpec], evaluation: str = "") -> "Scorer":
        from rlhf_worker.rewards.scorer import Scorer

        with _of(evaluation):
            return opened.enter_context(Scorer(specs))

    def _open_data(self, tokenizer: Any, vocabulary: int) -> None:
        from rlhf_worker.feed.data import samplers

        data, sources = self.config.data, self.config.data.sources
        origins = {source.name: self._origin(f"data.sources[{source.name}]", source) for source in sources or ()}
        self.sampler = samplers(data, tokenizer, vocabulary, origins or {"": self._origin("data")})
        if words := self.sampler.check(self.config.trainer.steps * self.config.rollout.prompts_per_step):
            print(words, flush=True)

    def _origin(self, field: str, source: SourceSpec | None = None, of: EvaluationSpec | None = None) -> "Origin":
        """`of`: a set, whose rewards and environment are the run's where it has none of its own."""
        from rlhf_worker.feed.rows import Origin

        rewards, judges = source.rewards if source else None, (of and of.rewards) or self.config.rewards
        sent = any(spec.type == "http" and (source is None or source.judged_by(spec.name)) for spec in judges)
        taken = ("self",) if (of and of.environment) or self.config.rollout.environment else ()
        return Origin(field=field, source=source.name if source else "", rewards=rewards, taken=taken, sent=sent)

    def _evaluation(self, spec: EvaluationSpec, tokenizer: Any, vocabulary: int) -> "list[Prompt]":
        from rlhf_worker.feed.data import sampler

        with _of(spec.name):
            prompts = sampler(spec.data, tokenizer, vocabulary, self._origin("data", of=spec)).first(spec.limit)
        return [replace(prompt, uid=f"{spec.name}:{prompt.row}") for prompt in prompts]

    def begin(self, step: int, sampler: dict[str, Any] | None) -> None:
        """Go on after `step` finished steps. Raises BadData for a state of other data."""
        from rlhf_worker.feed.telemetry import Telemetry

        if sampler is not None:
            self.sampler.restore(sampler)
        self.telemetry = Telemetry(self.config, step + 1)

    def draw(self, again: list[str], count: int) -> "list[Prompt]":
        """`again`: uids of what a run that ended had drawn and not trained; after them the next `count`. Raises
        BadData.
        """
        return [*self.sampler.again(again), *self.sampler.next(count)]

    def draw_evaluation(self, name: str) -> "list[Prompt]":
        """The same prompts each time."""
        return self.evaluations[name]

    def sampler_state(self) -> dict[str, Any]:
        return self.sampler.state()

    def try_rewards(self) -> None:
        """Each reward on a prompt's text of each source and set that it judges, within its own deadlines.

        Raises RewardFailed, BadData, BadSpec.
        """
        from rlhf_worker.experience import NO_TOKENS, Sample

        def groups(prompts: "Sequence[Prompt]", size: int) -> "list[list[Sample]]":
            return [
                [Sample(prompt=prompt, text=prompt.text, finish_reason="stop", **NO_TOKENS)] * size
                for prompt in prompts
            ]

        self.scorer.try_out(groups(self.sampler.first(1), self.config.rollout.samples_per_prompt))
        for spec in self.config.evaluation:
            if judge := self.judges.get(spec.name):
                with _of(spec.name):
                    judge.try_out(groups(self.evaluations[spec.name][:1], spec.samples))

    def score(
        self, samples: "list[Sample]", models: Mapping[str, Sequence[float]] | None = None, judge: str = ""
    ) -> "list[ScoredSample]":
        """Of samples without their tokens. `models`: what rewards of type model gave, by name; `judge`: a set, by name,
        with rewards of its own.

        Raises RewardFailed.
        """
        with _of(judge):
            return (self.judges[judge] if judge else self.scorer).score(samples, models)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.telemetry.log(step, values)

    def record(
        self, step: int, scored: "list[ScoredSample]", advantages: "Sequence[Column] | None" = None,
    ) -> None:
        """Keep the samples of a step, with the advantage of each completion token, or of all of a sample's."""
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
