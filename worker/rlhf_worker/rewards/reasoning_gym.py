"""The verifier of a reasoning-gym task, as a python reward: `function: rlhf_worker.rewards.reasoning_gym:score`."""

import json
from functools import cache
from typing import Any

from reasoning_gym.factory import create_dataset
from reasoning_gym.utils import extract_answer


def score(prompt: str, completion: str, **row: Any) -> float:
    """What the task's own verifier gives the answer, 0 to 1. The answer is the last <answer>...</answer>, or else the
    whole completion.

    The row is one of data.reasoningGym: `question`, `answer`, `metadata`, and in `verifier` the task and its options.
    """
    if "verifier" not in row:
        raise LookupError("this reward judges rows of data.reasoningGym only: the row has no 'verifier'")
    answer = extract_answer(completion)
    verifier = row.pop("verifier")
    return float(
        _task(verifier["task"], json.dumps(verifier["config"])).score_answer(
            completion.strip() if answer is None else answer, row,
        )
    )


@cache
def _task(name: str, config: str) -> Any:
    return create_dataset(name, **json.loads(config))
