"""What one step's data is, from prompt to packed micro-batch, and the pure steps between.

prompts -> samples -> scored samples -> train sequences -> micro-batches of their numbers (as many on every rank; the
driver's) -> packed batches (the ranks'). What has an entry a token is an array, which no process walks through in
python; and what travels by the thousand has no slots, which python pickles far more slowly. Every step is
deterministic in its input. Padding does not exist here; it is the oracle of the tests. """

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import pairwise
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_api.job import TOKENS_PER_MICRO_BATCH, TrainerSpec

T = TypeVar("T")
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

# Tokens of a sequence whose attention costs as much as all else: 12 times the hidden size of most models, of 3,000.
ATTENTION_EVEN = 32768


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One completion, as the engine and the environment made it. The arrays have one entry a completion token.

    `logprobs` are the engine's, of the distribution that it drew from: at the temperature, over `support`; 0 where
    `mask` is False.
    """

    prompt: Prompt
    token_ids: Ints
    logprobs: Floats
    mask: Bools  # False: an observation, put there by the environment; no loss
    versions: Ints  # of the weights that made the token
    text: str
    finish_reason: str  # "stop" | "length" | "abort": what there is of one that is to be gone on with
    episode_reward: float | None = None  # the sum of what the environment gave for its turns; None without one
    failure: str = ""  # why the environment or a reward has no value for it: such a sample is never trained
    # (tokens, 1 + topK): the tokens that each was drawn from, itself first, -1 where there are fewer. None: from all.
    support: Ints | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason != "abort"

    @property
    def targets(self) -> int:
        """Tokens that count in a loss."""
        return int(np.count_nonzero(self.mask))

    def without_tokens(self, prompt: Prompt) -> "Sample":
        """What rewards read. `prompt`: its own without tokens, one object for a group."""
        return replace(self, prompt=prompt, support=None, **NO_TOKENS)


# Of a sample that has none.
NO_TOKENS: dict[str, Any] = {
    "token_ids": np.empty(0, np.int32), "logprobs": np.empty(0, np.float32), "mask": np.empty(0, np.bool_),
    "versions": np.empty(0, np.int32),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
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


Column = NDArray[np.floating[Any]] | float


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainSequence:
    """What a trainer rank gets of one sample. `mask` has one entry a completion token; each of `columns` too, or is one
    number for all of them.
    """

    token_ids: Ints  # prompt + completion
    prompt_length: int
    index: int  # of the sample in its step; -1: a filler
    mask: Bools
    columns: dict[str, Column]
    support: Ints | None = None  # as the sample's

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def targets(self) -> int:
        """Tokens that count in a loss."""
        return int(np.count_nonzero(self.mask))

    @classmethod
    def plain(cls, token_ids: Sequence[int], index: int = -1) -> "TrainSequence":
        """All of it prompt."""
        ids = np.array(token_ids, np.int32)
        return cls(token_ids=ids, prompt_length=len(ids), index=index, mask=NO_TOKENS["mask"], columns={})

    def with_columns(self, **columns: Column) -> "TrainSequence":
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
    """Numbered in order, with the one column that every sample brings: rollout_logprobs. Raises ValueError for arrays
    of unlike length.
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
        token_ids=np.concatenate([np.array(sample.prompt.token_ids, np.int32), sample.token_ids]),
        prompt_length=len(sample.prompt.token_ids), index=index, mask=sample.mask,
        columns={"rollout_logprobs": sample.logprobs}, support=sample.support,
    )  # fmt: skip


