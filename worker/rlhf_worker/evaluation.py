"""Evaluation sets: prompts that are not trained on, judged by the run's own rewards."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_api.job import EvaluationSpec
from rlhf_api.run import RunConfig
from rlhf_worker.experience import Prompt, Sample, ScoredSample, chunks

Generate = Callable[[list[Prompt], EvaluationSpec], list[Sample]]  # spec.samples completions of each prompt, grouped by prompt
Score = Callable[[list[Sample]], list[ScoredSample]]


def due(spec: EvaluationSpec, step: int, steps: int) -> bool:
    """After `step` finished steps of `steps`: before the first, every everySteps, and after the last."""
    return step % spec.every_steps == 0 or step == steps


def evaluate(config: RunConfig, step: int, generate: Generate, score: Score, feed: Callable[..., Any]) -> dict[str, float]:
    """Metrics of the sets that are due; empty when none is. `feed` calls a method of the feed. Raises what generation and rewards raise."""
    values: dict[str, float] = {}
    for spec in config.evaluation:
        if due(spec, step, config.trainer.steps):
            start, prompts = time.monotonic(), feed("draw_evaluation", spec.name)
            # A call for as many samples as a step has: it has the same deadline.
            most = max(1, config.rollout.prompts_per_step * config.rollout.samples_per_prompt // spec.samples)
            samples = [sample for part in chunks(prompts, -(-len(prompts) // most)) for sample in generate(part, spec)]
            values |= metrics(spec, score(samples)) | {f"eval/{spec.name}/total_seconds": time.monotonic() - start}
    return values


def metrics(spec: EvaluationSpec, scored: Sequence[ScoredSample]) -> dict[str, float]:
    """eval/<name>/...: mean of each reward by its name, of their weighted sum, and of the best sum of a prompt's samples.

    With rewards of 0 and 1 the best is pass@k, k = spec.samples. Length in tokens. Names with an underscore cannot be a reward's.
    """
    rewards, count = [item.reward for item in scored], len(scored)
    groups = [rewards[i : i + spec.samples] for i in range(0, count, spec.samples)]
    found = {name: sum(item.parts[name] for item in scored) / count for name in scored[0].parts}
    found["mean_reward"] = sum(rewards) / count
    found["best_reward"] = sum(map(max, groups)) / len(groups)
    found["mean_length"] = sum(len(item.sample.token_ids) for item in scored) / count
    found["truncated_share"] = sum(item.sample.finish_reason == "length" for item in scored) / count
    return {f"eval/{spec.name}/{name}": value for name, value in found.items()}
