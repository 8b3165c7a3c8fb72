"""The training loop: synchronous GRPO (arXiv 2402.03300), in the order of its algorithm.

The loop moves values between actors and decides nothing about placement, engines or files.
"""

import sys
import time
from typing import Any

import torch

from rlhf_api.run import RunConfig
from rlhf_worker.actors.engine import Completion, Request, request_seed
from rlhf_worker.actors.group import call, call_all, call_each, gather
from rlhf_worker.algorithm.correction import summary
from rlhf_worker.algorithm.shape import Shaped, passes, shape
from rlhf_worker.crew import Crew
from rlhf_worker.errors import SaveFailed
from rlhf_worker.experience import (
    PackedBatch,
    Prompt,
    Sample,
    ScoredSample,
    TrainSequence,
    add_column,
    chunks,
    equalise,
    pack,
    split,
    to_train_sequences,
)
from rlhf_worker.progress import Reporter
from rlhf_worker.stop import Stop, Terminated
from rlhf_worker.telemetry import PhaseTimer
from rlhf_worker.weights.sync import Synced

TRAIN_DEADLINE_SECONDS = 7200.0
FILE_DEADLINE_SECONDS = 3600.0
SCORE_DEADLINE_SECONDS = 7200.0
LATE_SECONDS = 60.0  # beyond the engine's own deadline, whose error says more


