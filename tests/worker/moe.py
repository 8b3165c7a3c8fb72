"""Tiny mixture-of-experts models: the tiny model's tokenizer and prompts, with another model of random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hack.tiny_model import CHARACTERS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, SPECIAL, write
from rlhf_worker.pretrained import make_readable

EXPERTS = 4
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64, "mlp_only_layers": [0],
        "hidden_size": HEADS * HEAD_DIM,
    },
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_size": HEADS * HEAD_DIM},
    "glm4_moe": {
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}


def write_moe(directory: Path, kind: str = "qwen3_moe", **changes: Any) -> None:
    """As `hack.tiny_model.write`, but for its reward model."""
    write(directory)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(CHARACTERS), "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
    }
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**shape, **KINDS[kind], **changes})
    ).save_pretrained(directory)
    make_readable(directory)
