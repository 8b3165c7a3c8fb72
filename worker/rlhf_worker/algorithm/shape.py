"""From scored samples to what the optimizer's updates are made of: advantages, returns and each token's weight in the one sum of its update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_api.job import AlgorithmSpec
from rlhf_worker.algorithm import advantage, losses
from rlhf_worker.experience import TrainSequence, chunks


@dataclass(frozen=True, slots=True)
class Shaped:
    updates: list[list[TrainSequence]]  # each the samples of one optimizer update, over all ranks
    metrics: dict[str, float]


def passes(spec: AlgorithmSpec, updates: int) -> dict[str, str]:
    """The forward passes that a step needs before `shape`: column -> role. `updates`: optimizer updates of the step.

    With one update the policy that is trained is the policy at the step's begin, and its own training pass says what the old
    log probabilities are; only a KL term in the rewards wants them earlier.
    """
    found = {}
    if updates > 1 or (spec.kl.coefficient > 0 and spec.kl.place == "reward"):
        found["old_logprobs"] = "policy"
    if spec.kl.coefficient > 0:
        found["ref_logprobs"] = "reference"
    return found


def shape(
    spec: AlgorithmSpec, kl_coefficient: float, sequences: Sequence[TrainSequence], rewards: Sequence[float], groups: Sequence[int],
    *, updates: int, max_tokens: int,
) -> Shaped:  # fmt: skip
    """All B samples of a step, over all ranks, cut into `updates`, with the columns that the losses want.

    `rewards` and `groups` have one entry a sample; samples of one prompt have one group number. Columns added: advantages, loss_weights,
    token_weights (1 / targets of the update: what metrics are weighted with) and, with the KL in the loss, kl_weights.
    """
    table = torch.tensor(rewards, dtype=torch.float32)
    if kl_coefficient > 0 and spec.kl.place == "reward":
        table = table - kl_coefficient * torch.tensor([_kl(spec, s).sum() for s in sequences])
    advantages = advantage.grpo(table.view(max(groups) + 1, -1)).flatten().tolist()
    shaped = [s.with_columns(advantages=[a] * len(s.mask)) for s, a in zip(sequences, advantages, strict=True)]
    return Shaped([_weighted(spec, kl_coefficient, part) for part in chunks(shaped, updates)], {})


def _kl(spec: AlgorithmSpec, sequence: TrainSequence) -> torch.Tensor:
    """(tokens,)"""
    old, ref = (torch.tensor(sequence.columns[name]) for name in ("old_logprobs", "ref_logprobs"))
    return losses.kl(spec.kl.estimator, old, ref)


def _weighted(spec: AlgorithmSpec, kl_coefficient: float, sequences: list[TrainSequence]) -> list[TrainSequence]:
    total, made = sum(s.targets for s in sequences), []
    for s in sequences:
        weight = 1.0 / (len(sequences) * max(s.targets, 1))
        columns = {"loss_weights": weight, "token_weights": 1.0 / max(total, 1)}
        if kl_coefficient > 0 and spec.kl.place == "loss":
            columns["kl_weights"] = kl_coefficient * weight
        made.append(s.with_columns(**{name: [value] * len(s.mask) for name, value in columns.items()}))
    return made
