"""The proof of delivery: slices of fused, sharded and padded parameters, and what counts as proven."""

import torch

from rlhf_worker.weights.compare import EMPTY, differences
from rlhf_worker.weights.verify import Ledger, digest, engine_slice, part_names

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_part_names_of_fused_and_plain_parameters() -> None:
    assert part_names("model.layers.0.self_attn.qkv_proj.weight", PACKED) == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    assert part_names("model.norm.weight", PACKED) == ["model.norm.weight"]
    assert part_names("lm_head.weight", PACKED) == ["lm_head.weight"]


def test_one_rank_holds_the_fused_tensors_whole() -> None:
    q, k, v = torch.randn(8, 4), torch.randn(2, 4), torch.randn(2, 4)
    made = engine_slice([q, k, v], (12, 4), 0, 1)
    assert made is not None and torch.equal(made, torch.cat([q, k, v]))


def test_column_parallel_takes_a_block_of_each_part() -> None:
    q, k = torch.arange(16.0).view(8, 2), torch.arange(8.0).view(4, 2)
    made = engine_slice([q, k], (6, 2), 1, 2)
    assert made is not None and torch.equal(made, torch.cat([q[4:], k[2:]]))


def test_row_parallel_splits_columns() -> None:
    whole = torch.arange(16.0).view(4, 4)
    made = engine_slice([whole], (4, 2), 1, 2)
    assert made is not None and torch.equal(made, whole[:, 2:])


def test_vocabulary_is_padded_with_zero_rows_on_its_last_rank() -> None:
    whole = torch.ones(5, 3)
    made = engine_slice([whole], (4, 3), 1, 2)
    assert made is not None and torch.equal(made, torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]))


def test_a_norm_is_the_same_on_every_rank() -> None:
    whole = torch.randn(6)
    for rank in range(2):
        made = engine_slice([whole], (6,), rank, 2)
        assert made is not None and torch.equal(made, whole)


def test_what_no_rule_makes_is_unproven_and_not_wrong() -> None:
    assert engine_slice([torch.ones(3, 2), torch.ones(3, 2)], (5, 2), 0, 2) is None
    wrong, unproven = differences({"a": "1"}, {"a": "1", "fused": "2", "packed": EMPTY})
    assert (wrong, unproven) == ([], ["fused", "packed"])


def test_a_ledger_finds_one_changed_element() -> None:
    q, k, v, norm = (torch.randn(4, 4) for _ in range(4))
    shapes = [{"l.qkv_proj.weight": (12, 4), "norm.weight": (4, 4)}]
    ledger = Ledger(shapes, PACKED)
    for name, tensor in (("l.q_proj.weight", q), ("l.k_proj.weight", k), ("l.v_proj.weight", v), ("norm.weight", norm), ("other", norm)):
        ledger.add(name, tensor)
    held = {"l.qkv_proj.weight": digest(torch.cat([q, k, v])), "norm.weight": digest(norm)}
    assert differences(ledger.digests[0], held) == ([], [])
    changed = k.clone()
    changed[0, 0] += 1
    held["l.qkv_proj.weight"] = digest(torch.cat([q, changed, v]))
    assert differences(ledger.digests[0], held) == (["l.qkv_proj.weight"], [])
