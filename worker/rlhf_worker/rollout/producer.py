"""The one producer of what the loop trains: groups of finished, scored samples.

    draw prompts -> engines: samples -> reward models, rewards -> dynamic sampling -> finished groups

Groups wait in one queue, from which each engine gets as many as keep it full; a finished one is scored while others are
made. With staleness 0 the engines then rest while the trainer works, and with over-sampling what they had not finished
goes on in the next step; with more they work on. There is no thread: `pump` moves all on whenever the loop waits for
something else, so that calls of the trainer's ranks have one order. What may be under way is `admission`'s; every call
has a deadline. """

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
AHEAD = 2  # of what an engine computes at once: so much it is given, that no round trip starves it
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
        self.results: dict[Any, Any] = {}
        self.end = time.monotonic() + seconds

    @property
    def waiting(self) -> list[Any]:
        return [ref for ref in self.refs if ref not in self.results]


class Rollouts:
    """`pending`: uids of a checkpoint's `state`, whose prompts are generated before new ones are drawn."""

    def __init__(self, config: RunConfig, crew: Crew, step: int, pending: Sequence[str] = ()) -> None:
        self.config, self.crew, self._deadline = config, crew, work_seconds(config)
        dynamic, rollout = config.algorithm.dynamic_sampling, config.rollout
        self.admission = Admission(
            rollout.prompts_per_step, rollout.staleness, config.trainer.steps,
            rounds=dynamic.max_rounds if dynamic.enabled else 1, step=step,
            ahead=math.ceil((rollout.over_sampling - 1) * rollout.prompts_per_step),
        )
        # Groups begin whenever there is room; else all at once, so that batches do not depend on timing.
        self._free = bool(rollout.staleness or self.admission.ahead)
        self.metrics: dict[str, float] = {}  # of the groups that were taken last
        self._pending = list(pending)
        self._calls: list[_Call] = []
        self._unscored: list[tuple[Group, list[Sample]]] = []
        self._queue: list[Group] = []  # wait for an engine
        self._resting = False  # the trainer works, and the engines do not
        self._redrawn: list[Group] = []  # a sample of them failed: they are sampled once more
        self._informative: dict[Group, bool] = {}  # of groups that are scored
        self._scoring = 0.0  # when it began; 0: nothing is scored now
        self._load: Counter[ActorHandle] = Counter()  # completions in flight
        self._counts: Counter[str] = Counter()
        self._error: Exception | None = None
        self._evaluating = False

    def take(self) -> list[Group]:
        """The groups of the next step, as soon as they are finished. Raises what kept one from it."""
        self._until(lambda: self.admission.complete)
        self._rest()
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
        self._resting = False
        state = self._feed("sampler_state"), [*self.admission.pending(), *self._pending]
        if self._free:
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
        self._queue += groups
        rested, self._resting, self._evaluating = self._resting, False, True
        self._until(lambda: all(group.samples or group.failed > REDRAWS for group in groups))
        self._evaluating = False
        if rested:
            self._rest()
        return [group.samples for group in groups if group.samples]

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._error is not None:
                raise self._error
            interrupt_if_asked()
            if (stranded := self._stranded()) or self.crew.fleet.short:
                self.crew.fleet.ensure()
                for group in stranded:
                    group.tried.clear()
            self._work(SLICE_SECONDS)
            if not self._calls and not self._queue and not done():
                raise RuntimeError("rollouts: nothing is generated or scored, and the step has too few groups: a bug "
                    "of the admission")

    def _stranded(self) -> list[Group]:
        """Groups that no engine is left for."""
        return [group for group in self._queue if group.tried.issuperset(self.crew.fleet.serving)]

    def _rest(self) -> None:
        """Without staleness: no engine is at work any more. What over-sampling began waits for the next step."""
        self._resting = not self.config.rollout.staleness
        while self._resting and (busy := [engine for engine, load in self._load.items() if load]):
            # Until nothing is left: a call may have been on its way.
            asked = [engine.interrupt.remote() for engine in busy]
            self._calls.append(cut := _Call(asked, self._deadline, "interrupt", lambda _: None, _told))
            self._until(partial(lambda cut: cut not in self._calls or not self._load.total(), cut))

    def _work(self, seconds: float) -> None:
        self._admit()
        calls = {ref: one for one in self._calls for ref in one.waiting}
        ray.wait(list(calls), num_returns=1, timeout=seconds)
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        found: dict[_Call, list[Any]] = {one: [] for one in self._calls if time.monotonic() > one.end}
        for ref in done:
            found.setdefault(calls[ref], []).append(ref)
        for one, refs in found.items():
            self._look_at(one, refs)
        self._admit()

    def _look_at(self, one: _Call, done: list[Any]) -> None:
        try:
            one.results |= {ref: ray.get(ref) for ref in done}
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
            one.then([one.results[ref] for ref in one.refs])

    def _admit(self) -> None:
        """Begin as many groups as there is room for, if none rests; where timing must not matter, only when all before
        them are finished. Then hand out.
        """
        if self._resting:
            return
        if self._redrawn and (self._free or not (self._calls or self._unscored or self._queue)):
            self._queue += sorted(self._redrawn, key=lambda group: group.prompt.uid)
            self._redrawn = []
        room = self.admission.room
        if room > 0 and (self._free or (self.admission.idle and not self._evaluating)):
            first, self._pending = self._pending[:room], self._pending[room:]
            self._queue += self.admission.admit(self._feed("draw", first, room - len(first)))
        self._hand_out()

    def _hand_out(self) -> None:
        """To the engines with the least to do, as long as they want more; a group stays on one, for its prefix cache.

        Where timing must not matter, what an idle engine gets begins together.
        """
        shares: dict[ActorHandle, list[Group]] = {}
        left, serving = list[Group](), self.crew.fleet.serving
        most = AHEAD * self.crew.fleet.slots if len(serving) > 1 else math.inf
        idle = [engine for engine in serving if not self._load[engine]]
        for group in self._queue:
            open_ = [engine for engine in serving if engine not in group.tried and self._load[engine] < most]
            if not open_:
                left.append(group)
                continue
            engine = min(open_, key=self._load.__getitem__)
            self._load[engine] += self._size(group)
            shares.setdefault(engine, []).append(group)
        self._queue = left
        hf = self.config.rollout.engine == "hf"
        for engine, share in shares.items():
            for place, part in enumerate([share] if hf else [[group] for group in share]):
                together = (place, len(share)) if engine in idle and not self._free and not hf else None
                self._generate(engine, part, together)

    def _generate(self, engine: ActorHandle, groups: list[Group], place: tuple[int, int] | None) -> None:
        requests = [request for group in groups for request in self._requests(group)]
        load, deadline = sum(map(self._size, groups)), self.config.rollout.deadline_seconds

        def then(results: list[Any]) -> None:
            self._load[engine] -= load
            self._generated(groups, results[0])

        def failed(error: Exception) -> None:
            self._load[engine] -= load
            if isinstance(error, LOST):
                self.crew.fleet.lost(engine)
            self._again(groups, f"on another engine: {type(error).__name__}: {str(error)[-500:]}")
            for group in groups:
                group.tried.add(engine)
            serving = self.crew.fleet.serving
            if serving and not isinstance(error, LOST) and any(group.tried.issuperset(serving) for group in groups):
                raise error

        given = (requests, deadline, place) if place else (requests, deadline)
        self._calls.append(
            _Call([engine.generate.remote(*given)], deadline + LATE_SECONDS, "generation", then, failed)
        )

    def _again(self, groups: list[Group], how: str) -> None:
        self._counts["retried"] += len(groups)
        print(f"generation: {len(groups)} groups are drawn again {how}", flush=True)
        self._queue = [*groups, *self._queue]

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
        begun = [group.drawn[index] for index in group.missing]
        return [replace(alike, seed=seed, begun=sample) for seed, sample in zip(seeds, begun, strict=True)]

    def _generated(self, groups: list[Group], samples: list[Sample | None]) -> None:
        each = iter(samples)
        for group in groups:
            for index in group.missing:  # what the deadline cut off may have been begun in an earlier step
                group.drawn[index] = next(each) or group.drawn[index]
        self._unscored += [(group, [one for one in group.drawn if one]) for group in groups if not group.missing]
        left = [group for group in groups if group.missing]
        if None in samples:
            self._again(left, "in part: spec.rollout.deadlineSeconds "
                f"({self.config.rollout.deadline_seconds:g}) cut them off: raise it, or lower rollout.maxTokens")
        else:  # interrupted
            self._queue = [*left, *self._queue]
        self._score()

    def _score(self) -> None:
        """What was generated while the last was scored and has one's rewards. Reward models first."""
        judge = _judge(self._unscored[0][0]) if self._unscored else ""
        names = [] if judge else [spec.name for spec in self.config.rewards if spec.type == "model"]
        alone = self.config.engines_sleep and any(
            self.crew.ranks[f"reward:{name}"] == self.crew.policy for name in names
        )
        whole = names and not self._free  # so that their batches do not depend on timing
        if self._scoring or not self._unscored or (whole and (self._load.total() or self._queue)):
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
            read = [replace(group.prompt, token_ids=[]) for group, _ in groups]
            texts = [sample.without_tokens(p) for p, (_, made) in zip(read, groups, strict=True) for sample in made]
            ref = self.crew.feed.score.remote(texts, values, judge)
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
            items = [self._with_episode(_whole(next(each), sample), group.evaluation) for sample in made]
            if failure := next((item.sample.failure for item in items if item.sample.failure), ""):
                self._failed(group, failure)
                continue
            group.samples = items
            if group.evaluation is None:
                self._informative[group] = informative(training_rewards(self.config, items, [0] * len(items)))
        # Where timing must not matter, in the order of their begin: after the last round the later ones are kept.
        for group in self.admission.open:
            if group in self._informative:
                self.admission.finish(group, informative=self._informative.pop(group))
            elif not self._free:
                break
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


def _whole(item: ScoredSample, sample: Sample) -> ScoredSample:
    """What was scored without its tokens, with them."""
    return replace(item, sample=replace(sample, failure=item.sample.failure))


def _told(error: Exception) -> None:
    print(f"generation: no interrupt: {type(error).__name__}: {str(error)[-500:]}", file=sys.stderr, flush=True)


def _judge(group: Group) -> str:
    """Whose rewards score it: an evaluation's, by its name, or the run's."""
    return group.evaluation.name if group.evaluation and group.evaluation.rewards else ""
