"""What one step's data is, from prompt to packed micro-batch, and the pure steps between.

prompts -> samples -> scored samples -> train sequences -> parts (one a rank) -> packed micro-batches (equal in number
on all ranks). Every step is deterministic in its input. Padding does not exist here; it is the oracle of the tests. """

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_api.job import TOKENS_PER_MICRO_BATCH, TrainerSpec

T = TypeVar("T")

# Tokens of a sequence whose attention costs as much as all else: 12 times the hidden size of most models, of 3,000.
ATTENTION_EVEN = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of one epoch, rendered and tokenised."""

    uid: str  # "<epoch>:<row>", with "<source>:" before it where there are several; unique in a run
    epoch: int
    row: int
    token_ids: list[int]
    text: str
    fields: dict[str, Any]  # the row's columns, handed to rewards
    source: str = ""  # of data.sources
    rewards: tuple[str, ...] | None = None  # names of those that judge its completions; None: all

    def judged_by(self, reward: str) -> bool:
        return self.rewards is None or reward in self.rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion, as the engine and the environment made it. The lists have one entry a completion token.

    `logprobs` are the engine's, of the distribution that it drew from: at the temperature, over `support`; 0 where
    `mask` is False.
    """

    prompt: Prompt
    token_ids: list[int]
    logprobs: list[float]
    mask: list[bool]  # False: an observation, put there by the environment; no loss
    versions: list[int]  # of the weights that made the token
    text: str
    finish_reason: str  # "stop" | "length"
    episode_reward: float | None = None  # the sum of what the environment gave for its turns; None without one
    failure: str = ""  # why the environment or a reward has no value for it: such a sample is never trained
    # (tokens, 1 + topK): the tokens that each was drawn from, itself first, -1 where there are fewer. None: from all.
    support: NDArray[np.int32] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """`reward` is the weighted sum of `parts`, the unweighted value of each reward by its name.

    `metrics`: what rewards gave beside their values, as <reward>/<metric>. Where the sample failed, `reward` is NaN.
    """

    sample: Sample
    reward: float
    parts: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> dict[str, float]:
        """Of `parts` those of what judges the sample: the others are 0, which is no verdict."""
        judges = self.sample.prompt.judged_by
        return {name: value for name, value in self.parts.items() if name == "environment" or judges(name)}


def means(samples: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each name the mean over the samples that have it."""
    values: dict[str, list[float]] = {}
    for named in samples:
        for name, value in named.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """What a trainer rank gets of one sample. `mask` and each of `columns` have one entry a completion token."""

    token_ids: list[int]  # prompt + completion
    prompt_length: int
    index: int  # of the sample in its step; -1: a filler
    mask: list[bool]
    columns: dict[str, list[float]]
    support: NDArray[np.int32] | None = field(default=None, compare=False)  # as the sample's

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def targets(self) -> int:
        """Tokens that count in a loss."""
        return sum(self.mask)

    def with_columns(self, **columns: list[float]) -> "TrainSequence":
        return replace(self, columns={**self.columns, **columns})


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch: S sequences end to end, T tokens in all, on the CPU.

    Position t predicts token t + 1. `target_mask` is True where that next token belongs to a completion and counts;
    `targets` and `columns` are aligned with it, and 0 where the next token belongs to no completion.
    """

    token_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (S + 1,) int32
    max_length: int
    target_mask: Tensor  # (T,) bool
    targets: Tensor  # (T,) int64
    indices: list[int]  # S sample numbers
    prompt_lengths: list[int]  # S
    sequence: Tensor  # (T,) int64: which of the S sequences a position belongs to
    columns: dict[str, Tensor]  # (T,) float32 each
    support: Tensor | None = (
        None  # (T, 1 + topK) int32: what each next token was drawn from, itself first, -1 where there are fewer
    )


@dataclass(frozen=True, slots=True)
class Batching:
    """How a role's model gets its batches, which its rank tried when it was loaded."""

    padded: bool  # one sequence a row, for a model that is wrong on packed ones
    words: str  # what was measured


def to_train_sequences(samples: Sequence[Sample]) -> list[TrainSequence]:
    """Numbered in order, with the one column that every sample brings: rollout_logprobs. Raises ValueError for lists of
    unlike length.
    """
    return [_train_sequence(index, sample) for index, sample in enumerate(samples)]


def _train_sequence(index: int, sample: Sample) -> TrainSequence:
    tokens, uid = len(sample.token_ids), sample.prompt.uid
    for name, values in (("logprobs", sample.logprobs), ("mask", sample.mask), ("versions", sample.versions)):
        if len(values) != tokens:
            raise ValueError(f"sample of prompt {uid}: {tokens} tokens but {len(values)} {name}")
    if sample.support is not None and len(sample.support) != tokens:
        raise ValueError(f"sample of prompt {uid}: {tokens} tokens drawn from {len(sample.support)} sets")
    if not sample.prompt.token_ids:
        raise ValueError(f"prompt {uid} has no tokens, so nothing predicts its completion's first")
    return TrainSequence(
        token_ids=[*sample.prompt.token_ids, *sample.token_ids], prompt_length=len(sample.prompt.token_ids),
        index=index, mask=list(sample.mask), columns={"rollout_logprobs": list(sample.logprobs)},
        support=sample.support,
    )


def add_column(
    sequences: Sequence[TrainSequence], name: str, found: Iterable[Mapping[int, list[float]]],
) -> list[TrainSequence]:
    """What the ranks answered by sample (`by_sample`), as a column. Raises KeyError for a sample that no rank answered
    for.
    """
    values = {index: row for part in found for index, row in part.items()}
    return [sequence.with_columns(**{name: values[sequence.index]}) for sequence in sequences]


def chunks(items: Sequence[T], count: int) -> list[list[T]]:
    """`items` in `count` runs whose sizes differ by at most one."""
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [list(items[start:end]) for start, end in pairwise(cuts)]


def mini_batches(samples: int, updates: int, epochs: int, seed: str) -> list[list[int]]:
    """The numbers of the samples of each optimizer update of a step, epoch after epoch: in each epoch every sample is
    in one of `updates` mini-batches, by an order drawn anew from the seed (PPO, arXiv 1707.06347, algorithm 1).
    """
    orders = [list(range(samples)) for _ in range(epochs)]
    for epoch, order in enumerate(orders if updates > 1 else ()):
        Random(f"{seed}/{epoch}").shuffle(order)
    return [sorted(part) for order in orders for part in chunks(order, updates)]


def cost(length: int) -> float:
    """What a sequence of so many tokens costs to train, in tokens of the shortest: all but attention grows with its
    length, attention with the square.
    """
    return length * (1 + length / ATTENTION_EVEN)


def split(sequences: Sequence[TrainSequence], parts: int) -> list[list[TrainSequence]]:
    """One part a rank, balanced by cost (longest first to the least loaded); none is empty if there are enough
    sequences.
    """
    loads = [0.0] * parts
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(sequences)), key=lambda i: -sequences[i].length):
        part = loads.index(min(loads))
        chosen[part].append(index)
        loads[part] += cost(sequences[index].length)
    return [[sequences[i] for i in sorted(indices)] for indices in chosen]


