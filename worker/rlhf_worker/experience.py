"""What one step's data is, from prompt to packed micro-batch, and the pure steps between.

prompts -> samples -> scored samples -> train sequences -> parts (one a rank) -> packed micro-batches (equal in number on all ranks).
Every step is deterministic in its input. Padding does not exist here; it is the oracle of the tests.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of one epoch, rendered and tokenised."""

    uid: str  # "<epoch>:<row>", unique in a run
    epoch: int
    row: int
    token_ids: list[int]
    text: str
    fields: dict[str, Any]  # the row's other columns, handed to rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion, as the engine made it. `logprobs` are the engine's, at the sampling temperature, one a completion token."""

    prompt: Prompt
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str  # "stop" | "length"
    weight_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """`reward` is the weighted sum of `parts`, the unweighted value of each reward by its name."""

    sample: Sample
    reward: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """What a trainer rank gets. The last two lists have one entry a completion token."""

    token_ids: list[int]  # prompt + completion
    prompt_length: int
    rollout_logprobs: list[float]
    advantages: list[float]
    loss_weight: float  # of each completion token in the update's one sum

    @property
    def length(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch: S sequences end to end, T tokens in all, on the CPU.

    Position t predicts token t + 1. `target_mask` is True where that next token belongs to a completion; `targets`,
    `advantages`, `rollout_logprobs` and `loss_weights` are aligned with it, and 0 elsewhere.
    """

    token_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (S + 1,) int32
    max_length: int
    target_mask: Tensor  # (T,) bool
    targets: Tensor  # (T,) int64
    advantages: Tensor  # (T,) float32
    rollout_logprobs: Tensor  # (T,) float32
    loss_weights: Tensor  # (T,) float32


def to_train_sequences(scored: Sequence[ScoredSample], advantages: Sequence[float]) -> list[TrainSequence]:
    """`scored`: all B samples of one optimizer update over all ranks; `advantages`: one a sample.

    Each completion token of sample i weighs 1 / (B |y_i|): the mean over sequences of the mean over tokens (GRPO, arXiv
    2402.03300), whatever the ranks and micro-batches it is then split into.
    """
    size = len(scored)
    return [_train_sequence(item.sample, advantage, size) for item, advantage in zip(scored, advantages, strict=True)]


def _train_sequence(sample: Sample, advantage: float, size: int) -> TrainSequence:
    tokens = len(sample.token_ids)
    if len(sample.logprobs) != tokens:
        raise ValueError(f"sample of prompt {sample.prompt.uid}: {tokens} tokens but {len(sample.logprobs)} logprobs")
    if not sample.prompt.token_ids:
        raise ValueError(f"prompt {sample.prompt.uid} has no tokens, so nothing predicts its completion's first")
    return TrainSequence(
        token_ids=[*sample.prompt.token_ids, *sample.token_ids],
        prompt_length=len(sample.prompt.token_ids),
        rollout_logprobs=list(sample.logprobs),
        advantages=[advantage] * tokens,
        loss_weight=1.0 / (size * max(tokens, 1)),
    )


def chunks(items: Sequence[T], count: int) -> list[list[T]]:
    """`items` in `count` runs whose sizes differ by at most one: a step's samples by optimizer update."""
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [list(items[start:end]) for start, end in pairwise(cuts)]


def split(sequences: Sequence[TrainSequence], parts: int) -> list[list[TrainSequence]]:
    """One part a rank, balanced by tokens (longest first to the least loaded); none is empty if there are enough sequences."""
    loads = [(0, part) for part in range(parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(sequences)), key=lambda i: (-sequences[i].length, i)):
        load, part = heapq.heappop(loads)
        chosen[part].append(index)
        heapq.heappush(loads, (load + sequences[index].length, part))
    return [[sequences[i] for i in sorted(indices)] for indices in chosen]


def pack(sequences: Sequence[TrainSequence], token_budget: int) -> list[PackedBatch]:
    """Every sequence whole, in exactly one micro-batch of at most `token_budget` tokens; a longer sequence is alone in its own."""
    return [_packed([sequences[i] for i in bin_]) for bin_ in _bins([s.length for s in sequences], token_budget)]


def _bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing; each bin lists its indices in ascending order."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, load in enumerate(loads) if load + lengths[index] <= budget), len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(index)
        loads[place] += lengths[index]
    return [sorted(bin_) for bin_ in bins]


def _packed(sequences: Sequence[TrainSequence]) -> PackedBatch:
    lengths = [s.length for s in sequences]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedBatch(
        token_ids=_cat((s.token_ids for s in sequences), torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        max_length=max(lengths),
        target_mask=_cat((_aligned(s, [True] * len(s.advantages), False) for s in sequences), torch.bool),
        targets=_cat((_aligned(s, s.token_ids[s.prompt_length :], 0) for s in sequences), torch.int64),
        advantages=_cat((_aligned(s, s.advantages, 0.0) for s in sequences), torch.float32),
        rollout_logprobs=_cat((_aligned(s, s.rollout_logprobs, 0.0) for s in sequences), torch.float32),
        loss_weights=_cat((_aligned(s, [s.loss_weight] * len(s.advantages), 0.0) for s in sequences), torch.float32),
    )


def _cat(rows: Iterable[Sequence[T]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def _aligned(sequence: TrainSequence, completion: Sequence[T], fill: T) -> list[T]:
    """Values of the completion's tokens, each at the position that predicts it: one before its own."""
    return [fill] * (sequence.prompt_length - 1) + list(completion) + [fill]


def equalise(ranks: Sequence[Sequence[PackedBatch]]) -> list[list[PackedBatch]]:
    """As many micro-batches on each rank as on the fullest one: FSDP's collectives run once a micro-batch on every rank."""
    count = max(len(batches) for batches in ranks)
    return [[*batches, *(empty_batch() for _ in range(count - len(batches)))] for batches in ranks]


def empty_batch() -> PackedBatch:
    """One token without a target: it takes part in the collectives and adds exactly 0 to the loss."""
    return _packed([TrainSequence(token_ids=[0], prompt_length=1, rollout_logprobs=[], advantages=[], loss_weight=0.0)])
