"""Mathematical answers, compared by math-verify: `function: rlhf_worker.rewards.math_answers:score`."""

import re
from typing import Any

try:
    from math_verify import parse, verify
except ImportError as error:
    raise ImportError(
        "the image has no python package math-verify: use an image that has it (pip install 'math-verify[antlr4_13_2]')"
    ) from error

NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")


def score(prompt: Any, completion: str, answer: Any, **row: Any) -> tuple[float, dict[str, float]]:
    """1 where the last formula or number of the completion equals the column `answer`, else 0.

    `answer` is a number, or LaTeX with or without its $; of a whole solution the part after "####" counts. The metric
    `answered` is 1 where the completion holds anything that can be read. Raises ValueError for an answer that cannot.
    """
    gold = parse(reference(answer))
    if not gold:
        raise ValueError(f"math-verify cannot read the column 'answer': {answer!r:.200}")
    given = parse(completion)
    return float(verify(gold, given)), {"answered": float(bool(given))}


def reference(answer: Any) -> str:
    """As math-verify wants it: a formula between $."""
    text = str(answer).rpartition("####")[2].strip()
    if NUMBER.fullmatch(text):
        text = text.replace(",", "")
    return text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${text}$"
