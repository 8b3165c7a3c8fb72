"""Small prompts, samples and sequences for tests."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_api.job import TrainerSpec
from rlhf_worker.experience import Column, PackedBatch, Prompt, Sample, ScoredSample, TrainSequence, split, taken
from rlhf_worker.experience import dealt as dealing
from rlhf_worker.rollout.episode import Request


def a_prompt(row: int = 0, length: int = 3, **fields: Any) -> Prompt:
    return Prompt(
        uid=f"0:{row}", epoch=0, row=row, token_ids=[10 + i for i in range(length)], text=f"prompt {row}", fields=fields
    )


def a_sample(row: int = 0, text: str = "yes", tokens: int = 2, **fields: Any) -> Sample:
    return Sample(
        prompt=a_prompt(row, **fields),
        token_ids=np.arange(50, 50 + tokens, dtype=np.int32),
        logprobs=np.full(tokens, -0.5, np.float32),
        text=text,
        finish_reason="stop",
        mask=np.ones(tokens, np.bool_),
        versions=np.zeros(tokens, np.int32),
    )


def scored(sample: Sample, reward: float = 1.0) -> ScoredSample:
    return ScoredSample(sample=sample, reward=reward, parts={"only": reward})


def a_sequence(
    token_ids: Sequence[int], prompt_length: int, index: int = 0, mask: Sequence[bool] | None = None,
    columns: dict[str, Any] | None = None,
) -> TrainSequence:
    """mask: all True where it is not given."""
    given = [True] * (len(token_ids) - prompt_length) if mask is None else mask
    return TrainSequence(
        token_ids=np.array(token_ids, np.int32), prompt_length=prompt_length, index=index,
        mask=np.array(given, np.bool_), columns={name: column(values) for name, values in (columns or {}).items()},
    )  # fmt: skip


def column(values: Any) -> Column:
    return float(values) if np.ndim(values) == 0 else np.array(values, np.float32)


def by_token(sequence: TrainSequence, name: str) -> list[float]:
    """A column, also one that is one number."""
    values = np.broadcast_to(sequence.columns[name], len(sequence.mask))
    return [float(value) for value in values]


def sequences(lengths: list[tuple[int, int]], seed: int = 0, vocabulary: int = 23) -> list[TrainSequence]:
    """One sequence of random content a (prompt tokens, completion tokens); weights as of one update of all of them."""
    rng = random.Random(seed)
    return [
        a_sequence(
            [rng.randrange(vocabulary) for _ in range(prompt + completion)], prompt, index,
            columns={
                "rollout_logprobs": [-rng.random() * 3 for _ in range(completion)],
                "advantages": [rng.uniform(-2, 2) for _ in range(completion)],
                **evenly(len(lengths), completion, sum(c for _, c in lengths)),
            },
        )
        for index, (prompt, completion) in enumerate(lengths)
    ]


def evenly(size: int, tokens: int, total: int) -> dict[str, Any]:
    """Weights of a sequence among `size` of `total` tokens: the mean over sequences of the mean over tokens."""
    return {"loss_weights": 1.0 / (size * max(1, tokens)), "token_weights": 1.0 / max(1, total)}


def lengths_of(items: Sequence[TrainSequence]) -> list[int]:
    return [item.length for item in items]


def parted(items: Sequence[TrainSequence], parts: int) -> list[list[TrainSequence]]:
    return [[items[i] for i in part] for part in split(lengths_of(items), parts)]


def dealt(
    items: Sequence[TrainSequence], ranks: int, spec: TrainerSpec, *, padded: bool = False
) -> list[list[PackedBatch]]:  # fmt: skip
    """As the driver deals them and the ranks take them."""
    return [taken(items, own, spec) for own in dealing(lengths_of(items), ranks, spec, padded=padded)]


def listed(found: dict[int, Any]) -> dict[int, list[float]]:
    """What ranks answer by sample, to compare."""
    return {index: row.tolist() for index, row in found.items()}


def whole(made: Any, asked: list[Request]) -> list[Sample]:
    """What an engine that is called here makes, with more time than it takes."""
    samples = [sample for sample in made.generate(asked, 600.0) if sample]
    assert len(samples) == len(asked)
    return samples
