"""Evaluation sets: prompts that are not trained on, judged by the run's own rewards or by the set's."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_api.job import EvaluationSpec
from rlhf_api.run import RunConfig
from rlhf_worker.experience import Prompt, ScoredSample, chunks, means
from rlhf_worker.rollout.estimates import majority_at, pass_at

SAME = 1e-9  # a sum of weighted rewards may be less than it ought to be by so much
Group = Sequence[ScoredSample]  # spec.samples completions of one prompt


def due(spec: EvaluationSpec, step: int, steps: int) -> bool:
    """After `step` finished steps of `steps`: before the first, every everySteps, and after the last."""
    return step % spec.every_steps == 0 or step == steps


def evaluate(
    config: RunConfig, step: int, judge: Callable[[EvaluationSpec, list[Prompt]], Sequence[Group]],
    feed: Callable[..., Any]
) -> dict[str, float]:
    """Metrics of the sets that are due; empty when none is.

    `judge` generates and scores, a group a prompt; `feed` calls a method of the feed. Raises what they raise.
    """
    values: dict[str, float] = {}
    for spec in config.evaluation:
        if due(spec, step, config.trainer.steps):
            start, prompts = time.monotonic(), feed("draw_evaluation", spec.name)
            # As many samples at a time as a step has: they have the same deadline.
            most = max(1, config.rollout.prompts_per_step * config.rollout.samples_per_prompt // spec.samples)
            groups = [group for part in chunks(prompts, -(-len(prompts) // most)) for group in judge(spec, part)]
            values |= metrics(spec, groups) if groups else {}  # none: all were left out
            values[f"eval/{spec.name}/total_seconds"] = time.monotonic() - start
    return values


def metrics(spec: EvaluationSpec, groups: Sequence[Group]) -> dict[str, float]:
    """eval/<name>/...: mean of each reward by its name, of their weighted sum, and of the best sum of a prompt's
    samples.

    With rewards of 0 and 1 the best is pass@k, k = spec.samples; pass_at_<k> and maj_at_<k> are means over the prompts.
    Length in tokens. Names with an underscore cannot be a reward's.
    """
    scored = [item for group in groups for item in group]
    values = means(item.judged for item in scored) | means(item.metrics for item in scored)
    values["mean_reward"] = sum(item.reward for item in scored) / len(scored)
    values["best_reward"] = sum(max(item.reward for item in group) for group in groups) / len(groups)
    values["mean_length"] = sum(len(item.sample.token_ids) for item in scored) / len(scored)
    values["truncated_share"] = sum(item.sample.finish_reason == "length" for item in scored) / len(scored)
    passed = [[item.reward >= spec.pass_reward - SAME for item in group] for group in groups]
    values |= {f"pass_at_{k}": sum(pass_at(len(ok), sum(ok), k) for ok in passed) / len(groups) for k in spec.pass_at}
    answers = (
        [[answer(item.sample.text, spec.answer_pattern) for item in group] for group in groups] if spec.maj_at else []
    )
    values |= {
        f"maj_at_{k}": sum(map(majority_at, answers, passed, [k] * len(groups))) / len(groups) for k in spec.maj_at
    }
    return {f"eval/{spec.name}/{name}": value for name, value in values.items()}


def answer(text: str, pattern: str | None) -> str | None:
    """The last match's group, without space around it; None for none."""
    found = [text] if pattern is None else re.findall(pattern, text)
    return found[-1].strip() if found else None