class Loop:
    """`step` counts finished steps; everything else that lasts lives in the actors."""

    def __init__(self, config: RunConfig, crew: Crew, reporter: Reporter, stop: Stop) -> None:
        self.config = config
        self.crew = crew
        self.reporter = reporter
        self.stop = stop
        self.step = 0
        self.saved_step = -1
        self.sampler: dict[str, Any] = {}
        self._step_seconds = 0.0

    def begin(self, step: int) -> None:
        """After restore, before the first step: every engine gets the policy's weights, with proof."""
        self.step = self.saved_step = step
        self.sampler = self._feed("sampler_state")
        synced = self.crew.sync(prove=self.config.weight_sync.verify)
        self.reporter.update(state="Training", detail="generating", step=step, synced=synced)

    def run(self) -> None:
        """To the last step. Raises Terminated, after saving, when asked to stop."""
        try:
            while self.step < self.config.trainer.steps:
                self._step()
                self._told_of_saves(wait=False)
                if self.step % self.config.checkpoint.every_steps == 0 or self.step == self.config.trainer.steps:
                    self._begin_save()
                if self.reporter.suspended:
                    self._drain()
                self.stop.check()
            self.save()
        except Terminated:
            self.save()
            raise

    def _step(self) -> None:
        start, timer, number = time.monotonic(), PhaseTimer(), self.step + 1
        # Until the policy changes, a stop may drop the step: its prompts are drawn again after the restart.
        with self.stop.abandonable():
            with timer.phase("draw"):  # 1. prompts of this step
                prompts = self._feed("draw", self.config.rollout.prompts_per_step)
            with timer.phase("generate"):  # 2. a group of completions for each
                samples = self._generate(prompts, number)
            with timer.phase("score"):  # 3. rewards
                scored = self._feed("score", samples, deadline_seconds=SCORE_DEADLINE_SECONDS)
            with timer.phase("forward"):  # 4. what the algorithm must know of the samples before it trains
                sequences = self._forward(to_train_sequences(samples))
        with timer.phase("pack"):  # 5. advantages and weights, 6. packed micro-batches for each rank and update
            shaped = self._shape(sequences, scored)
            batches = self._batches(shaped.updates)
        self._sleep()
        with timer.phase("train"):  # 7. optimizer updates
            trained = call_each(self.crew.policy, "train", "policy", arguments=batches, deadline_seconds=TRAIN_DEADLINE_SECONDS, what="training")[0]
        with timer.phase("sync"):  # 8. the new weights into the engines
            synced = self._sync(number)
        self.step, self.sampler = number, self._feed("sampler_state")  # 9. the step is finished
        self._report(scored, trained | shaped.metrics, synced, timer, time.monotonic() - start)

    def _generate(self, prompts: list[Prompt], number: int) -> list[Sample]:
        """samples_per_prompt completions of each prompt, grouped by prompt. A prompt's group stays on one engine, for its prefix cache."""
        rollout, engines = self.config.rollout, self.crew.engines
        shares = [range(index, len(prompts), len(engines)) for index in range(len(engines))]
        requests = [[self._request(prompts[p], number, k) for p in share for k in range(rollout.samples_per_prompt)] for share in shares]
        calls = [engine.generate.remote(own, rollout.deadline_seconds) for engine, own in zip(engines, requests, strict=True)]
        results = gather(calls, rollout.deadline_seconds + LATE_SECONDS, "generation")
        groups: dict[int, list[Completion]] = {}
        for share, completions in zip(shares, results, strict=True):
            for position, p in enumerate(share):
                groups[p] = completions[position * rollout.samples_per_prompt : (position + 1) * rollout.samples_per_prompt]
        return [_sample(prompt, made) for p, prompt in enumerate(prompts) for made in groups[p]]

    def _request(self, prompt: Prompt, number: int, index: int) -> Request:
        seed = self.config.rollout.seed
        return Request(prompt.token_ids, None if seed is None else request_seed(seed, number, prompt.uid, index))

    def _forward(self, sequences: list[TrainSequence]) -> list[TrainSequence]:
        """With a column for each forward pass that the algorithm needs. Packed as they will be trained, so that the first ratio is exactly 1."""
        updates = self.config.trainer.updates_per_step
        for column, role in passes(self.config.algorithm, updates).items():
            ranks = [[batch for update in rank for batch in update] for rank in self._batches(chunks(sequences, updates))]
            found = call_each(self.crew.ranks[role], "logprobs", role, arguments=ranks, deadline_seconds=TRAIN_DEADLINE_SECONDS, what=f"log probabilities of the {role}")
            sequences = add_column(sequences, column, found)
        return sequences

    def _shape(self, sequences: list[TrainSequence], scored: list[ScoredSample]) -> Shaped:
        rollout, algorithm = self.config.rollout, self.config.algorithm
        groups = [index // rollout.samples_per_prompt for index in range(len(scored))]
        rewards = [item.reward for item in scored]
        updates = self.config.trainer.updates_per_step
        return shape(algorithm, algorithm.kl.coefficient, sequences, rewards, groups, updates=updates, max_tokens=rollout.max_tokens)

    def _batches(self, updates: list[list[TrainSequence]]) -> list[list[list[PackedBatch]]]:
        """[rank][update][micro-batch]; as many micro-batches on every rank."""
        ranks, budget = len(self.crew.policy), self.config.trainer.tokens_per_micro_batch
        packed = [equalise([pack(own, budget) for own in split(part, ranks)]) for part in updates]
        return [[update[rank] for update in packed] for rank in range(ranks)]

    def _sleep(self) -> None:
        if self.crew.sleeps:
            self._engines("sleep")

    def _sync(self, number: int) -> Synced:
        verify = self.config.weight_sync
        if self.crew.sleeps:
            self._engines("wake", ["weights"])
        synced = self.crew.sync(prove=verify.verify and number % verify.verify_every_steps == 0)
        if self.crew.sleeps:
            self._engines("wake", ["kv_cache", "scheduling"])
        return synced

    def save(self) -> None:
        """A whole checkpoint of the last finished step is there when this returns. Raises SaveFailed."""
        self._begin_save()
        if error := self._told_of_saves(wait=True):
            raise SaveFailed(error)

    def _begin_save(self) -> None:
        """Unless it is there already, or being written. Training goes on while it is written, and when that fails: the next one may not."""
        if self.step != self.saved_step:
            call_all(self.crew.savers, "save", self.step, self.sampler, {}, deadline_seconds=FILE_DEADLINE_SECONDS, what="checkpoint")
            self.saved_step = self.step

    def _told_of_saves(self, *, wait: bool) -> str | None:
        """Report the saves that have ended. Returns the error of the last of them."""
        error = None
        for outcome in call(self.crew.policy[0], "saved", wait, deadline_seconds=FILE_DEADLINE_SECONDS, what="end of a checkpoint"):
            error = f"no checkpoint of step {outcome.step}: {outcome.error}" if outcome.error else None
            if error:
                self.saved_step = -1
                self.reporter.update(save_error=error[:1000])
                print(error, file=sys.stderr, flush=True)
            else:
                self.reporter.saved(outcome.step, outcome.path)
        return error

    def _drain(self) -> None:
        """Save. When suspended, wait to be ended, or go on if the suspension is taken back."""
        self.reporter.update(state="Draining", detail="saving")
        self.save()
        self.reporter.update(state="Drained", detail="saved; waiting for the pods to go")
        while self.reporter.suspended:
            self.stop.check()
            self.stop.wait(1.0)
        self.reporter.update(state="Training", detail="generating")

    def _report(self, scored: list[ScoredSample], trained: dict[str, float], synced: Synced, timer: PhaseTimer, seconds: float) -> None:
        values = step_metrics(scored, trained, timer.seconds, seconds) | {"sync/seconds": synced.seconds}
        self._feed("log", self.step, values)
        self._step_seconds = seconds if not self._step_seconds else 0.8 * self._step_seconds + 0.2 * seconds
        left = int(self._step_seconds * (self.config.trainer.steps - self.step))
        self.reporter.stepped(self.step, values, eta_seconds=left, synced=synced)

    def _engines(self, method: str, *args: Any) -> list[Any]:
        return call_all(self.crew.engines, method, *args, deadline_seconds=self.config.weight_sync.deadline_seconds, what=f"{method} of the engines")

    def _feed(self, method: str, *args: Any, deadline_seconds: float = FILE_DEADLINE_SECONDS) -> Any:
        return call(self.crew.feed, method, *args, deadline_seconds=deadline_seconds, what=f"{method} of the feed")


def _sample(prompt: Prompt, made: Completion) -> Sample:
    tokens = len(made.token_ids)
    return Sample(
        prompt=prompt, token_ids=made.token_ids, logprobs=made.logprobs, mask=[True] * tokens, versions=[made.weight_version] * tokens,
        text=made.text, finish_reason=made.finish_reason,
    )  # fmt: skip


def step_metrics(scored: list[ScoredSample], trained: dict[str, float], phases: dict[str, float], seconds: float) -> dict[str, float]:
    """What TensorBoard gets of a step, and the status a part of. Lengths in tokens, times in seconds."""
    count = len(scored)
    rewards = torch.tensor([item.reward for item in scored])
    tokens = sum(len(item.sample.token_ids) for item in scored)
    cut = sum(item.sample.finish_reason == "length" for item in scored)
    names = scored[0].parts
    return {
        "reward/mean": rewards.mean().item(), "reward/std": rewards.std(correction=0).item(),
        **{f"reward/{name}": sum(item.parts[name] for item in scored) / count for name in names},
        "rollout/length": tokens / count, "rollout/truncated": cut / count, "rollout/tokens_per_second": tokens / seconds,
        **{name if "/" in name else f"train/{name}": value for name, value in summary(trained).items()},
        **{f"seconds/{name}": value for name, value in phases.items()}, "seconds/step": seconds,
    }
