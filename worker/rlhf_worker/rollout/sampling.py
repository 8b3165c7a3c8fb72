"""The set that a token was drawn from, and texts that end a turn: what engines of every kind do alike."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_api.job import SamplingSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec

NONE = -1  # stands for no token in a row that has fewer than others


def support(token_ids: NDArray[Any], logprobs: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """The sets that topK, topP, minP and minTokens left to draw from, for the trainer to compute over.

    "Keep Sampling Mask" of DeepSeek-V3.2 (arXiv 2512.02556). token_ids, logprobs (tokens, 1 + topK): the drawn token,
    then the likeliest ones, of the distribution drawn from; -inf is left out.

    -> log probabilities of the drawn tokens (tokens,), and the sets (tokens, 1 + topK), the drawn token first, NONE
    where there is none. A set of more than topK tokens, where logits are equal, is cut to so many: the log probability
    is the one given that it was among them.
    """
    out = np.isneginf(logprobs)
    out[:, 1:] |= token_ids[:, 1:] == token_ids[:, :1]
    mass = np.where(out, 0.0, np.exp(logprobs)).sum(1)
    return logprobs[:, 0] - np.log(mass), np.where(out, NONE, token_ids).astype(np.int32)


def first_stop(texts: Sequence[str], stop: Sequence[str], least: int) -> tuple[int, str] | None:
    """The first number of tokens beyond `least` whose text newly holds one of `stop`, and which.

    texts[n]: of the first n tokens. Of several the one that ends first, as vLLM has it.
    """
    for count in range(least + 1, len(texts)):
        known = len(texts[count - 1])
        found = [
            (at + len(text), text)
            for text in stop
            if (at := texts[count].find(text, max(0, known - len(text) + 1))) >= 0
        ]
        if found:
            return count, min(found, key=lambda one: one[0])[1]
    return None


def check_sampling(config: RunConfig, tokenizer: Any) -> None:
    """Raises BadSpec for what ends a turn and could never come up."""
    places = {
        "spec.rollout.sampling": config.rollout.sampling,
        **{f"evaluation[{e.name}].sampling": e.sampling for e in config.evaluation},
    }
    if wrong := [f"{place}.{text}" for place, spec in places.items() for text in _never(spec, tokenizer)]:
        raise BadSpec("; ".join(wrong))


def _never(spec: SamplingSpec, tokenizer: Any) -> Iterator[str]:
    if spec.stop_token_ids and max(spec.stop_token_ids) >= len(tokenizer):
        most = max(spec.stop_token_ids)
        yield f"stopTokenIds: the tokenizer has {len(tokenizer)} tokens, {most} is none of them: correct it"
    special = (
        {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if spec.stop
        else {}
    )
    for text in spec.stop:
        if within := [content for content in special if content in text]:
            numbers = ", ".join(str(special[content]) for content in within)
            why = f"has the special token {within[0]}, which texts leave out"
            yield f"stop: {text!r} {why}: use stopTokenIds ({numbers})"
