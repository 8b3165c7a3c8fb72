"""The text families that vLLM serves and transformers has, each as a tiny model of random weights."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 8  # positions: fewer than the tests' sequences have
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "mamba_n_groups": 1,
    "ssm_state_size": 8, "state_size": 8, "chunk_size": 16, "mamba_chunk_size": 16, "n_groups": 1, "index_topk": 32,
    "index_n_heads": 2, "index_head_dim": 8,
}  # fmt: skip


def served() -> list[str]:
    """Model types. vLLM's registry is read, not imported: that takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "model_executor/models/registry.py").read_text()
    (table,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS"
    )
    classes = set(ast.literal_eval(table))
    return sorted(kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in classes)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
LATENT = {"num_key_value_heads": 4}
SHARED = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip
# What a family needs besides: both kinds of its layers, small parts.
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "afmoe",
            "cohere2",
            "cohere2_moe",
            "exaone4",
            "exaone_moe",
            "gemma2",
            "gemma3_text",
            "gpt_oss",
            "laguna",
            "mimo_v2_flash",
        ],
        SLIDING,
    ),
    **dict.fromkeys(
        [
            "axk1",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
        ],
        LATENT,
    ),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"], LINEAR),
    **dict.fromkeys(["lfm2", "lfm2_moe"], CONVOLUTION),
    **dict.fromkeys(["gemma3n_text", "gemma4_text"], SHARED),
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gptj": {"rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "kimi_linear": {**LINEAR, **LATENT, "linear_num_heads": 2, "linear_head_dim": 8, "num_local_experts": 4},
    "longcat_flash": {
        **LATENT,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "ffn_hidden_size": 16,
        "expert_ffn_hidden_size": 16,
    },
    "granitemoehybrid": LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 16},
    "qwen4_exp_text": {
        **LINEAR,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"]},
}
# A text model's config within that of one with images.
NESTED = {
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}


def config_of(kind: str, **changes: Any) -> Any:
    cls = CONFIG_MAPPING[kind]
    if kind in NESTED:
        return cls(text_config=config_of(NESTED[kind]).to_dict())
    known = set(cls.__dataclass_fields__) | set(cls.attribute_map)
    return cls(
        **{name: value for name, value in {**SHAPE, **FAMILIES.get(kind, {}), **changes}.items() if name in known}
    )


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return lm.eval()
