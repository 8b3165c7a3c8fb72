"""The one producer of what the loop trains: groups of finished, scored samples.

    draw prompts -> engines: samples -> reward models, rewards -> dynamic sampling -> finished groups

With staleness 0 a step's groups are made as one batch while the trainer waits; with more, every group is a call of its
own and they go on while the trainer works. There is no thread: `pump` moves them on whenever the loop waits for
something else, so that calls of the trainer's ranks have one order. What may be under way is `admission`'s; every call
has a deadline. """

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from rlhf_api.job import EvaluationSpec
from rlhf_api.run import RunConfig
from rlhf_worker.algorithm.shape import informative
from rlhf_worker.calls import SLICE_SECONDS, call
from rlhf_worker.crew import Crew
from rlhf_worker.deadlines import work_seconds
from rlhf_worker.errors import BadData, BadSpec, DeadlineExceeded, EngineFailed, RewardFailed
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.rewards.normalization import training_rewards
from rlhf_worker.rollout.admission import Admission, Group
from rlhf_worker.rollout.episode import Request, request_seed
from rlhf_worker.stop import interrupt_if_asked

REDRAWS = 1  # of one prompt: what fails again is left out
LATE_SECONDS = 60.0  # beyond the engine's own deadline, whose error says more


class NoAnswer(DeadlineExceeded):
    """An actor does not even say that it was too slow."""


LOST = (RayActorError, EngineFailed, NoAnswer)  # the engine is no more: it is no verdict on what it was asked for


