"""The training loop, one for every algorithm and for every staleness, in the order of the algorithms' papers.

The loop moves values between actors and decides nothing about placement, engines or files. What a step needs of the
samples before it trains, its advantages and its losses are `algorithm`'s; where the samples come from is `rollout`'s.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from rlhf_api.job import TrainerSpec
from rlhf_api.run import RunConfig
from rlhf_worker.algorithm import custom
from rlhf_worker.algorithm.control import KLController
from rlhf_worker.algorithm.correction import alarm, summary
from rlhf_worker.algorithm.shape import Shaped, passes, shape
from rlhf_worker.best import Best
from rlhf_worker.calls import ask, call, call_all, gather, root_cause
from rlhf_worker.crew import Crew
from rlhf_worker.deadlines import silent_seconds, work_seconds
from rlhf_worker.errors import DeadlineExceeded, EnginesLost, Fenced, LinkBroken, SaveFailed
from rlhf_worker.experience import (
    ScoredSample,
    TrainSequence,
    add_column,
    dealt,
    means,
    mini_batches,
    to_train_sequences,
)
from rlhf_worker.feed.telemetry import PhaseTimer
from rlhf_worker.pace import measured, metrics, of_ranks, speed
from rlhf_worker.progress import Reporter, drained
from rlhf_worker.rewards.normalization import training_rewards
from rlhf_worker.rollout.evaluation import evaluate
from rlhf_worker.rollout.producer import Rollouts
from rlhf_worker.stop import Ended, Stop, Terminated
from rlhf_worker.weights.sync import Synced

UNSAVED = (Fenced, SaveFailed, Ended)  # ends after which a save was refused, was tried, or is wanted by nobody
OF_ENGINES = (DeadlineExceeded, EnginesLost, LinkBroken, RayError)


class Loop:
    """`step` counts finished steps; `sampler` and `memory` are what a checkpoint of the last one holds besides tensors.
    """

    def __init__(self, config: RunConfig, crew: Crew, reporter: Reporter, stop: Stop) -> None:
        self.config = config
        self.crew = crew
        self.reporter = reporter
        self.stop = stop
        self.step = 0
        self.saved_step = -1
        self.kl = KLController(config.algorithm.kl)
        self.advantage = custom.advantage(config)
        self.best = Best(config.checkpoint.best)
        self.trainer = config.trainer  # with a step's budget of a micro-batch, where that is open
        self._deadline = work_seconds(config)
        self._trained_in_part = False  # from a step's first update to its last: the ranks hold no step's weights
        self._step_seconds = 0.0
        self._telling: list[Any] = []
        self._productive = 0.0  # seconds in steps that count: those of the checkpoint resumed from, and those after it

    def begin(self, step: int, memory: dict[str, Any]) -> None:
        """After restore, before the first step: every engine gets the policy's weights, with proof. `memory`: the
        checkpoint's, empty without one.
        """
        self.saved_step = step
        if memory:
            self.kl.restore(memory["kl"])
            self.best.restore(memory)
            self._productive = memory.get("productive_seconds", 0.0)
        self.rollouts = Rollouts(self.config, self.crew, step, memory.get("pending", ()))
        synced = self.crew.fleet.sync(prove=self.config.weight_sync.verify)
        self.reporter.update(state="Training", detail="generating", step=step, synced=synced)
        self.reporter.update(productive_seconds=int(self._productive))
        self._finished(step, 0.0)
        if not step:
            self.best.require(self._evaluate(), evaluated=True)

    def run(self) -> None:
        """To the last step. Raises Terminated when asked to stop, and what else ends it, after saving what may be."""
        try:
            while self.step < self.config.trainer.steps:
                if self.reporter.drain:
                    self._drain()
                self._step()
                self._told_of_saves(wait=False)
                every, last = self.config.checkpoint.every_steps, self.config.trainer.steps
                if self.step % every == 0 or self.step == last or self.best.improved:
                    self._begin_save()
                self.stop.check()
            self.save()
        except Terminated as error:
            self.reporter.update(detail=f"{error}: saving step {self.step}")
            self.save()
            raise
        except Exception as error:
            if lost := self._save_after(error):
                root_cause(error).add_note(lost)
            raise

    def _save_after(self, error: Exception) -> str | None:
        """What ended the run takes no finished step, where the trainer still holds it. Returns what is lost."""
        cause = root_cause(error)
        if isinstance(cause, UNSAVED):
            return None
        self.reporter.update(detail=f"{type(cause).__name__}: saving step {self.step}")
        self.stop.outlive()
        try:
            if not self._trained_in_part:
                self._ask_trainer()
                self.save()
            elif words := self._told_of_saves(wait=True):  # of those before
                return words
        except Exception as failed:
            return f"step {self.step} is not saved: {type(failed).__name__}: {failed}"
        return None if self.step == self.saved_step else f"step {self.step} is not saved: the next had begun to train"

    def _ask_trainer(self) -> None:
        """Returns when every rank is at nothing: it answers in the order of its calls."""
        patience = silent_seconds(self.config)
        call_all(self.crew.savers, "seat", deadline_seconds=patience, what="an answer of the trainer")

    def _step(self) -> None:
        start, timer, number = time.monotonic(), PhaseTimer(), self.step + 1
        self.crew.fleet.loads()  # those of an evaluation are not the step's
        # Until the policy changes, a stop may drop the step: its prompts are drawn again after the restart.
        with self.stop.abandonable():
            # 1. Groups of completions, with their rewards; shared GPUs are the trainer's from here to the sync.
            with self._phase(timer, "generate"):
                scored = [item for group in self.rollouts.take() for item in group.samples]
                if self.config.engines_sleep:
                    self.crew.fleet.sleep()
            self.trainer = self._with_budget()
            with self._phase(timer, "forward"):  # 2. What the algorithm must know of them before it trains.
                given = self.config.trainer
                updates = mini_batches(len(scored), given.updates_per_step, given.epochs, f"{given.seed}/{number}")
                sequences = self._forward(to_train_sequences([item.sample for item in scored]), updates)
            with self._phase(timer, "shape"):  # 3. Advantages, returns, and each token's weight in the loss.
                shaped = self._shape(sequences, scored, updates)
        with self._phase(timer, "train"):  # 4. Optimizer updates: the critic's, then the policy's.
            self._trained_in_part = True
            trained = self._train(number, shaped)
        try:
            with self._phase(timer, "sync"):  # 5. The new weights into the engines.
                synced = self._sync(number)
        except Exception:
            self._finished(number, time.monotonic() - start)  # but for its engines
            raise
        self._finished(number, time.monotonic() - start)  # 6. The step is finished.
        self._report(scored, trained | shaped.metrics | self.rollouts.metrics, synced, timer, time.monotonic() - start)
        if self.config.telemetry.keeps_rollouts(number):
            self._told("record", number, scored, shaped.advantages)
        with self.stop.abandonable():
            self._evaluate()

    @contextmanager
    def _phase(self, timer: PhaseTimer, name: str) -> Iterator[None]:
        with timer.phase(name):
            yield
        self.reporter.active()

    def _sync(self, number: int) -> Synced | None:
        """None when no engine is needed any more: the run is asked to end, or has nothing left to generate."""
        verify = self.config.weight_sync
        try:
            with self.stop.abandonable():
                return self.crew.fleet.sync(prove=verify.verify and number % verify.verify_every_steps == 0)
        except Terminated:
            return None
        except OF_ENGINES as error:
            if number < self.config.trainer.steps or self.config.evaluation:
                raise
            print(f"the last weights did not reach the engines: {root_cause(error)}", file=sys.stderr, flush=True)
            return None

    def _evaluate(self) -> dict[str, float]:
        with self.reporter.bounded():
            values = evaluate(self.config, self.step, self.rollouts.evaluate, self._feed)
        if values:
            self._told("log", self.step, values)
            self.best.observe(values)
        return values

    def _with_budget(self) -> TrainerSpec:
        """What the tightest rank has room for, now that shared GPUs are the trainer's. Padded batches have a fixed one.
        """
        given = self.config.trainer
        if given.tokens_per_micro_batch is not None or self.crew.padded:
            return given
        ranks = list(dict.fromkeys(actor for group in self.crew.ranks.values() for actor in group))
        found = call_all(ranks, "token_budget", deadline_seconds=self._deadline, what="budget of a micro-batch")
        return given.model_copy(update={"tokens_per_micro_batch": min(found)})

    def _forward(self, sequences: list[TrainSequence], updates: list[list[int]]) -> list[TrainSequence]:
        """With a column for each forward pass that the algorithm needs.

        Packed as the first epoch will be trained, so that the first ratio is exactly 1.
        """
        first = updates[: self.config.trainer.updates_per_step]
        roles, asked = passes(self.config.algorithm, len(updates)), {}
        dealings = self._dealt(roles.values(), [[sequences[i].length for i in update] for update in first])
        given = ray.put(sequences) if roles else None
        for column, role in roles.items():
            batches = [
                [[numbers[i] for i in batch] for numbers, update in zip(first, rank, strict=True) for batch in update]
                for rank in dealings[role]
            ]
            what = ("values",) if role == "critic" else ("logprobs", role)
            asked[column] = ask(self.crew.ranks[role], *what, given, arguments=batches)
        for column, found in self._answers("forward passes", asked).items():
            sequences = add_column(sequences, column, found)
        return sequences

    def _shape(self, sequences: list[TrainSequence], scored: list[ScoredSample], updates: list[list[int]]) -> Shaped:
        rollout = self.config.rollout
        groups = [index // rollout.samples_per_prompt for index in range(len(scored))]
        rewards = training_rewards(self.config, scored, groups)
        names = dict.fromkeys(name for item in scored for name in item.parts)
        parts = {name: [item.judged.get(name, math.nan) for item in scored] for name in names}
        return shape(
            self.config.algorithm, self.kl.coefficient, sequences, rewards, groups, updates=updates,
            max_tokens=rollout.max_tokens, parts=parts, custom=self.advantage,
        )  # fmt: skip

    def _train(self, number: int, shaped: Shaped) -> dict[str, float]:
        """Metrics by their full names. The policy waits until the critic is warm."""
        critic = self.config.critic
        roles = [
            *(["critic"] if critic else []), *(["policy"] if critic is None or number > critic.warmup_steps else [])
        ]
        dealings, given = self._dealt(roles, [[s.length for s in u] for u in shaped.updates]), ray.put(shaped.updates)
        asked = {role: ask(self.crew.ranks[role], "train", role, given, arguments=dealings[role]) for role in roles}
        made = {role: answers[0] for role, answers in self._answers("training", asked).items()}
        found = {f"critic/{name}": value for name, value in made.get("critic", {}).items()}
        if "policy" in made:
            policy = summary(made["policy"])
            self.kl.observe(policy.get("kl", 0.0), len(shaped.advantages))
            found |= {name if "/" in name else f"train/{name}": value for name, value in policy.items()}
            if words := alarm(self.config.algorithm.correction, policy):
                print(f"step {number}: {words}", file=sys.stderr, flush=True)
        return found

    def _dealt(
        self, roles: Iterable[str], updates: Sequence[Sequence[int]],
    ) -> dict[str, list[list[list[list[int]]]]]:
        """[rank][update][micro-batch][number of a sequence in its update] for each role's ranks; as many micro-batches
        on every rank. Roles of as many ranks share theirs. `updates`: lengths of sequences, in tokens.
        """
        ranks = {role: len(self.crew.ranks[role]) for role in roles}
        deal = partial(dealt, spec=self.trainer, padded=self.crew.padded)
        dealings = {count: [deal(lengths, count) for lengths in updates] for count in set(ranks.values())}
        return {
            role: [[update[rank] for update in dealings[count]] for rank in range(count)]
            for role, count in ranks.items()
        }

    def _answers(self, what: str, asked: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Of every rank that was asked. Roles with GPUs of their own work side by side, and generation goes on
        meanwhile.
        """
        calls = [one for group in asked.values() for one in group]
        answers = iter(gather(calls, self._deadline, f"{what} ({', '.join(asked)})", self.rollouts.pump))
        return {name: [next(answers) for _ in group] for name, group in asked.items()}

    def _finished(self, number: int, seconds: float) -> None:
        self.sampler, pending = self.rollouts.finish(number)
        self._productive += seconds
        self.step = number
        self.best.finished()
        self.memory = {"pending": pending, "kl": self.kl.state(), "productive_seconds": round(self._productive, 1)}
        self._trained_in_part = False

    def save(self) -> None:
        """A whole checkpoint of the last finished step is there when this returns, and what the feed was told of it.
        Raises SaveFailed.
        """
        self._begin_save()
        if error := self._told_of_saves(wait=True):
            raise SaveFailed(error)
        gather(self._telling, self._deadline, "telemetry")

    def _begin_save(self) -> None:
        """Unless it is there already, or being written. Training goes on while it is written, and when that fails: the
        next one may not.
        """
        if self.step != self.saved_step:
            given = self.step, self.sampler, self.memory | self.best.saved()
            with self.reporter.bounded():
                call_all(self.crew.savers, "save", *given, deadline_seconds=self._deadline, what="checkpoint")
            self.saved_step = self.step

    def _told_of_saves(self, *, wait: bool) -> str | None:
        """Report the saves that have ended. Returns the error of the last of them."""
        error = None
        # Every rank is asked: one that died ends the wait for the others, which would last as long as a collective's.
        savers, what = self.crew.savers, "end of a checkpoint"
        with self.reporter.bounded():
            outcomes = call_all(savers, "saved", wait, deadline_seconds=self._deadline, what=what)[0]
        for outcome in outcomes:
            error = f"no checkpoint of step {outcome.step}: {outcome.error}" if outcome.error else None
            if error:
                self.saved_step = -1
                self.reporter.update(save_error=error[:1000])
                print(error, file=sys.stderr, flush=True)
            else:
                self.reporter.saved(outcome.step, outcome.path)
        return error

    def _drain(self) -> None:
        """Save, and wait to be ended; or go on if the suspension is taken back, or refused."""
        self.reporter.update(state="Draining", detail="saving")
        self.save()
        drained(self.reporter, self.stop, "saved")
        self.reporter.update(state="Training", detail="generating")

    def _report(
        self, scored: list[ScoredSample], values: dict[str, float], synced: Synced | None, timer: PhaseTimer,
        seconds: float,
    ) -> None:
        values = values | step_metrics(scored, timer.seconds, seconds) | {"seconds/productive": self._productive}
        pace = measured(self.config, values, self.crew.fleet.loads())
        values = {name: value for name, value in values.items() if not of_ranks(name)} | metrics(pace)
        if synced:
            values["sync/seconds"] = synced.seconds
        if synced and pace.weights:
            values["sync/gigabytes_per_second"] = pace.weights / synced.seconds / 1e9
        if self.trainer.tokens_per_micro_batch:
            values["train/tokens_per_micro_batch"] = float(self.trainer.tokens_per_micro_batch)
        if self.config.data.overlong_prompts == "drop":
            values["data/dropped_prompts"] = float(self.sampler["dropped"])
        self._told("log", self.step, values)
        self.best.observe(values)
        critic = self.config.critic
        if self.step == 1 + (critic.warmup_steps if critic else 0):  # the first with all of its metrics
            self.best.require({**dict.fromkeys(of_sources(self.config), math.nan), **values}, evaluated=False)
        self._step_seconds = seconds if not self._step_seconds else 0.8 * self._step_seconds + 0.2 * seconds
        left = int(self._step_seconds * (self.config.trainer.steps - self.step))
        self.reporter.stepped(self.step, values, speed(pace, self.config), eta_seconds=left, synced=synced)

    def _feed(self, method: str, *args: Any) -> Any:
        return call(self.crew.feed, method, *args, deadline_seconds=self._deadline, what=f"{method} of the feed")

    def _told(self, method: str, *args: Any) -> None:
        """The feed, which is not waited for but with the next thing that it is told."""
        gather(self._telling, self._deadline, "telemetry")
        self._telling = [getattr(self.crew.feed, method).remote(*args)]


