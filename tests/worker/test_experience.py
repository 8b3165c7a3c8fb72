"""Packing: every token exactly once, in bounds, deterministic, as many micro-batches on each rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_api.job import TrainerSpec
from rlhf_worker.experience import (
    ATTENTION_EVEN,
    PackedBatch,
    TrainSequence,
    _bins,
    add_column,
    at_targets,
    by_sample,
    chunks,
    cost,
    empty_batch,
    mini_batches,
    pack,
    to_train_sequences,
)
from tests.worker.samples import a_sample, a_sequence, by_token, dealt, listed, parted, sequences

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=24)
BUDGETS = st.integers(1, 64)


CPU = torch.device("cpu")


def unpack(batch: PackedBatch) -> list[TrainSequence]:
    """The sequences of a micro-batch, from its tensors alone."""
    found = []
    for number, (start, end) in enumerate(
        zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    ):
        prompt, tokens = batch.prompt_lengths[number], batch.token_ids[start:end].tolist()
        mask = batch.target_mask[start:end].tolist()
        assert not any(mask[: prompt - 1]) and not mask[-1]
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        assert batch.targets[start:end].tolist() == [0] * (prompt - 1) + tokens[prompt:] + [0]
        assert set(batch.sequence[start:end].tolist()) == {number}
        columns = {name: column[start:end].tolist() for name, column in batch.columns.items()}
        assert not any(any(column[: prompt - 1]) or column[-1] for column in columns.values())
        inner = {name: column[prompt - 1 : -1] for name, column in columns.items()}
        found.append(
            a_sequence(tokens, prompt, batch.indices[number], mask[prompt - 1 : -1], inner)
        )
    return found


def masked(given_: list[TrainSequence]) -> list[TrainSequence]:
    """Every third completion token is an observation."""
    return [replace(s, mask=np.arange(len(s.mask)) % 3 != 1) for s in given_]


def key(sequence: TrainSequence) -> tuple[object, ...]:
    floats = [
        np.broadcast_to(np.float32(column), len(sequence.mask)).tolist()
        for _, column in sorted(sequence.columns.items())
    ]
    return (
        sequence.index, sequence.token_ids.tolist(), sequence.prompt_length, sequence.mask.tolist(),
        sorted(sequence.columns), floats,
    )


@given(LENGTHS, BUDGETS)
def test_every_sequence_is_packed_exactly_once_and_unchanged(lengths: list[tuple[int, int]], budget: int) -> None:
    given_ = masked(sequences(lengths))
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
    first, second = ([pack(part, budget) for part in parted(sequences(lengths), parts) if part] for _ in range(2))
    assert [[b.token_ids.tolist() for b in part] for part in first] == [
        [b.token_ids.tolist() for b in part] for part in second
    ]


@given(LENGTHS, BUDGETS, st.integers(1, 6))
def test_every_rank_runs_as_many_micro_batches(lengths: list[tuple[int, int]], budget: int, parts: int) -> None:
    spec = TrainerSpec(steps=1, gpus=parts, tokens_per_micro_batch=budget)
    ranks = dealt(sequences(lengths), parts, spec)
    assert len({len(batches) for batches in ranks}) == 1
    weights = sum(float(batch.columns["loss_weights"].sum()) for batches in ranks for batch in batches)
    filled = sum(1 for _, completion in lengths if completion)
    assert weights == pytest.approx(filled / len(lengths), abs=1e-5), "the fillers weigh nothing"


@given(LENGTHS, st.integers(1, 6))
def test_split_keeps_every_sequence_and_balances_tokens(lengths: list[tuple[int, int]], parts: int) -> None:
    given_ = sequences(lengths)
    ranks = parted(given_, parts)
    assert sorted(map(key, (s for rank in ranks for s in rank))) == sorted(map(key, given_))
    loads = [sum(cost(s.length) for s in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(cost(s.length) for s in given_) * 1.0001
    if len(given_) >= parts:
        assert all(ranks)


def test_micro_batches_are_as_few_as_first_fit_finds_and_of_one_size() -> None:
    items = sequences([(1, 5), (1, 3), (1, 1), (1, 2), (1, 4), (1, 0)])
    assert [len(b.token_ids) for b in pack(items, 8)] == [7, 7, 7]
    assert [len(b.token_ids) for b in pack(items, 8, padded=True)] == [7, 6, 5, 3]


@given(LENGTHS, BUDGETS)
def test_the_dearest_micro_batch_comes_first_and_none_is_needless(lengths: list[tuple[int, int]], budget: int) -> None:
    """Memory that is too small for the largest shows in the first; ranks meet batches of like size."""
    items = sequences(lengths)
    batches = pack(items, budget)
    costs = [sum(map(cost, batch.cu_seqlens.diff().tolist())) for batch in batches]
    assert costs == sorted(costs, reverse=True)
    assert len(batches) <= len(_bins([s.length for s in items], budget, padded=False))


def test_attention_counts_beside_tokens() -> None:
    """16 sequences of 2,048 tokens are cheaper than one of as many: each rank gets the same work, not the same tokens.
    """
    items = sequences([(1, ATTENTION_EVEN - 1), *[(1, 2047)] * 30])
    long, short = parted(items, 2)
    costs = [sum(cost(s.length) for s in part) for part in (long, short)]
    assert max(costs) / min(costs) < 1.05
    assert sum(s.length for s in long) < 0.85 * sum(s.length for s in short)


@given(st.lists(st.integers(8, 128), min_size=64, max_size=96), st.integers(1, 4))
def test_many_short_sequences_make_micro_batches_of_nearly_one_size(lengths: list[int], ranks: int) -> None:
    spec = TrainerSpec(steps=1, gpus=ranks, tokens_per_micro_batch=512)
    shares = dealt(sequences([(1, length - 1) for length in lengths]), ranks, spec)
    sizes = [[len(batch.token_ids) for batch in share] for share in shares]
    assert len({len(share) for share in sizes}) == 1
    flat = [size for share in sizes for size in share]
    assert max(flat) - min(flat) <= 128 and max(flat) <= 512


def test_a_rank_with_fewer_tokens_makes_as_many_micro_batches_of_them_not_fillers() -> None:
    spec = TrainerSpec(steps=1, gpus=2, tokens_per_micro_batch=10)
    shares = dealt(sequences([(1, 8), (1, 4), (1, 4), (1, 1)]), 2, spec)
    assert [[batch.indices for batch in share] for share in shares] == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize("sharing", [1, 4])
def test_the_filler_is_two_tokens_a_rank_without_a_target(sharing: int) -> None:
    batch = empty_batch(sharing=sharing)
    assert batch.token_ids.tolist() == [0, 0] * sharing
    assert batch.cu_seqlens.tolist() == [0, 2 * sharing]
    assert not batch.target_mask.any()


def test_dtypes() -> None:
    (batch,) = pack(sequences([(2, 3)]), 100)
    assert {
        name: getattr(batch, name).dtype
        for name in ("token_ids", "position_ids", "cu_seqlens", "target_mask", "targets")
    } == {
        "token_ids": torch.int64,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "target_mask": torch.bool,
        "targets": torch.int64,
    }
    assert batch.sequence.dtype == torch.int64
    assert {column.dtype for column in batch.columns.values()} == {torch.float32}


def test_a_sample_becomes_a_sequence_with_its_number_and_its_engines_logprobs() -> None:
    found = to_train_sequences([a_sample(tokens=2), a_sample(tokens=8)])
    assert [s.index for s in found] == [0, 1]
    assert found[0].token_ids.tolist() == [10, 11, 12, 50, 51]
    assert found[0].prompt_length == 3
    assert by_token(found[1], "rollout_logprobs") == [-0.5] * 8 and len(found[1].columns) == 1


def test_an_empty_completion_is_a_sequence_without_targets() -> None:
    (batch,) = pack(to_train_sequences([a_sample(tokens=0)]), 8)
    assert not batch.target_mask.any()
    assert listed(by_sample(batch, torch.zeros(1))) == {0: []}


@pytest.mark.parametrize("name", ["logprobs", "mask", "versions"])
def test_a_sample_with_an_entry_missing_is_refused(name: str) -> None:
    sample = a_sample(tokens=2)
    sample = replace(sample, **{name: getattr(sample, name)[:-1]})
    with pytest.raises(ValueError, match=f"prompt 0:0: 2 tokens but 1 {name}"):
        to_train_sequences([sample])


@given(LENGTHS, BUDGETS, st.integers(1, 4))
def test_what_the_ranks_say_of_targets_finds_back_to_its_samples(
    lengths: list[tuple[int, int]], budget: int, parts: int,
) -> None:
    given_ = masked(sequences(lengths))
    ranks = dealt(given_, parts, TrainerSpec(steps=1, gpus=parts, tokens_per_micro_batch=budget))
    found = [by_sample(batch, at_targets(batch, CPU)[0]["advantages"]) for batches in ranks for batch in batches]
    for sequence in add_column(given_, "seen", found):
        wanted = [
            value if counts else 0.0
            for value, counts in zip(by_token(sequence, "advantages"), sequence.mask, strict=True)
        ]
        assert by_token(sequence, "seen") == pytest.approx(wanted)


def test_a_sample_that_no_rank_answered_for_is_an_error() -> None:
    with pytest.raises(KeyError):
        add_column(sequences([(1, 2), (1, 1)]), "values", [{0: np.zeros(2, np.float32)}])


def test_at_the_targets_of_a_filler_there_is_one_zero() -> None:
    columns, sequence = at_targets(empty_batch(["advantages"]), CPU)
    assert columns["advantages"].tolist() == [0.0]
    assert sequence.tolist() == [0]


def test_where_only_observations_follow_a_prompt_of_one_token_their_columns_count_for_nothing() -> None:
    """Found by the oracle of the losses: the first position's column was that of an observation."""
    (item,) = sequences([(1, 3)])
    observed = replace(item, mask=np.zeros(3, np.bool_)).with_columns(kl_weights=0.3)
    (batch,) = pack([observed], 8)
    columns, sequence = at_targets(batch, CPU)
    assert {name: column.tolist() for name, column in columns.items()} == {name: [0.0] for name in observed.columns}
    assert sequence.tolist() == [0]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 9))