def pack(
    sequences: Sequence[TrainSequence], token_budget: int, *, padded: bool = False, count: int = 1
) -> list[PackedBatch]:  # fmt: skip
    """Every sequence whole, in exactly one micro-batch of at most `token_budget` tokens; a longer sequence is alone in
    its own. Micro-batches are as few as first-fit finds, or `count`, and cost nearly the same, the dearest first.

    padded: each counts as many tokens as the longest of its micro-batch, as it will when they are laid out one a row.
    They are filled one after the other then, for like lengths belong together.
    """
    lengths = [s.length for s in sequences]
    bins = _bins(lengths, token_budget, padded=padded)
    if not padded:
        bins = _even(lengths, token_budget, min(max(len(bins), count), len(lengths))) or bins
    dear = sorted(bins, key=lambda indices: -sum(cost(lengths[i]) for i in indices))
    return [_packed([sequences[i] for i in indices]) for indices in dear]


def _even(lengths: Sequence[int], budget: int, count: int) -> list[list[int]]:
    """`count` bins, each item, dearest first, to the cheapest bin that has room. Empty where one has no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        open_ = [b for b in range(count) if not bins[b] or tokens[b] + lengths[index] <= budget]
        if not open_:
            return []
        place = min(open_, key=lambda b: costs[b])
        bins[place].append(index)
        tokens[place] += lengths[index]
        costs[place] += cost(lengths[index])
    return [sorted(indices) for indices in bins]


def _bins(lengths: Sequence[int], budget: int, *, padded: bool) -> list[list[int]]:
    """First-fit decreasing; each bin lists its indices in ascending order."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next(
            (b for b, load in enumerate(loads) if load + (lengths[bins[b][0]] if padded else lengths[index]) <= budget),
            len(bins)
        )
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(index)
        loads[place] += lengths[bins[place][0]] if padded else lengths[index]
    return [sorted(bin_) for bin_ in bins]


def _packed(sequences: Sequence[TrainSequence]) -> PackedBatch:
    lengths = [s.length for s in sequences]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedBatch(
        token_ids=_cat((s.token_ids for s in sequences), np.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        max_length=max(lengths),
        target_mask=_cat((_aligned(s, s.mask, False) for s in sequences), np.bool),
        targets=_cat((_aligned(s, s.token_ids[s.prompt_length :], 0) for s in sequences), np.int64),
        indices=[s.index for s in sequences],
        prompt_lengths=[s.prompt_length for s in sequences],
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        columns={
            name: _cat((_aligned(s, s.columns[name], 0.0) for s in sequences), np.float32)
            for name in sequences[0].columns
        },
        support=_support(sequences),
    )


def _support(sequences: Sequence[TrainSequence]) -> Tensor | None:
    given = [(s.support, s.prompt_length) for s in sequences if s.support is not None]
    rows = [np.pad(sets, ((prompt - 1, 1), (0, 0)), constant_values=-1) for sets, prompt in given]
    return torch.from_numpy(np.concatenate(rows)) if rows else None


def _cat(rows: Iterable[Sequence[T]], dtype: type[np.generic]) -> Tensor:
    # torch.tensor of a list takes three times as long
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), dtype))


