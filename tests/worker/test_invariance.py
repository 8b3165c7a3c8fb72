"""Loss and gradient of a tiny attention model do not depend on micro-batch size, packing, ranks or order; the oracle
pads and loops.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import backward

from rlhf_api.algorithms import fill
from rlhf_api.job import AlgorithmSpec, CorrectionSpec
from rlhf_worker.algorithm.losses import policy_loss
from rlhf_worker.experience import PackedBatch, TrainSequence, at_targets, pack
from tests.worker.samples import by_token, parted, sequences

VOCABULARY, WIDTH, CLIP, BETA = 23, 8, 0.2, 0.1
SPEC = fill(AlgorithmSpec(clip_low=CLIP, clip_high=CLIP, correction=CorrectionSpec(token_cap=0)), 100)


class Tiny(nn.Module):
    """One layer of masked attention over tokens and positions, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def forward(self, token_ids: Tensor, position_ids: Tensor, allowed: Tensor) -> Tensor:
        """(..., T), (..., T), (..., T, T) -> log probabilities (..., T, V)."""
        hidden = self.tokens(token_ids) + self.positions(position_ids)
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        scores = (query @ key.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
        return torch.log_softmax(self.head(hidden + scores.softmax(-1) @ value), dim=-1)


def packed_loss(model: Tiny, reference: Tiny, batch: PackedBatch) -> Tensor:
    allowed = (batch.sequence[:, None] == batch.sequence[None, :]).tril()
    mask = batch.target_mask if batch.target_mask.any() else torch.arange(len(batch.token_ids)) == 0
    new, ref = (
        m(batch.token_ids, batch.position_ids, allowed).gather(-1, batch.targets[:, None])[:, 0][mask]
        for m in (model, reference)
    )
    columns, sequence = at_targets(batch, torch.device("cpu"))
    columns = {name: column.double() for name, column in columns.items()}
    columns |= {
        "old_logprobs": columns["rollout_logprobs"], "ref_logprobs": ref, "kl_weights": BETA * columns["loss_weights"],
    }
    return policy_loss(SPEC, new, torch.zeros_like(new), columns, sequence)[0]


def oracle_loss(model: Tiny, reference: Tiny, items: list[TrainSequence]) -> Tensor:
    """Right-padded to one length, one term a token, the mean over sequences of the mean over tokens: by the book,
    nothing shared with the product.
    """
    longest = max(s.length for s in items)
    token_ids = torch.tensor([s.token_ids.tolist() + [0] * (longest - s.length) for s in items])
    positions = torch.arange(longest).expand(len(items), -1)
    allowed = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(items), -1, -1)
    new, ref = model(token_ids, positions, allowed), reference(token_ids, positions, allowed)
    total = torch.zeros((), dtype=torch.float64)
    for i, item in enumerate(items):
        terms = [_term(new, ref, item, i, t) for t in range(item.prompt_length, item.length)]
        if terms:
            total = total + torch.stack(terms).mean() / len(items)
    return total


def _term(new: Tensor, ref: Tensor, item: TrainSequence, i: int, t: int) -> Tensor:
    token, c = int(item.token_ids[t]), t - item.prompt_length
    logprob, (advantage, old) = new[i, t - 1, token], (by_token(item, n)[c] for n in ("advantages", "rollout_logprobs"))
    ratio = torch.exp(logprob - old)
    d = logprob - ref[i, t - 1, token].detach()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -surrogate + BETA * (torch.exp(-d) - 1 + d).clamp(max=10)


def gradients(model: Tiny) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def measured(model: Tiny, losses: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    for loss in losses:
        if loss.requires_grad:
            backward(loss)
    return torch.stack([loss.detach() for loss in losses]).sum(), gradients(model)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_the_padded_oracle(
    lengths: list[tuple[int, int]], budget: int, parts: int, seed: int,
) -> None:
    items = sequences(lengths, seed, VOCABULARY)
    model, reference = Tiny(seed), Tiny(seed + 1)
    expected, wanted = measured(model, [oracle_loss(model, reference, items)])
    ranks = [pack(part, budget) for part in parted(items, parts) if part]
    loss, found = measured(model, [packed_loss(model, reference, batch) for batches in ranks for batch in batches])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_fsdp_averages_so_each_rank_multiplies_by_their_number() -> None:
    items = sequences([(2, 5), (3, 1), (1, 9), (4, 4), (2, 2)])
    model, reference = Tiny(0), Tiny(1)
    _, wanted = measured(model, [oracle_loss(model, reference, items)])
    per_rank = [
        measured(model, [3 * packed_loss(model, reference, b) for b in pack(part, 8)])[1] for part in parted(items, 3)
    ]
    for rank_gradients, want in zip(zip(*per_rank, strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.stack(rank_gradients).mean(0), want, rtol=1e-5, atol=1e-6)


def test_the_mean_of_micro_batch_means_would_have_been_seen() -> None:
    """The usual bug, on the same numbers: the test above can fail."""
    items = sequences([(2, 1), (2, 9), (2, 9)])
    model, reference = Tiny(0), Tiny(1)
    expected = oracle_loss(model, reference, items).detach()
    batches = pack(items, 14)
    assert len(batches) == 2
    wrong = torch.stack(
        [packed_loss(model, reference, b).detach() / b.columns["loss_weights"].sum() for b in batches]
    ).mean()
    assert wrong != pytest.approx(float(expected), rel=1e-3)