def add_column(
    sequences: Sequence[TrainSequence], name: str, found: Iterable[Mapping[int, Floats]],
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


def split(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of the sequences of each part, balanced by cost (longest first to the least loaded); none is empty if
    there are enough sequences. `lengths`: of all, in tokens.
    """
    loads = [0.0] * parts
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = loads.index(min(loads))
        chosen[part].append(index)
        loads[part] += cost(lengths[index])
    return [sorted(indices) for indices in chosen]


def micro_batches(
    lengths: Sequence[int], token_budget: int, *, padded: bool = False, count: int = 1
) -> list[list[int]]:  # fmt: skip
    """Every sequence, by its number, whole in exactly one micro-batch of at most `token_budget` tokens; a longer
    sequence is alone in its own. They are as few as first-fit finds, or `count`, and cost nearly the same, the dearest
    first.

    padded: each counts as many tokens as the longest of its micro-batch, as it will when they are laid out one a row.
    They are filled one after the other then, for like lengths belong together.
    """
    bins = _bins(lengths, token_budget, padded=padded)
    if not padded:
        bins = _even(lengths, token_budget, min(max(len(bins), count), len(lengths))) or bins
    return sorted(bins, key=lambda indices: -sum(cost(lengths[i]) for i in indices))


def pack(sequences: Sequence[TrainSequence], token_budget: int, *, padded: bool = False) -> list[PackedBatch]:
    """All of them on one rank, in its `micro_batches`."""
    return [
        packed([sequences[i] for i in numbers])
        for numbers in micro_batches([s.length for s in sequences], token_budget, padded=padded)
    ]


def _even(lengths: Sequence[int], budget: int, count: int) -> list[list[int]]:
    """`count` bins, each item, dearest first, to the cheapest bin that has room. Empty where one has no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, cheapest = [0] * count, [(0.0, number) for number in range(count)]  # a heap
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = []
        while cheapest and bins[cheapest[0][1]] and tokens[cheapest[0][1]] + lengths[index] > budget:
            full.append(heappop(cheapest))
        if not cheapest:
            return []
        spent, place = heappop(cheapest)
        bins[place].append(index)
        tokens[place] += lengths[index]
        for one in (*full, (spent + cost(lengths[index]), place)):
            heappush(cheapest, one)
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


def packed(sequences: Sequence[TrainSequence]) -> PackedBatch:
    lengths = [s.length for s in sequences]
    ends = np.cumsum(lengths)
    total, starts = int(ends[-1]), ends - lengths
    mask, targets = np.zeros(total, np.bool_), np.zeros(total, np.int64)
    columns = {name: np.zeros(total, np.float32) for name in sequences[0].columns}
    for s, start in zip(sequences, starts.tolist(), strict=True):
        # of the completion's tokens, each at the position that predicts it: one before its own
        own = slice(start + s.prompt_length - 1, start + s.length - 1)
        mask[own], targets[own] = s.mask, s.token_ids[s.prompt_length :]
        for name, column in columns.items():
            column[own] = s.columns[name]
    return PackedBatch(
        token_ids=torch.from_numpy(np.concatenate([s.token_ids for s in sequences]).astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts, lengths)),
        cu_seqlens=torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        max_length=max(lengths), target_mask=torch.from_numpy(mask), targets=torch.from_numpy(targets),
        indices=[s.index for s in sequences], prompt_lengths=[s.prompt_length for s in sequences],
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        columns={name: torch.from_numpy(column) for name, column in columns.items()}, support=_support(sequences),
    )  # fmt: skip


def _support(sequences: Sequence[TrainSequence]) -> Tensor | None:
    given = [(s.support, s.prompt_length) for s in sequences if s.support is not None]
    rows = [np.pad(sets, ((prompt - 1, 1), (0, 0)), constant_values=-1) for sets, prompt in given]
    return torch.from_numpy(np.concatenate(rows)) if rows else None


def dealt(lengths: Sequence[int], ranks: int, spec: TrainerSpec, *, padded: bool) -> list[list[list[int]]]:
    """Each rank's micro-batches of the sequences' numbers, as many on every rank, empty ones where it has no more:
    FSDP's collectives run once a micro-batch on every rank. Neighbours in context parallelism share theirs.

    lengths: of all sequences, in tokens; padded: whether a model that they are for lays them out one sequence a row.
    """
    cp = spec.context_parallel
    parts, budget = split(lengths, ranks // cp), (spec.tokens_per_micro_batch or TOKENS_PER_MICRO_BATCH) * cp
    count = max(len(_bins([lengths[i] for i in own], budget, padded=padded)) for own in parts)
    shares = [
        [[own[i] for i in numbers] for numbers in micro_batches([lengths[i] for i in own], budget, padded=padded,
            count=count)]
        for own in parts
    ]
    fullest = max(map(len, shares))
    return [share + [[]] * (fullest - len(share)) for share in shares for _ in range(cp)]


def taken(
    sequences: Sequence[TrainSequence], batches: Sequence[Sequence[int]], spec: TrainerSpec
) -> list[PackedBatch]:
    """A rank's micro-batches, as `dealt` numbers their sequences."""
    return [
        packed([sequences[number] for number in numbers]) if numbers
        else empty_batch(sequences[0].columns, spec.context_parallel)
        for numbers in batches
    ]


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


def empty_batch(columns: Iterable[str] = (), sharing: int = 1) -> PackedBatch:
    """Two tokens a rank without a target: it takes part in the collectives and adds exactly 0 to the loss. One token
    would be compiled anew, for sizes of 1 are known to a graph.
    """
    return packed([TrainSequence.plain([0] * (2 * sharing)).with_columns(**dict.fromkeys(columns, 0.0))])


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


def by_sample(batch: PackedBatch, values: Tensor) -> dict[int, Floats]:
    """One value a target, (N,), back to the samples: for each, one value a completion token, 0 where the mask is False.
    Fillers are left out.
    """
    dense = torch.zeros(len(batch.token_ids), dtype=values.dtype)
    if batch.target_mask.any():
        dense[batch.target_mask] = values.detach().cpu()
    rows = torch.split(dense, batch.cu_seqlens.diff().tolist())
    return {
        index: row[prompt - 1 : -1].numpy()
        for index, prompt, row in zip(batch.indices, batch.prompt_lengths, rows, strict=True) if index >= 0
    }
