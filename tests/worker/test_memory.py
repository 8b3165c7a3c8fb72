"""What lies on a GPU, and when: the arithmetic, against known models and what benchmarks measured."""

from typing import Any

import pytest
from transformers import AutoConfig

from rlhf_api.memory import (
    GIB,
    Shape,
    activation_bytes,
    attention_share,
    engine_activations,
    keeps_attention,
    kv_bytes,
    kv_tokens,
    room_tokens,
    shape_of,
    token_budget,
)
from tests.worker.configs import run_config

QWEN_8B, QWEN_4B, QWEN_1_7B = 8_190_735_360, 4_022_468_096, 1_511_000_000  # parameters; the last with 49,152 words
SHAPE_8B = Shape(layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, inner=12288, vocabulary=151936)
SHAPE_4B = Shape(layers=36, hidden=2560, heads=32, kv_heads=8, head_dim=128, inner=9728, vocabulary=151936)


def test_an_engine_of_8b_has_300_000_tokens_of_cache_on_an_80_gb_card_by_default() -> None:
    """One GPU each: 2 x 36 layers x 8 heads x 128 x 2 bytes a token."""
    card, share = int(79.1 * GIB), run_config().placement.engine_fraction  # what an A100 of 80 GB has; an H100 has more
    assert kv_bytes(SHAPE_8B, 2) == 147_456
    largest_batch = engine_activations(SHAPE_8B, 2)
    assert 4 * GIB < largest_batch < 6 * GIB
    assert kv_tokens(card, share, 2 * QWEN_8B, largest_batch, kv_bytes(SHAPE_8B, 2)) > 300_000
    assert kv_tokens(card, 0.36, 2 * QWEN_8B, largest_batch, kv_bytes(SHAPE_8B, 2)) < 80_000, "the share of before"
    assert kv_tokens(card, 0.1, 2 * QWEN_8B, largest_batch, kv_bytes(SHAPE_8B, 2)) == 0


@pytest.mark.parametrize(("ranks", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_ranks_of_an_engine_share_the_cache_s_heads(ranks: int, heads: int) -> None:
    assert kv_bytes(SHAPE_8B, 2, ranks) == 2 * 36 * heads * 128 * 2


@pytest.mark.parametrize(("kind", "given", "inner", "kv_heads", "head_dim"), [
    ("qwen3", {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288}, 12288, 8, 128),
    ("llama", {"intermediate_size": 96}, 96, 32, 128),
    ("qwen3_moe", {"moe_intermediate_size": 768, "num_experts_per_tok": 8, "intermediate_size": 64}, 6144, 4, 128),
    ("gpt2", {}, 16384, 32, 128),  # whose config says nothing of it
])
def test_the_shape_of_a_model(kind: str, given: dict[str, Any], inner: int, kv_heads: int, head_dim: int) -> None:
    names = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 151936}
    found = shape_of(AutoConfig.for_model(kind, **names, **given))
    assert found == Shape(36, 4096, 32, kv_heads, head_dim, inner, 151936)


def test_a_token_takes_no_more_than_the_estimate_and_not_much_less() -> None:
    """docs/benchmarks.md: Qwen3-4B's shape, 8,192 tokens, no checkpointing, one GPU: 112 GiB at most, 96 compiled; with
    18 bytes a parameter, and the head's logits.
    """
    held = 18 * QWEN_4B + 2 * GIB
    estimate = activation_bytes(SHAPE_4B, 2, checkpointing=False)
    eager, compiled = ((peak * GIB - held) / 8192 for peak in (112, 96))
    assert 0.8 * estimate < eager < estimate
    assert 0.5 * estimate < compiled < 0.7 * estimate
    assert activation_bytes(SHAPE_4B, 2, checkpointing=True) < estimate / 8


@pytest.mark.parametrize(("room", "expected"), [
    (0, 3000), (-5, 3000), (3_000_000, 3000), (4_000_000, 3072), (6_000_000, 5120), (6_500_000, 5120), (10**9, 50_000),
])
def test_a_budget_is_rounded_and_lies_between_a_sequence_and_a_step(room: int, expected: int) -> None:
    assert token_budget(room, 1000, least=3000, most=50_000) == expected


def room(gpus: int, card: float, *, params: int = QWEN_8B, shape: Shape = SHAPE_8B, **trainer: Any) -> int:
    config = run_config(
        model={"path": "/m"}, data={"jsonl": {"path": "/d"}, "maxPromptTokens": 1024},
        rollout={"maxTokens": 3072, "engines": gpus, "promptsPerStep": 512},
        trainer={"steps": 1, "gpus": gpus, **trainer},
    )
    return room_tokens(config, {"policy": params}, {"policy": shape}, gpus, int(0.9 * card * GIB), attention=False)


def test_the_budget_of_a_rank_follows_from_its_memory() -> None:
    eight, more = room(8, 79.1), room(8, 139.7)
    assert 16_384 <= eight < more
    assert room(8, 79.1, gradientCheckpointing=False) == 4096, "the longest sequence"
    assert room(16, 79.1) > eight, "a smaller part of the weights leaves more"
    assert room(8, 40, contextParallel=2, gradientCheckpointing=False) == 2048, "which two ranks share"
    assert room(8, 79.1, offload=True) == eight, "of one role"


def test_attention_is_a_growing_part_of_a_layer() -> None:
    """4 x heads x head_dim operations a pair, half of the pairs, for 2 a weight (101 million of them in a layer)."""
    assert attention_share(SHAPE_4B, 1024) == pytest.approx(4 * 4096 * 512 / (2 * 100_925_440), rel=0.001)
    assert attention_share(SHAPE_4B, 65_536) == pytest.approx(64 * attention_share(SHAPE_4B, 1024))


@pytest.mark.parametrize(
    ("tokens", "card", "changes", "kept"),
    [
        (512, 139.7, {}, False),  # a fiftieth of a layer: not worth its memory
        (16_384, 139.7, {}, True),
        (16_384, 139.7, {"gradientCheckpointing": False}, False),  # nothing is computed anew
        (16_384, 139.7, {"compile": False}, False),
        (16_384, 79.1, {"tokensPerMicroBatch": 16_384}, False),  # no room: 66 GiB of weights and moments
        (16_384, 79.1, {"gpus": 8}, True),
        (65_536, 79.1, {"gpus": 8}, False),
        (65_536, 79.1, {"gpus": 8, "contextParallel": 2}, True),
    ],
)
def test_attention_is_kept_where_it_is_long_and_has_room(
    tokens: int, card: float, changes: dict[str, Any], kept: bool
) -> None:
    config = run_config(
        model={"path": "/m"}, rollout={"maxTokens": tokens, "engines": changes.get("gpus", 1)},
        trainer={"steps": 1, **changes},
    )
    asked = config, {"policy": QWEN_4B}, {"policy": SHAPE_4B}, config.trainer.gpus, int(0.9 * card * GIB)
    assert keeps_attention(*asked) is kept
    if kept:
        assert room_tokens(*asked, attention=True) < room_tokens(*asked, attention=False)


def test_what_is_kept_of_attention_is_its_output_and_a_number_a_head() -> None:
    """docs/benchmarks.md: adapters on Qwen3-4B's shape, 16,384 tokens, 16.5 GiB, and 20.1 where attention is kept."""
    kept, anew = (activation_bytes(SHAPE_4B, 2, checkpointing=True, attention=each) for each in (True, False))
    assert kept - anew == 36 * 32 * (2 * 128 + 4)
    assert 0.6 * (kept - anew) * 16_384 < (20.07 - 16.54) * GIB < (kept - anew) * 16_384