def test_an_epoch_has_every_sample_once(samples: int, updates: int, epochs: int, step: int) -> None:
    found = mini_batches(samples, updates, epochs, f"0/{step}")
    assert len(found) == updates * epochs
    for epoch in range(epochs):
        own = found[epoch * updates : (epoch + 1) * updates]
        assert sorted(i for part in own for i in part) == list(range(samples))
        assert max(map(len, own)) - min(map(len, own)) <= 1
    assert found == mini_batches(samples, updates, epochs, f"0/{step}")


def test_the_order_is_the_seeds_the_steps_and_the_epochs_own() -> None:
    """The same in every version of python, for a run may be resumed by another: these numbers never change."""
    assert mini_batches(6, 2, 2, "0/1") == [[0, 1, 3], [2, 4, 5], [0, 2, 4], [1, 3, 5]]
    assert mini_batches(6, 1, 2, "0/1") == [[0, 1, 2, 3, 4, 5]] * 2
    orders = {str(mini_batches(20, 2, 1, seed)) for seed in ("0/1", "0/2", "1/1")}
    assert len(orders | {str(mini_batches(20, 2, 2, "0/1")[2:])}) == 4


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunks_are_in_order_and_even(size: int, count: int) -> None:
    found = chunks(range(size), count)
    assert [i for chunk in found for i in chunk] == list(range(size))
    assert len(found) == count
    assert max(map(len, found)) - min(map(len, found)) <= 1
