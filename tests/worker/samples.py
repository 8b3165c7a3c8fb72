"""Small prompts, samples and sequences for tests."""

import random
from typing import Any

from rlhf_worker.experience import Prompt, Sample, ScoredSample, TrainSequence
from rlhf_worker.rollout.episode import Request


def a_prompt(row: int = 0, length: int = 3, **fields: Any) -> Prompt:
    return Prompt(
        uid=f"0:{row}", epoch=0, row=row, token_ids=[10 + i for i in range(length)], text=f"prompt {row}", fields=fields
    )


def a_sample(row: int = 0, text: str = "yes", tokens: int = 2, **fields: Any) -> Sample:
    return Sample(
        prompt=a_prompt(row, **fields),
        token_ids=[50 + i for i in range(tokens)],
        logprobs=[-0.5] * tokens,
        text=text,
        finish_reason="stop",
        mask=[True] * tokens,
        versions=[0] * tokens,
    )


def scored(sample: Sample, reward: float = 1.0) -> ScoredSample:
    return ScoredSample(sample=sample, reward=reward, parts={"only": reward})


def sequences(lengths: list[tuple[int, int]], seed: int = 0, vocabulary: int = 23) -> list[TrainSequence]:
    """One sequence of random content a (prompt tokens, completion tokens); weights as of one update of all of them."""
    rng = random.Random(seed)
    return [
        TrainSequence(
            token_ids=[rng.randrange(vocabulary) for _ in range(prompt + completion)],
            prompt_length=prompt,
            index=index,
            mask=[True] * completion,
            columns={
                "rollout_logprobs": [-rng.random() * 3 for _ in range(completion)],
                "advantages": [rng.uniform(-2, 2) for _ in range(completion)],
                **evenly(len(lengths), completion, sum(c for _, c in lengths)),
            },
        )
        for index, (prompt, completion) in enumerate(lengths)
    ]


def evenly(size: int, tokens: int, total: int) -> dict[str, list[float]]:
    """Weights of a sequence among `size` of `total` tokens: the mean over sequences of the mean over tokens."""
    return {"loss_weights": [1.0 / (size * max(1, tokens))] * tokens, "token_weights": [1.0 / max(1, total)] * tokens}


def whole(made: Any, asked: list[Request]) -> list[Sample]:
    """What an engine that is called here makes, with more time than it takes."""
    samples = [sample for sample in made.generate(asked, 600.0) if sample]
    assert len(samples) == len(asked)
    return samples
