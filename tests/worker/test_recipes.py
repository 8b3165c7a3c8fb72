"""Each algorithm from rewards to gradient against an oracle by the book: whatever the micro-batches, ranks and packing,
and with observations.

The oracle pads, loops over samples and tokens, and shares no line with the product.
"""

import math
import random
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_api.algorithms import Algorithm, fill
from rlhf_api.job import AlgorithmSpec, TrainerSpec
from rlhf_worker.algorithm.losses import policy_loss, value_loss
from rlhf_worker.algorithm.shape import shape
from rlhf_worker.experience import PackedBatch, TrainSequence, at_targets
from tests.worker.samples import a_sequence, by_token, dealt, sequences
from tests.worker.test_invariance import VOCABULARY, Tiny, measured

K, MAX_TOKENS, BETA = 3, 12, 0.3
ON_LOSS, ON_REWARD = {"kl": {"coefficient": BETA, "place": "loss"}}, {"kl": {"coefficient": BETA, "place": "reward"}}
RECIPES: list[dict[str, Any]] = [
    {"name": "ppo", **ON_REWARD, "gae": {"gamma": 0.97, "lambda": 0.9}, "dualClip": 1.1},
    {"name": "grpo", **ON_LOSS},
    {"name": "grpo", **ON_REWARD},
    {"name": "rloo", **ON_REWARD, "correction": {"tokenCap": 1.5, "tokenMin": 0.3, "tokenMax": 4}},
    {"name": "reinforce++", **ON_REWARD},
    {"name": "reinforce++-baseline", **ON_LOSS},
    {"name": "dr_grpo", "correction": {"sequenceMin": 0.7, "sequenceMax": 1.5}},
    {"name": "dapo"},
    {"name": "gspo", "clipLow": 0.2, "clipHigh": 0.3, "correction": {"tokenCap": 0}},
    {"name": "cispo", "clipLow": 0.3, "clipHigh": 0.5},
]