def _aligned(sequence: TrainSequence, completion: Sequence[T], fill: T) -> list[T]:
    """Values of the completion's tokens, each at the position that predicts it: one before its own."""
    return [fill] * (sequence.prompt_length - 1) + list(completion) + [fill]


def dealt(
    sequences: Sequence[TrainSequence], ranks: int, spec: TrainerSpec, *, padded: bool
) -> list[list[PackedBatch]]:  # fmt: skip
    """Each rank's micro-batches, as many on every rank; ranks that are neighbours in context parallelism share theirs.

    padded: whether a model that they are for lays them out one sequence a row.
    """
    cp = spec.context_parallel
    parts = split(sequences, ranks // cp)
    budget = (spec.tokens_per_micro_batch or TOKENS_PER_MICRO_BATCH) * cp
    count = max(len(_bins([s.length for s in own], budget, padded=padded)) for own in parts)
    shares = equalise([pack(own, budget, padded=padded, count=count) for own in parts], cp)
    return [share for share in shares for _ in range(cp)]


def within(batches: Sequence[PackedBatch], tokens: int) -> list[PackedBatch]:
    """The same sequences, batches of more tokens halved between two of them until each has one or is small enough."""
    return [part for batch in batches for part in _within(batch, tokens)]


def _within(batch: PackedBatch, tokens: int) -> list[PackedBatch]:
    borders = batch.cu_seqlens.tolist()
    if borders[-1] <= tokens or len(borders) == 2:
        return [batch]
    cut = min(range(1, len(borders) - 1), key=lambda i: abs(2 * borders[i] - borders[-1]))
    return within([_part(batch, 0, cut), _part(batch, cut, len(borders) - 1)], tokens)


def _part(batch: PackedBatch, first: int, end: int) -> PackedBatch:
    """Of its sequences those from `first` to before `end`."""
    borders = batch.cu_seqlens[first : end + 1]
    at = slice(int(borders[0]), int(borders[-1]))
    return PackedBatch(
        token_ids=batch.token_ids[at], position_ids=batch.position_ids[at], cu_seqlens=borders - borders[0],
        max_length=int(borders.diff().max()), target_mask=batch.target_mask[at], targets=batch.targets[at],
        indices=batch.indices[first:end], prompt_lengths=batch.prompt_lengths[first:end],
        sequence=batch.sequence[at] - first, columns={name: rows[at] for name, rows in batch.columns.items()},
        support=None if batch.support is None else batch.support[at],
    )


def equalise(ranks: Sequence[Sequence[PackedBatch]], sharing: int = 1) -> list[list[PackedBatch]]:
    """As many micro-batches on each rank as on the fullest one: FSDP's collectives run once a micro-batch on every
    rank. sharing: ranks that compute one micro-batch together.
    """
    fullest = max(ranks, key=len)
    filler = empty_batch(fullest[0].columns if fullest else (), sharing)
    return [[*batches, *[filler] * (len(fullest) - len(batches))] for batches in ranks]


def empty_batch(columns: Iterable[str] = (), sharing: int = 1) -> PackedBatch:
    """Two tokens a rank without a target: it takes part in the collectives and adds exactly 0 to the loss. One token
    would be compiled anew, for sizes of 1 are known to a graph.
    """
    nothing: dict[str, list[float]] = {name: [] for name in columns}
    tokens = [0] * (2 * sharing)
    return _packed([TrainSequence(token_ids=tokens, prompt_length=len(tokens), index=-1, mask=[], columns=nothing)])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To `device`, without a wait for all that it still computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def at_targets(batch: PackedBatch, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The columns and `sequence` at the N targets, (N,) each on `device`; for a batch without targets one zero each, as
    log probabilities of it are one zero.
    """
    if not batch.target_mask.any():  # its columns may hold values all the same: those of observations
        nothing = torch.zeros(1, device=device)
        return dict.fromkeys(batch.columns, nothing), nothing.long()
    where = batch.target_mask
    columns = {name: sent(column[where], device) for name, column in batch.columns.items()}
    return columns, sent(batch.sequence[where], device)


def by_sample(batch: PackedBatch, values: Tensor) -> dict[int, list[float]]:
    """One value a target, (N,), back to the samples: for each, one value a completion token, 0 where the mask is False.
    Fillers are left out.
    """
    dense = torch.zeros(len(batch.token_ids), dtype=values.dtype)
    if batch.target_mask.any():
        dense[batch.target_mask] = values.detach().cpu()
    rows = torch.split(dense, batch.cu_seqlens.diff().tolist())
    return {
        index: row[prompt - 1 : -1].tolist() for index, prompt,
        row in zip(batch.indices, batch.prompt_lengths, rows, strict=True) if index >= 0
    }
