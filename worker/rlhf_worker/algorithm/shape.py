"""From scored samples to what the optimizer's updates are made of: advantages, returns and each token's weight in the
one sum of its update.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_api.algorithms import UNGROUPED, Algorithm
from rlhf_worker.algorithm import advantage
from rlhf_worker.algorithm.divergence import kl
from rlhf_worker.experience import Column, TrainSequence


@dataclass(frozen=True, slots=True)
class Shaped:
    updates: list[list[TrainSequence]]  # each the samples of one optimizer update, over all ranks
    advantages: list[Column]  # of each sample: of all its tokens, or of each
    metrics: dict[str, float]


def passes(spec: Algorithm, updates: int) -> dict[str, str]:
    """The forward passes that a step needs before `shape`: column -> role. `updates`: of the step, all epochs.

    With one update the policy that is trained is the policy at the step's begin, and its own training pass says what
    the old log probabilities are; only a KL term in the rewards wants them earlier. """
    found = {}
    if updates > 1 or _penalises(spec):
        found["old_logprobs"] = "policy"
    if spec.kl.coefficient > 0:
        found["ref_logprobs"] = "reference"
    if spec.name == "ppo":
        found["values"] = "critic"
    return found


def informative(rewards: Sequence[float]) -> bool:
    """Whether a prompt's samples teach anything: some are better than others. What dynamic sampling (DAPO, arXiv
    2503.14476) keeps.
    """
    return max(rewards) > min(rewards)


def shape(
    spec: Algorithm, kl_coefficient: float, sequences: Sequence[TrainSequence], rewards: Sequence[float],
    groups: Sequence[int],
    *, updates: Sequence[Sequence[int]], max_tokens: int, parts: Mapping[str, Sequence[float]] | None = None,
    custom: Callable[..., tuple[Tensor, dict[str, Any]]] | None = None,
) -> Shaped:  # fmt: skip
    """All B samples of a step, over all ranks, in the `updates` that name them, with the columns that the losses want.

    `rewards` and `groups` have one entry a sample; samples of one prompt have one group number. `max_tokens`: of one
    completion. `custom`: in place of the algorithm's advantages, with `parts`, each reward's own values.
    Columns added: advantages, loss_weights, token_weights (1 / targets of the update: what metrics are weighted with);
    with a critic returns; with the KL in the loss kl_weights. What all tokens of a sample have alike is one number.
    """
    punished = overlong(spec, [len(s.mask) for s in sequences], max_tokens)
    mask = _padded([s.mask for s in sequences]) > 0
    penalty = kl_coefficient * _reference_kl(spec, sequences) * mask if _penalises(spec) else torch.zeros(
        (len(sequences), 1), dtype=torch.float64,
    )
    outcome, numbers = torch.tensor(rewards, dtype=torch.float64) - punished, torch.tensor(groups)
    advantages, returns = _advantages(spec, outcome, penalty, numbers, mask, sequences)
    metrics = {"kl/coefficient": kl_coefficient} if spec.kl.coefficient else {}
    if custom:
        tables = {name: _table(sequences, name) for name in sequences[0].columns}
        values = {name: torch.tensor(own, dtype=torch.float64) for name, own in (parts or {}).items()}
        estimate, told = custom(
            rewards=outcome - penalty.sum(1), groups=numbers, mask=mask, columns=tables, parts=values
        )
        advantages = estimate * mask if estimate.dim() == 2 else estimate
        metrics |= {name: float(value) for name, value in told.items()}
    columns = {"advantages": advantages} | ({"returns": returns} if spec.name == "ppo" else {})
    rows = {name: values.detach().float().numpy() for name, values in columns.items()}
    shaped = [
        s.with_columns(**{name: _own(values[i], len(s.mask)) for name, values in rows.items()})
        for i, s in enumerate(sequences)
    ]
    if spec.overlong.buffer_tokens:
        metrics["reward/overlong"] = -punished.mean().item()
    mini_batches = [_weighted(spec, kl_coefficient, [shaped[i] for i in numbers], max_tokens) for numbers in updates]
    return Shaped(mini_batches, [s.columns["advantages"] for s in shaped], metrics)


def overlong(spec: Algorithm, lengths: Sequence[int], max_tokens: int) -> Tensor:
    """What each sample's reward loses for its length in tokens, (B,): 0 up to the buffer, then linearly to `penalty` at
    `max_tokens` (DAPO).
    """
    buffer = spec.overlong.buffer_tokens
    over = torch.tensor(lengths, dtype=torch.float64) - (max_tokens - buffer)
    return spec.overlong.penalty * (over / buffer).clamp(0, 1) if buffer else torch.zeros_like(over)


def _own(values: Any, tokens: int) -> Column:
    """A sample's number, or those of its tokens."""
    return values[:tokens] if values.ndim else float(values)


def _penalises(spec: Algorithm) -> bool:
    return spec.kl.coefficient > 0 and spec.kl.place == "reward"


def _table(sequences: Sequence[TrainSequence], column: str) -> Tensor:
    """(B, T); a sample's number is that of each of its tokens."""
    return _padded([np.broadcast_to(s.columns[column], len(s.mask)) for s in sequences])


def _padded(rows: Sequence[Any]) -> Tensor:
    """(B, T) float64, padded with 0."""
    table = np.zeros((len(rows), max(map(len, rows))))
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(table)


def _reference_kl(spec: Algorithm, sequences: Sequence[TrainSequence]) -> Tensor:
    """(B, T)"""
    return kl(spec.kl.estimator, _table(sequences, "old_logprobs"), _table(sequences, "ref_logprobs"))


def _advantages(
    spec: Algorithm, rewards: Tensor, penalty: Tensor, groups: Tensor, mask: Tensor, sequences: Sequence[TrainSequence]
) -> tuple[Tensor, Tensor]:
    """Advantages, (B, T), or (B,) where all tokens of a sample have the same; and returns, (B, T).

    `penalty` (B, T or 1) is each token's, `rewards` (B,) each sample's, given at its last token that counts.
    """
    if spec.name in UNGROUPED:
        ppo = spec.name == "ppo"
        values = _table(sequences, "values") if ppo else torch.zeros(mask.shape, dtype=torch.float64)
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        advantages, returns = advantage.gae(
            last * rewards[:, None] - penalty, values, mask, spec.gae.gamma if ppo else 1.0,
            spec.gae.lam if ppo else 1.0,
        )
    else:
        estimate = advantage.leave_one_out if spec.name == "rloo" else advantage.centred
        outcome = estimate(rewards - penalty.sum(1), groups)
        outcome = advantage.by_deviation(outcome, groups) if spec.advantage_normalization == "group" else outcome
        advantages, returns = outcome, penalty
    if spec.advantage_normalization == "batch":
        each = advantages if advantages.dim() == 2 else advantages[:, None] * mask
        advantages = advantage.whiten(each, mask)
    return advantages, returns


def _weighted(
    spec: Algorithm, kl_coefficient: float, sequences: list[TrainSequence], max_tokens: int,
) -> list[TrainSequence]:
    """All samples of one update over all ranks, each token with its weight in the update's one sum."""
    size, total, made = len(sequences), max(1, sum(s.targets for s in sequences)), []
    for s in sequences:
        weight = {
            "tokens": 1 / total, "sequences": 1 / (size * max(1, s.targets)), "constant": 1 / (size * max_tokens),
        }[spec.loss_aggregation]
        columns = {"loss_weights": weight, "token_weights": 1 / total}
        if spec.kl.coefficient > 0 and spec.kl.place == "loss":
            columns["kl_weights"] = kl_coefficient * weight
        made.append(s.with_columns(**columns))
    return made