@dataclass
class Step:
    """Whole groups of K samples with random columns, masks and rewards, and the numbers of one tiny model at every
    token.
    """

    items: list[TrainSequence]
    rewards: list[float]
    model: Tiny

    @staticmethod
    def random(lengths: list[tuple[int, int]], seed: int) -> "Step":
        rng = random.Random(seed)
        made = []
        for s in sequences(lengths, seed, VOCABULARY):
            columns = {
                name: [-rng.random() * 3 for _ in s.mask] for name in ("rollout_logprobs", "ref_logprobs", "values")
            }
            columns["old_logprobs"] = [value + rng.uniform(-0.6, 0.6) for value in columns["rollout_logprobs"]]
            mask = [rng.random() < 0.7 for _ in s.mask]
            made.append(a_sequence(s.token_ids.tolist(), s.prompt_length, s.index, mask, columns))
        return Step(made, [rng.choice([0.0, 1.0, 0.5]) for _ in made], Tiny(seed))

    @property
    def groups(self) -> list[int]:
        return [i // K for i in range(len(self.items))]

    def new(self, item: TrainSequence) -> Tensor:
        """Log probabilities of the tokens that count, this sequence alone."""
        ids, length = torch.tensor(item.token_ids), item.length
        table = self.model(ids, torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril())
        where = [t for t in range(item.prompt_length, length) if item.mask[t - item.prompt_length]]
        made: Tensor = table[[t - 1 for t in where], ids[where]]
        return made

    def column(self, item: TrainSequence, name: str) -> list[float]:
        return [value for value, counts in zip(by_token(item, name), item.mask, strict=True) if counts]


def product(step: Step, spec: Algorithm, ranks: int, budget: int) -> list[Tensor]:
    """The loss of every micro-batch of every rank."""
    whole = [range(len(step.items))]
    made = shape(
        spec, spec.kl.coefficient, step.items, step.rewards, step.groups, updates=whole, max_tokens=MAX_TOKENS
    )
    (part,) = made.updates
    return [
        _batch_loss(step.model, spec, batch)
        for batches in dealt(part, ranks, TrainerSpec(steps=1, gpus=ranks, tokens_per_micro_batch=budget))
        for batch in batches
    ]


def _batch_loss(model: Tiny, spec: Algorithm, batch: PackedBatch) -> Tensor:
    allowed = (batch.sequence[:, None] == batch.sequence[None, :]).tril()
    mask = batch.target_mask if batch.target_mask.any() else torch.arange(len(batch.token_ids)) == 0
    new = model(batch.token_ids, batch.position_ids, allowed).gather(-1, batch.targets[:, None])[:, 0][mask]
    columns, sequence = at_targets(batch, torch.device("cpu"))
    columns = {name: column.double() for name, column in columns.items()}
    loss = policy_loss(spec, new, torch.zeros_like(new), columns, sequence)[0]
    return loss + value_loss(spec, new, columns)[0] if spec.name == "ppo" else loss


def kl_of(spec: Algorithm, d: Any) -> Any:
    exp = torch.exp if isinstance(d, Tensor) else math.exp
    return {"k1": d, "k2": d * d / 2, "k3": exp(-d) - 1 + d}[spec.kl.estimator]


def oracle_advantages(step: Step, spec: Algorithm) -> tuple[list[list[float]], list[list[float]]]:
    penalties = []
    for item in step.items:
        pairs = zip(step.column(item, "old_logprobs"), step.column(item, "ref_logprobs"), strict=True)
        penalties.append(
            [
                BETA * kl_of(spec, old - ref) if spec.kl.coefficient and spec.kl.place == "reward" else 0.0
                for old, ref in pairs
            ]
        )
    buffer = spec.overlong.buffer_tokens
    rewards = [
        r - (max(0, len(s.mask) - MAX_TOKENS + buffer) / buffer if buffer else 0)
        for r, s in zip(step.rewards, step.items, strict=True)
    ]
    made: list[list[float]] = []
    returns: list[list[float]] = []
    for i, item in enumerate(step.items):
        if spec.name in ("ppo", "reinforce++"):
            values = step.column(item, "values") if spec.name == "ppo" else [0.0] * item.targets
            gamma, lam = (0.97, 0.9) if spec.name == "ppo" else (1.0, 1.0)
            row, carried, following = list[float](), 0.0, 0.0
            for t in reversed(range(item.targets)):
                carried = -penalties[i][t] + (
                    rewards[i] if t == item.targets - 1 else 0
                ) + gamma * following - values[t] + gamma * lam * carried
                following = values[t]
                row.insert(0, carried)
            made.append(row)
            returns.append([a + v for a, v in zip(row, values, strict=True)])
        else:
            totals = [rewards[j] - sum(penalties[j]) for j in range(len(rewards)) if j // K == i // K]
            own = rewards[i] - sum(penalties[i])
            value = own - (sum(totals) - own) / (K - 1) if spec.name == "rloo" else own - statistics.mean(totals)
            made.append(
                [
                    value / (statistics.stdev(totals) + 1e-6) if spec.advantage_normalization == "group" else value
                ] * item.targets
            )
    if spec.advantage_normalization == "batch":
        counted = [a for row in made for a in row]
        if len(set(counted)) > 1:
            made = [[(a - statistics.mean(counted)) / (statistics.stdev(counted) + 1e-6) for a in row] for row in made]
        else:
            made = [[0.0 for _ in row] for row in made]
    return made, returns


def oracle(step: Step, spec: Algorithm) -> Tensor:
    advantages, returns = oracle_advantages(step, spec)
    total = torch.zeros((), dtype=torch.float64)
    tokens, size = sum(s.targets for s in step.items), len(step.items)
    for i, item in enumerate(step.items):
        if not item.targets:
            continue
        new = step.new(item)
        old, rollout, ref = (
            torch.tensor(step.column(item, name), dtype=torch.float64)
            for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")
        )
        terms = torch.stack([oracle_term(spec, new, old, t, advantages[i][t]) for t in range(item.targets)])
        terms = terms * oracle_factor(spec, old - rollout)
        if spec.name == "ppo":
            was, want = (torch.tensor(x, dtype=torch.float64) for x in (step.column(item, "values"), returns[i]))
            near = torch.minimum(torch.maximum(new, was - spec.value_clip), was + spec.value_clip)
            terms = terms + torch.maximum((new - want) ** 2, (near - want) ** 2) / 2
        if spec.kl.coefficient and spec.kl.place == "loss":
            terms = terms + BETA * kl_of(spec, new - ref).clamp(max=10)
        divisor = {
            "tokens": tokens, "sequences": size * item.targets, "constant": size * MAX_TOKENS,
        }[spec.loss_aggregation]
        total = total + terms.sum() / divisor
    return total


def oracle_term(spec: Algorithm, new: Tensor, old: Tensor, t: int, advantage: float) -> Tensor:
    ratio = (new - old).mean().exp() if spec.name == "gspo" else (new[t] - old[t]).exp()
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    if spec.name == "cispo":
        return -min(max(float(ratio.detach()), low), high) * advantage * new[t]
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    return loss.clamp(max=-spec.dual_clip * advantage) if spec.dual_clip and advantage < 0 else loss


def oracle_factor(spec: Algorithm, d: Tensor) -> Tensor:
    c = spec.correction
    geometric = math.exp(float(d.mean()))
    if geometric < c.sequence_min or (c.sequence_max and geometric > c.sequence_max):
        return torch.zeros_like(d)
    kept = [w >= c.token_min and (not c.token_max or w <= c.token_max) for w in d.exp()]
    return torch.stack(
        [
            (w.clamp(max=c.token_cap) if c.token_cap else torch.ones_like(w)) * keep
            for w, keep in zip(d.exp(), kept, strict=True)
        ]
    )


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe['name']}-{recipe.get('kl', {}).get('place', 'nokl')}",
)
@settings(max_examples=8)
@example(lengths=[(1, 0), (1, 0), (1, 4)], budget=1, ranks=1, seed=0)  # a step of observations alone
@given(
    lengths=st.integers(1, 2).flatmap(
        lambda n: st.lists(st.tuples(st.integers(1, 4), st.integers(0, MAX_TOKENS)), min_size=n * K, max_size=n * K)
    ),
    budget=st.integers(1, 60),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_the_oracle(
    recipe: dict[str, Any], lengths: list[tuple[int, int]], budget: int, ranks: int, seed: int,
) -> None:
    spec, step = fill(AlgorithmSpec.model_validate(recipe), MAX_TOKENS), Step.random(lengths, seed)
    wanted, gradients = measured(step.model, [oracle(step, spec)])
    found, made = measured(step.model, product(step, spec, ranks, budget))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if not gradients:  # nothing counts in this step
        assert not any(g.any() for g in made)
    for got, want in zip(made, gradients or made, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe['name']}-{recipe.get('kl', {}).get('place', 'nokl')}",
)
def test_what_an_observation_carries_in_its_columns_changes_nothing(recipe: dict[str, Any]) -> None:
    spec, step = fill(AlgorithmSpec.model_validate(recipe), MAX_TOKENS), Step.random([(2, 9), (1, 12), (3, 7)], 5)
    first = measured(step.model, product(step, spec, 1, 60))
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values"):
        for item in step.items:
            item.columns[name] = np.where(item.mask, item.columns[name], -9.0)
    second = measured(step.model, product(step, spec, 1, 60))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