class _Call:
    """Calls of actors that belong together, and what becomes of their results, or of a failure."""

    def __init__(
        self, refs: list[Any], seconds: float, what: str, then: Callable[[list[Any]], None],
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self.refs, self.what, self.then, self.failed = refs, what, then, failed
        self.waiting = list(refs)
        self.end = time.monotonic() + seconds


class Rollouts:
    """`pending`: uids of a checkpoint's `state`, whose prompts are generated before new ones are drawn."""

    def __init__(self, config: RunConfig, crew: Crew, step: int, pending: Sequence[str] = ()) -> None:
        self.config, self.crew, self._deadline = config, crew, work_seconds(config)
        dynamic, rollout = config.algorithm.dynamic_sampling, config.rollout
        self.admission = Admission(
            rollout.prompts_per_step, rollout.staleness, config.trainer.steps,
            rounds=dynamic.max_rounds if dynamic.enabled else 1, step=step,
        )
        self.metrics: dict[str, float] = {}  # of the groups that were taken last
        self._pending = list(pending)
        self._calls: list[_Call] = []
        self._unscored: list[tuple[Group, list[Sample]]] = []
        self._homeless: list[Group] = []  # no engine is left for them
        self._redrawn: list[Group] = []  # a sample of them failed: they are sampled once more
        self._scoring = 0.0  # when it began; 0: nothing is scored now
        self._load: Counter[ActorHandle] = Counter()  # groups in flight
        self._counts: Counter[str] = Counter()
        self._error: Exception | None = None
        self._evaluating = False

    def take(self) -> list[Group]:
        """The groups of the next step, as soon as they are finished. Raises what kept one from it."""
        self._until(lambda: self.admission.complete)
        dropped, taken = self.admission.dropped, self.admission.take()
        ages = [self.admission.version - group.born for group in taken]
        self.metrics = {
            "rollout/staleness": sum(ages) / len(ages), "rollout/staleness_max": max(ages),
            "rollout/dropped_groups": dropped,
            "rollout/failed_groups": self._counts["failed"], "rollout/left_out_prompts": self._counts["left out"],
            "rollout/retried_groups": self._counts["retried"],
            "rollout/groups_under_way": len(self.admission.pending()), "seconds/score": self._counts["score"] / 1000,
        }  # fmt: skip
        self._counts.clear()
        return taken

    def finish(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """`step` is finished and its weights are in the engines. Returns what a checkpoint of it needs: the sampler's
        state and `pending`.
        """
        self.admission.advance(step)
        state = self._feed("sampler_state"), [*self.admission.pending(), *self._pending]
        if self.config.rollout.staleness:
            self.pump()
        return state

    def pump(self) -> None:
        """Move everything on without waiting. A failure waits for the next `take`."""
        if self._error is None:
            try:
                self._work(0.0)
            except Exception as error:
                self._error = error

    def evaluate(self, spec: EvaluationSpec, prompts: Sequence[Prompt]) -> list[list[ScoredSample]]:
        """Scored samples of each prompt that is not left out; no step trains them. Raises what kept it from them."""
        groups = [Group(prompt, self.admission.version, spec) for prompt in prompts]
        self._dispatch(groups)
        self._evaluating = True
        self._until(lambda: all(group.samples or group.failed > REDRAWS for group in groups))
        self._evaluating = False
        return [group.samples for group in groups if group.samples]

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._error is not None:
                raise self._error
            interrupt_if_asked()
            if self._homeless or self.crew.fleet.short:
                self.crew.fleet.ensure()
                groups, self._homeless = self._homeless, []
                self._dispatch(groups)
            self._work(SLICE_SECONDS)
            if not self._calls and not self._homeless and not done():
                raise RuntimeError("rollouts: nothing is generated or scored, and the step has too few groups: a bug "
                    "of the admission")

    def _work(self, seconds: float) -> None:
        self._admit()
        calls = {ref: one for one in self._calls for ref in one.waiting}
        ray.wait(list(calls), num_returns=1, timeout=seconds)
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        late = [one for one in self._calls if time.monotonic() > one.end]
        for one in dict.fromkeys([*(calls[ref] for ref in done), *late]):
            self._look_at(one)
        self._admit()

    def _look_at(self, one: _Call) -> None:
        done, one.waiting = ray.wait(one.waiting, num_returns=len(one.waiting), timeout=0)
        try:
            ray.get(done)
            if one.waiting and time.monotonic() > one.end:
                raise NoAnswer(f"{one.what}: {len(one.waiting)} of {len(one.refs)} calls did not come back in time")
        except (BadSpec, BadData):
            raise
        except Exception as error:
            self._calls.remove(one)
            if one.failed is None:
                raise
            one.failed(error)
            return
        if not one.waiting:
            self._calls.remove(one)
            one.then(ray.get(one.refs))

    def _admit(self) -> None:
        """Begin as many groups as there is room for; without staleness only when all before them are finished, so that
        batches do not depend on timing.
        """
        if self._redrawn and (self.config.rollout.staleness or not (self._calls or self._unscored or self._homeless)):
            groups, self._redrawn = sorted(self._redrawn, key=lambda group: group.prompt.uid), []
            self._dispatch(groups)
        room = self.admission.room
        if room <= 0 or not (self.config.rollout.staleness or (self.admission.idle and not self._evaluating)):
            return
        first, self._pending = self._pending[:room], self._pending[room:]
        self._dispatch(self.admission.admit(self._feed("draw", first, room - len(first))))

    def _dispatch(
        self, groups: list[Group], tried: frozenset[ActorHandle] = frozenset(), error: Exception | None = None,
    ) -> None:
        """To the engines with the least to do; a group stays on one, for its prefix cache. Raises `error` when every
        living engine was tried.
        """
        engines = [engine for engine in self.crew.fleet.serving if engine not in tried]
        if not engines:
            if error is not None and not isinstance(error, LOST) and self.crew.fleet.serving:
                raise error
            self._homeless += groups
            return
        shares: dict[ActorHandle, list[Group]] = {}
        for group in groups:
            engine = min(engines, key=self._load.__getitem__)
            self._load[engine] += 1
            shares.setdefault(engine, []).append(group)
        for engine, share in shares.items():
            for part in [share] if not self.config.rollout.staleness else [[group] for group in share]:
                self._generate(engine, part, tried)

    def _generate(self, engine: ActorHandle, groups: list[Group], tried: frozenset[ActorHandle]) -> None:
        requests = [request for group in groups for request in self._requests(group)]
        deadline = self.config.rollout.deadline_seconds

        def then(results: list[Any]) -> None:
            self._load[engine] -= len(groups)
            self._generated(groups, results[0])
            if left := [group for group in groups if group.missing]:
                self._late(engine, left, tried, len(requests), sum(sample is not None for sample in results[0]))

        def failed(error: Exception) -> None:
            self._load[engine] -= len(groups)
            if isinstance(error, LOST):
                self.crew.fleet.lost(engine)
            self._counts["retried"] += len(groups)
            print(f"generation: {len(groups)} groups are tried on another engine: {type(error).__name__}: "
                f"{str(error)[-500:]}", flush=True)
            self._dispatch(groups, tried | {engine}, error)

        self._calls.append(
            _Call([engine.generate.remote(requests, deadline)], deadline + LATE_SECONDS, "generation", then, failed)
        )

    def _late(
        self, engine: ActorHandle, groups: list[Group], tried: frozenset[ActorHandle], asked: int, done: int
    ) -> None:
        """What a deadline cut off is drawn again, what was finished is kept. Who finished nothing was tried."""
        error = DeadlineExceeded(
            f"an engine finished {done} of {asked} completions in spec.rollout.deadlineSeconds "
            f"({self.config.rollout.deadline_seconds:g} s): raise it, or lower rollout.maxTokens"
        )
        self._counts["retried"] += len(groups)
        print(f"generation: {len(groups)} groups are drawn again in part: {error}", flush=True)
        self._dispatch(groups, frozenset() if done else tried | {engine}, error)

    def _size(self, group: Group) -> int:
        """Samples of its prompt."""
        return group.evaluation.samples if group.evaluation else self.config.rollout.samples_per_prompt

    def _requests(self, group: Group) -> list[Request]:
        rollout, of, prompt = self.config.rollout, group.evaluation, group.prompt
        given = of or rollout
        tokens = of.max_tokens if of and of.max_tokens else rollout.max_tokens
        group.drawn = group.drawn or [None] * self._size(group)
        start = group.failed * len(group.drawn)  # a group that is sampled anew gets other seeds
        seeds = [
            None if rollout.seed is None else request_seed(rollout.seed, group.born + 1, prompt.uid, start + index)
            for index in group.missing
        ]
        alike = Request(
            prompt=prompt, seed=None, temperature=given.temperature, max_tokens=tokens, sampling=given.sampling,
            trained=of is None, evaluation=of.name if of else "",
        )
        return [replace(alike, seed=seed) for seed in seeds]

    def _generated(self, groups: list[Group], samples: list[Sample | None]) -> None:
        each = iter(samples)
        for group in groups:
            for index in group.missing:
                group.drawn[index] = next(each)
        whole = [group for group in groups if not group.missing]
        self._unscored += [(group, [sample for sample in group.drawn if sample is not None]) for group in whole]
        self._score()

    def _score(self) -> None:
        """What was generated while the last was scored and has one's rewards. Reward models first."""
        judge = _judge(self._unscored[0][0]) if self._unscored else ""
        names = [] if judge else [spec.name for spec in self.config.rewards if spec.type == "model"]
        alone = self.config.engines_sleep and any(
            self.crew.ranks[f"reward:{name}"] == self.crew.policy for name in names
        )
        if self._scoring or not self._unscored or (alone and (self._load.total() or self._homeless)):
            return
        if alone:  # on the engines' GPUs, in the memory that they lend
            self.crew.fleet.sleep()
        groups, self._scoring = [one for one in self._unscored if _judge(one[0]) == judge], time.monotonic()
        self._unscored = [one for one in self._unscored if _judge(one[0]) != judge]
        samples = [sample for _, made in groups for sample in made]
        judged = {name: [sample for sample in samples if sample.prompt.judged_by(name)] for name in names}
        names = [name for name in names if judged[name]]
        calls = [self._ask_model(name, judged[name]) for name in names]
        starts = [sum(map(len, calls[:index])) for index in range(len(calls))]

        def then(results: list[Any]) -> None:
            values = {name: results[start] for name, start in zip(names, starts, strict=True)}
            ref = self.crew.feed.score.remote(samples, values, judge)
            self._calls.append(
                _Call([ref], self._deadline, "rewards", lambda results: self._scored(groups, results[0]))
            )

        if names:
            self._calls.append(_Call([ref for refs in calls for ref in refs], self._deadline, "reward models", then))
        else:
            then([])

    def _ask_model(self, name: str, samples: Sequence[Sample]) -> list[Any]:
        """A call of each rank of a reward model."""
        prompts = [sample.prompt.fields.get("prompt", sample.prompt.text) for sample in samples]
        completions = [sample.text for sample in samples]
        role = f"reward:{name}"
        return [rank.scores.remote(role, prompts, completions) for rank in self.crew.ranks[role]]

    def _scored(self, groups: list[tuple[Group, list[Sample]]], scored: list[ScoredSample]) -> None:
        each = iter(scored)
        self._counts["score"] += round(1000 * (time.monotonic() - self._scoring))
        self._scoring = 0.0
        for group, made in groups:
            items = [self._with_episode(next(each), group.evaluation) for _ in made]
            if failure := next((item.sample.failure for item in items if item.sample.failure), ""):
                self._failed(group, failure)
                continue
            group.samples = items
            if group.evaluation is None:
                rewards = training_rewards(self.config, items, [0] * len(items))
                self.admission.finish(group, informative=informative(rewards))
        self._score()

    def _failed(self, group: Group, failure: str) -> None:
        """The prompt is sampled anew; one that fails again is left out for another. Raises RewardFailed."""
        most, group.failed, group.drawn = self.config.rollout.max_redraws, group.failed + 1, []
        self._counts["failed"] += 1
        if self._counts["failed"] > most:
            raise RewardFailed(f"more than spec.rollout.maxRedraws ({most}) groups of a step failed: {failure}")
        left_out = group.failed > REDRAWS
        then = "left out: it failed before" if left_out else "sampled anew"
        print(f"warning: prompt {group.prompt.uid} is {then}: {failure}", file=sys.stderr, flush=True)
        if not left_out:
            self._redrawn.append(group)
            return
        self._counts["left out"] += 1
        if group.evaluation is None:
            self.admission.leave_out(group)

    def _with_episode(self, item: ScoredSample, of: EvaluationSpec | None) -> ScoredSample:
        """With what the environment gave, as one more part of the sum."""
        spec, value = (of and of.environment) or self.config.rollout.environment, item.sample.episode_reward or 0.0
        if spec is None:
            return item
        return replace(item, reward=item.reward + spec.weight * value, parts={**item.parts, "environment": value})

    def _feed(self, method: str, *args: Any) -> Any:
        return call(self.crew.feed, method, *args, deadline_seconds=self._deadline, what=f"{method} of the feed")


def _judge(group: Group) -> str:
    """Whose rewards score it: an evaluation's, by its name, or the run's."""
    return group.evaluation.name if group.evaluation and group.evaluation.rewards else ""
