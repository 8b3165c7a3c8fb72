"""A trainer that runs out of memory under a budget of its own; and the budget that it finds on a GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_api.memory import GIB
from rlhf_worker.algorithm.losses import policy_loss, value_loss
from rlhf_worker.experience import PackedBatch, pack, within
from rlhf_worker.trainer import rank as module
from rlhf_worker.trainer.rank import LIMIT, Trainer
from tests.worker.samples import sequences as random_sequences
from tests.worker.test_trainer import same, sequences, trainer, weights


def short_of_memory(monkeypatch: pytest.MonkeyPatch, targets: int, *, backward: bool = False) -> list[int]:
    """Passes over more targets run out of memory, or their backward passes do. Returns the targets of each pass."""
    seen, losses = list[int](), {"policy_loss": policy_loss, "value_loss": value_loss}

    def full(_: Any = None) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def checked(name: str, algorithm: Any, made: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(made))
        if len(made) > targets and not backward:
            full()
        found = losses[name](algorithm, made, *rest)  # type: ignore[operator]
        if len(made) > targets:
            made.register_hook(full)  # type: ignore[no-untyped-call]
        return found

    for name in losses:
        monkeypatch.setattr(module, name, partial(checked, name))
    return seen


def shrinking(made: Trainer, budget: int) -> Trainer:
    made.budget = budget
    return made


@pytest.mark.parametrize(("role", "dtype", "backward"), [
    ("policy", "float32", False), ("policy", "bfloat16", True), ("critic", "bfloat16", False),
])  # fmt: skip
def test_the_first_update_begins_anew_with_halves(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, role: str, dtype: str, backward: bool
) -> None:
    """Its first micro-batch fits, and leaves nothing in the second try; the second update is of the same step."""
    items = [one.with_columns(returns=0.7, values=0.1) for one in sequences()]
    short, long = pack(items, 12)[-1:], pack(items, 27)
    updates: list[list[PackedBatch]] = [[*short, *long], long]
    roomy, made = (
        trainer(tiny, tmp_path, dtype=dtype, options={"gradientCheckpointing": True}, algorithm={"name": "ppo"})
        for _ in range(2)
    )
    whole = roomy.train(role, [within(batches, 9) for batches in updates]), weights(roomy, role)
    made.budget, seen = 36, short_of_memory(monkeypatch, 10, backward=backward)
    found = made.train(role, updates), weights(made, role)
    assert made.budget == 9 and seen[:2] == [3, 12] and max(seen[2:]) <= 10
    same(whole, found)
    assert made.version == (2 if role == "policy" else 0)


def test_a_sequence_that_fits_not_by_itself_ends_the_run(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shrinking(trainer(tiny, tmp_path), 36)
    seen = short_of_memory(monkeypatch, 7)
    with pytest.raises(torch.OutOfMemoryError):
        made.train("policy", [pack(sequences(), 36)])
    assert made.budget == 7 and sorted(seen[-4:])[-1] == 9, "the longest alone"


@pytest.mark.parametrize(("budget", "fits"), [(0, False), (36, True)], ids=["of the spec", "not the first update"])
def test_others_end_the_run_as_well(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, budget: int, fits: bool
) -> None:
    made = shrinking(trainer(tiny, tmp_path), budget)
    made.roles["policy"].fits = fits
    short_of_memory(monkeypatch, 15)
    with pytest.raises(torch.OutOfMemoryError):
        made.train("policy", [pack(sequences(), 36)])
    assert made.budget == budget


class Card:
    """torch.cuda of a GPU of 80 GiB, of which others hold 10."""

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        return 60 * GIB, 80 * GIB

    @staticmethod
    def memory_reserved() -> int:
        return 10 * GIB


def test_ranks_together_end_the_run_and_the_next_start_knows_the_limit(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tiny, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "cuda", Card)
        found = made.token_budget()
    assert found == made.token_budget() == 64 * 8 * 32, "all of a step: the model is tiny"
    made.world = 2  # of which only this one is asked
    batches = pack(sequences(), 36)
    assert not made._halved(batches) and int((tmp_path / LIMIT).read_text()) == len(batches[0].token_ids) // 2
    again = trainer(tiny, tmp_path)
    monkeypatch.setattr(torch, "cuda", Card)
    assert again.token_budget() == 18


def test_halves_hold_the_same_sequences() -> None:
    whole = pack(random_sequences([(2, 9), (3, 4), (1, 1), (2, 20), (5, 2)]), 1000)
    parts = within(whole, 12)
    assert sum(len(part.token_ids) for part in parts) == 49
    assert all(len(part.token_ids) <= 12 or len(part.indices) == 1 for part in parts)
    assert [index for part in parts for index in part.indices] == whole[0].indices
    again = {part.indices[0]: part for part in within(parts, 1)}
    for alone in pack(random_sequences([(2, 9), (3, 4), (1, 1), (2, 20), (5, 2)]), 1):
        part = again[alone.indices[0]]
        assert (part.max_length, part.prompt_lengths) == (alone.max_length, alone.prompt_lengths)
        for name in ("token_ids", "position_ids", "cu_seqlens", "target_mask", "targets", "sequence"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name
        assert part.columns.keys() == alone.columns.keys()
        assert all(torch.equal(part.columns[name], alone.columns[name]) for name in alone.columns)
    assert within(whole, 1000) == whole