def step_metrics(scored: list[ScoredSample], phases: dict[str, float], seconds: float) -> dict[str, float]:
    """What telemetry gets of a step's samples, and the status a part of. Lengths in tokens, times in seconds."""
    count = len(scored)
    rewards = torch.tensor([item.reward for item in scored])
    tokens = sum(item.sample.targets for item in scored)
    cut = sum(item.sample.finish_reason == "length" for item in scored)
    return {
        "reward/mean": rewards.mean().item(), "reward/std": rewards.std(correction=0).item(),
        **{f"reward/{name}": value for name, value in means(item.judged for item in scored).items()},
        **{f"reward/{name}": value for name, value in means(item.metrics for item in scored).items()},
        "rollout/length": tokens / count, "rollout/truncated": cut / count,
        "rollout/tokens_per_second": tokens / seconds,
        **{f"seconds/{name}": value for name, value in phases.items()}, "seconds/step": seconds,
        **source_metrics(scored),
    }  # fmt: skip


def of_sources(config: RunConfig) -> list[str]:
    """Names of metrics that a step lacks which draws no prompt of their source."""
    names = [f"reward/{reward.name}" for reward in config.rewards]
    for source in config.data.sources or ():
        judges = [reward.name for reward in config.rewards if source.judged_by(reward.name)]
        names += [f"source/{source.name}/{name}" for name in (*judges, "mean", "mean_length", "sample_share")]
    return names


def source_metrics(scored: Sequence[ScoredSample]) -> dict[str, float]:
    """source/<name>/...: means of the reward, of each one that judges it, and of tokens; share of the samples."""
    groups: dict[str, list[ScoredSample]] = {}
    for item in scored:
        groups.setdefault(item.sample.prompt.source, []).append(item)
    values = {source: _of_source(items, len(scored)) for source, items in groups.items() if source}
    return {f"source/{source}/{name}": value for source, named in values.items() for name, value in named.items()}


def _of_source(items: Sequence[ScoredSample], samples: int) -> dict[str, float]:
    return {
        **means(item.judged for item in items),
        "mean": fmean(item.reward for item in items), "mean_length": fmean(item.sample.targets for item in items),
        "sample_share": len(items) / samples,
    }  # fmt: skip
