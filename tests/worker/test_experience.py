"""Packing: every token exactly once, in bounds, deterministic, as many micro-batches on each rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_worker.experience import PackedBatch, TrainSequence, chunks, empty_batch, equalise, pack, split, to_train_sequences
from tests.worker.samples import a_sample, scored, sequences

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=24)
BUDGETS = st.integers(1, 64)


def unpack(batch: PackedBatch) -> list[TrainSequence]:
    """The sequences of a micro-batch, from its tensors alone."""
    found = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        mask = batch.target_mask[start:end]
        prompt = end - start - int(mask.sum())
        assert mask.tolist() == [False] * (prompt - 1) + [True] * int(mask.sum()) + [False]
        tokens = batch.token_ids[start:end].tolist()
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        assert batch.targets[start:end][mask].tolist() == tokens[prompt:]
        weights = set(batch.loss_weights[start:end][mask].tolist())
        assert len(weights) <= 1
        found.append(
            TrainSequence(
                token_ids=tokens,
                prompt_length=prompt,
                rollout_logprobs=batch.rollout_logprobs[start:end][mask].tolist(),
                advantages=batch.advantages[start:end][mask].tolist(),
                loss_weight=weights.pop() if weights else 0.0,
            )
        )
    for name in ("targets", "advantages", "rollout_logprobs", "loss_weights"):
        assert not getattr(batch, name)[~batch.target_mask].any(), f"{name} must be 0 where nothing is predicted"
    return found


def key(sequence: TrainSequence) -> tuple[object, ...]:
    floats = torch.tensor([*sequence.rollout_logprobs, *sequence.advantages], dtype=torch.float32).tolist()
    weight = torch.tensor(sequence.loss_weight if sequence.advantages else 0.0, dtype=torch.float32).item()
    return (*sequence.token_ids, sequence.prompt_length, *floats, weight)


@given(LENGTHS, BUDGETS)
def test_every_sequence_is_packed_exactly_once_and_unchanged(lengths: list[tuple[int, int]], budget: int) -> None:
    given_ = sequences(lengths)
    found = [sequence for batch in pack(given_, budget) for sequence in unpack(batch)]
    assert sorted(map(key, found)) == sorted(map(key, given_))


@given(LENGTHS, BUDGETS)
def test_the_budget_holds_unless_one_sequence_is_longer(lengths: list[tuple[int, int]], budget: int) -> None:
    for batch in pack(sequences(lengths), budget):
        count, total = len(batch.cu_seqlens) - 1, len(batch.token_ids)
        assert total <= budget or count == 1
        assert batch.cu_seqlens[-1] == total
        assert batch.max_length == max((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())


@given(LENGTHS, BUDGETS, st.integers(1, 6))
def test_packing_and_splitting_are_deterministic(lengths: list[tuple[int, int]], budget: int, parts: int) -> None:
    first, second = ([pack(part, budget) for part in split(sequences(lengths), parts) if part] for _ in range(2))
    assert [[b.token_ids.tolist() for b in part] for part in first] == [[b.token_ids.tolist() for b in part] for part in second]


@given(LENGTHS, BUDGETS, st.integers(1, 6))
def test_every_rank_runs_as_many_micro_batches(lengths: list[tuple[int, int]], budget: int, parts: int) -> None:
    ranks = equalise([pack(part, budget) for part in split(sequences(lengths), parts)])
    assert len({len(batches) for batches in ranks}) == 1
    weights = sum(float(batch.loss_weights.sum()) for batches in ranks for batch in batches)
    filled = sum(1 for _, completion in lengths if completion)
    assert weights == pytest.approx(filled / len(lengths), abs=1e-5), "the fillers weigh nothing"


@given(LENGTHS, st.integers(1, 6))
def test_split_keeps_every_sequence_and_balances_tokens(lengths: list[tuple[int, int]], parts: int) -> None:
    given_ = sequences(lengths)
    ranks = split(given_, parts)
    assert sorted(map(key, (s for rank in ranks for s in rank))) == sorted(map(key, given_))
    loads = [sum(s.length for s in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(s.length for s in given_)
    if len(given_) >= parts:
        assert all(ranks)


def test_first_fit_decreasing_needs_few_micro_batches() -> None:
    assert [len(b.token_ids) for b in pack(sequences([(1, 5), (1, 3), (1, 1), (1, 2), (1, 4), (1, 0)]), 8)] == [8, 8, 5]


def test_the_filler_is_one_token_without_a_target() -> None:
    batch = empty_batch()
    assert batch.token_ids.tolist() == [0]
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert not batch.target_mask.any()


def test_dtypes() -> None:
    (batch,) = pack(sequences([(2, 3)]), 100)
    assert {name: getattr(batch, name).dtype for name in ("token_ids", "position_ids", "cu_seqlens", "target_mask", "targets")} == {
        "token_ids": torch.int64,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "target_mask": torch.bool,
        "targets": torch.int64,
    }
    assert batch.advantages.dtype == batch.rollout_logprobs.dtype == batch.loss_weights.dtype == torch.float32


def test_token_weights_are_the_mean_over_sequences_of_the_mean_over_tokens() -> None:
    found = to_train_sequences([scored(a_sample(tokens=2)), scored(a_sample(tokens=8))], [1.0, -1.0])
    assert [s.loss_weight for s in found] == [1 / 4, 1 / 16]
    assert [s.advantages for s in found] == [[1.0] * 2, [-1.0] * 8]
    assert found[0].token_ids == [10, 11, 12, 50, 51]
    assert found[0].prompt_length == 3


def test_an_empty_completion_is_a_sequence_without_targets() -> None:
    (sequence,) = to_train_sequences([scored(a_sample(tokens=0))], [1.0])
    (batch,) = pack([sequence], 8)
    assert not batch.target_mask.any()
    assert not batch.loss_weights.any()


def test_a_sample_with_a_logprob_missing_is_refused() -> None:
    sample = a_sample(tokens=2)
    sample.logprobs.pop()
    with pytest.raises(ValueError, match="prompt 0:0: 2 tokens but 1 logprobs"):
        to_train_sequences([scored(sample)], [1.0])


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunks_are_in_order_and_even(size: int, count: int) -> None:
    found = chunks(range(size), count)
    assert [i for chunk in found for i in chunk] == list(range(size))
    assert len(found) == count
    assert max(map(len, found)) - min(map(len, found)) <= 1
