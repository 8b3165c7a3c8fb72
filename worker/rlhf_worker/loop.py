"""The training loop: synchronous GRPO (arXiv 2402.03300), in the order of its algorithm.

The loop moves values between actors and decides nothing about placement, engines or files.
"""

import time
from typing import Any

import torch

from rlhf_api.run import RunConfig
from rlhf_worker import advantage
from rlhf_worker.actors.engine import Completion, Request, request_seed
from rlhf_worker.actors.group import call, call_all, call_each, gather
from rlhf_worker.crew import Crew
from rlhf_worker.experience import (
    PackedBatch,
    Prompt,
    Sample,
    ScoredSample,
    TrainSequence,
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
                if self.step % self.config.checkpoint.every_steps == 0 or self.step == self.config.trainer.steps:
                    self.save()
                if self.reporter.suspended:
                    self._drain()
                self.stop.check()
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
            with timer.phase("score"):  # 3. rewards, and the KL penalty where it is part of them
                scored = self._feed("score", samples, deadline_seconds=SCORE_DEADLINE_SECONDS)
                rewards = self._penalised(scored)
        with timer.phase("pack"):  # 4. advantages relative to the group, 5. packed micro-batches for each rank and update
            advantages = advantage.grpo(rewards.view(len(prompts), -1)).flatten().tolist()
            batches = self._batches(scored, advantages)
        self._sleep()
        with timer.phase("train"):  # 6. optimizer updates
            trained = call_each(self.crew.policy, "train", batches, deadline_seconds=TRAIN_DEADLINE_SECONDS, what="training")[0]
        with timer.phase("sync"):  # 7. the new weights into the engines
            synced = self._sync(number)
        self.step, self.sampler = number, self._feed("sampler_state")  # 8. the step is finished
        self._report(scored, trained, synced, timer, time.monotonic() - start)

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

    def _penalised(self, scored: list[ScoredSample]) -> torch.Tensor:
        """Rewards (B,) float32, less the KL penalty of each sample's tokens where the spec puts it there."""
        rewards = torch.tensor([item.reward for item in scored], dtype=torch.float32)
        term = self.config.algorithm.kl
        if term.coefficient == 0 or term.place == "loss":
            return rewards
        tagged = to_train_sequences(scored, [float(i) for i in range(len(scored))])
        ranks = equalise([pack(part, self.config.trainer.tokens_per_micro_batch) for part in self._split(tagged)])
        found = call_each(self.crew.policy, "kl_sums", ranks, deadline_seconds=TRAIN_DEADLINE_SECONDS, what="KL to the reference")
        sums = {index: value for part in found for index, value in part.items()}
        return rewards - term.coefficient * torch.tensor([sums.get(i, 0.0) for i in range(len(scored))])

    def _split(self, sequences: list[TrainSequence]) -> list[list[TrainSequence]]:
        return split(sequences, len(self.crew.policy))

    def _batches(self, scored: list[ScoredSample], advantages: list[float]) -> list[list[list[PackedBatch]]]:
        """[rank][update][micro-batch]; as many micro-batches on every rank."""
        trainer = self.config.trainer
        updates = []
        for part in chunks(list(zip(scored, advantages, strict=True)), trainer.updates_per_step):
            sequences = to_train_sequences([item for item, _ in part], [value for _, value in part])
            updates.append(equalise([pack(own, trainer.tokens_per_micro_batch) for own in self._split(sequences)]))
        return [[update[rank] for update in updates] for rank in range(len(self.crew.policy))]

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
        """A checkpoint of the last finished step, unless it is there already."""
        if self.step == self.saved_step:
            return
        path = call_all(self.crew.policy, "save", self.step, self.sampler, deadline_seconds=FILE_DEADLINE_SECONDS, what="checkpoint")[0]
        self.saved_step = self.step
        self.reporter.saved(self.step, path)

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
    return Sample(
        prompt=prompt, token_ids=made.token_ids, logprobs=made.logprobs, text=made.text, finish_reason=made.finish_reason, weight_version=made.weight_version
    )


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
        **{f"train/{name}": value for name, value in trained.items()},
        **{f"seconds/{name}": value for name, value in phases.items()}, "seconds/step": seconds,
    }
