"""The one producer of what the loop trains: groups of finished, scored samples.

    draw prompts -> engines: samples -> reward models, rewards -> dynamic sampling -> finished groups

With staleness 0 a step's groups are made as one batch while the trainer waits; with more, every group is a call of its own and
they go on while the trainer works. There is no thread: `pump` moves them on whenever the loop waits for something else, so that
calls of the trainer's ranks have one order. What may be under way is `admission`'s; every call has a deadline.
"""

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
from rlhf_worker.errors import BadData, BadSpec, DeadlineExceeded, EngineFailed
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.rollout.admission import Admission, Group
from rlhf_worker.rollout.episode import Request, request_seed
from rlhf_worker.stop import interrupt_if_asked

LATE_SECONDS = 60.0  # beyond the engine's own deadline, whose error says more


class NoAnswer(DeadlineExceeded):
    """An actor does not even say that it was too slow."""


LOST = (RayActorError, EngineFailed, NoAnswer)  # the engine is no more: it is no verdict on what it was asked for


class _Call:
    """Calls of actors that belong together, and what becomes of their results, or of a failure."""

    def __init__(self, refs: list[Any], seconds: float, what: str, then: Callable[[list[Any]], None], failed: Callable[[Exception], None] | None = None) -> None:
        self.refs, self.what, self.then, self.failed = refs, what, then, failed
        self.waiting = list(refs)
        self.end = time.monotonic() + seconds


class Rollouts:
    """`pending`: uids of a checkpoint's `state`, whose prompts are generated before new ones are drawn."""

    def __init__(self, config: RunConfig, crew: Crew, step: int, pending: Sequence[str] = ()) -> None:
        self.config, self.crew, self._deadline = config, crew, work_seconds(config)
        dynamic, rollout = config.algorithm.dynamic_sampling, config.rollout
        self.admission = Admission(rollout.prompts_per_step, rollout.staleness, config.trainer.steps, rounds=dynamic.max_rounds if dynamic.enabled else 1, step=step)
        self.metrics: dict[str, float] = {}  # of the groups that were taken last
        self._pending = list(pending)
        self._calls: list[_Call] = []
        self._unscored: list[tuple[Group, list[Sample]]] = []
        self._homeless: list[Group] = []  # no engine is left for them
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
            "rollout/staleness": sum(ages) / len(ages), "rollout/staleness_max": max(ages), "rollout/dropped_groups": dropped,
            "rollout/retried_groups": self._counts["retried"], "rollout/groups_under_way": len(self.admission.pending()), "seconds/score": self._counts["score"] / 1000,
        }  # fmt: skip
        self._counts.clear()
        return taken

    def finish(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """`step` is finished and its weights are in the engines. Returns what a checkpoint of it needs: the sampler's state and `pending`."""
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
        """Scored samples of each prompt, which no step trains. Raises what kept one from being finished."""
        groups = [Group(prompt, self.admission.version, spec) for prompt in prompts]
        self._dispatch(groups)
        self._evaluating = True
        self._until(lambda: all(group.samples for group in groups))
        self._evaluating = False
        return [group.samples for group in groups]

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
                raise RuntimeError("rollouts: nothing is generated or scored, and the step has too few groups: a bug of the admission")

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
        """Begin as many groups as there is room for; without staleness only when all before them are finished, so that batches do not depend on timing."""
        room = self.admission.room
        if room <= 0 or not (self.config.rollout.staleness or (self.admission.idle and not self._evaluating)):
            return
        first, self._pending = self._pending[:room], self._pending[room:]
        self._dispatch(self.admission.admit(self._feed("draw", first, room - len(first))))

    def _dispatch(self, groups: list[Group], tried: frozenset[ActorHandle] = frozenset(), error: Exception | None = None) -> None:
        """To the engines with the least to do; a group stays on one, for its prefix cache. Raises `error` when every living engine was tried."""
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
            print(f"generation: {len(groups)} groups are tried on another engine: {type(error).__name__}: {str(error)[-500:]}", flush=True)
            self._dispatch(groups, tried | {engine}, error)

        self._calls.append(_Call([engine.generate.remote(requests, deadline)], deadline + LATE_SECONDS, "generation", then, failed))

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
        temperature = of.temperature if of else rollout.temperature
        tokens = of.max_tokens if of and of.max_tokens else rollout.max_tokens
        group.drawn = group.drawn or [None] * self._size(group)
        seeds = [
            None if rollout.seed is None else request_seed(rollout.seed, group.born + 1, prompt.uid, index)
            for index in group.missing
        ]
        return [Request(prompt=prompt, seed=seed, temperature=temperature, max_tokens=tokens) for seed in seeds]

    def _generated(self, groups: list[Group], samples: list[Sample | None]) -> None:
        each = iter(samples)
        for group in groups:
            for index in group.missing:
                group.drawn[index] = next(each)
        whole = [group for group in groups if not group.missing]
        self._unscored += [(group, [sample for sample in group.drawn if sample is not None]) for group in whole]
        self._score()

    def _score(self) -> None:
        """Everything that was generated while the last was scored. Reward models first: they are the trainer's ranks."""
        names = [spec.name for spec in self.config.rewards if spec.type == "model"]
        alone = self.config.engines_sleep and any(self.crew.ranks[f"reward:{name}"] == self.crew.policy for name in names)
        if self._scoring or not self._unscored or (alone and (self._load.total() or self._homeless)):
            return
        if alone:  # on the engines' GPUs, in the memory that they lend
            self.crew.fleet.sleep()
        groups, self._unscored, self._scoring = self._unscored, [], time.monotonic()
        samples = [sample for _, made in groups for sample in made]
        prompts, completions = [sample.prompt.fields.get("prompt", sample.prompt.text) for sample in samples], [sample.text for sample in samples]
        calls = [[rank.scores.remote(f"reward:{name}", prompts, completions) for rank in self.crew.ranks[f"reward:{name}"]] for name in names]
        starts = [sum(map(len, calls[:index])) for index in range(len(calls))]

        def then(results: list[Any]) -> None:
            values = {name: results[start] for name, start in zip(names, starts, strict=True)}
            ref = self.crew.feed.score.remote(samples, values)
            self._calls.append(
                _Call([ref], self._deadline, "rewards", lambda results: self._scored(groups, results[0]))
            )

        if names:
            self._calls.append(_Call([ref for refs in calls for ref in refs], self._deadline, "reward models", then))
        else:
            then([])

    def _scored(self, groups: list[tuple[Group, list[Sample]]], scored: list[ScoredSample]) -> None:
        each = iter(scored)
        self._counts["score"] += round(1000 * (time.monotonic() - self._scoring))
        self._scoring = 0.0
        for group, made in groups:
            group.samples = [self._with_episode(next(each)) for _ in made]
            if group.evaluation is None:
                self.admission.finish(group, informative=informative([item.reward for item in group.samples]))
        self._score()

    def _with_episode(self, item: ScoredSample) -> ScoredSample:
        """With what the environment gave, as one more part of the sum."""
        spec, value = self.config.rollout.environment, item.sample.episode_reward or 0.0
        if spec is None:
            return item
        return replace(item, reward=item.reward + spec.weight * value, parts={**item.parts, "environment": value})

    def _feed(self, method: str, *args: Any) -> Any:
        return call(self.crew.feed, method, *args, deadline_seconds=self._deadline, what=f"{method} of the feed")
