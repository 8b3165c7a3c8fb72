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
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_groups": 1,
    "ssm_state_size": 8, "state_size": 8, "chunk_size": 16, "mamba_chunk_size": 16, "n_groups": 1, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8,
}  # fmt: skip


def served() -> list[str]:
    """Model types. vLLM's registry is read, not imported: that takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "model_executor/models/registry.py").read_text()
    (table,) = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS")
    classes = set(ast.literal_eval(table))
    return sorted(kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in classes)


FAMILIES: dict[str, dict[str, Any]] = {}


def config_of(kind: str) -> Any:
    cls = CONFIG_MAPPING[kind]
    known = set(cls.__dataclass_fields__) | set(cls.attribute_map)
    return cls(**{name: value for name, value in {**SHAPE, **FAMILIES.get(kind, {})}.items() if name in known})


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return lm.eval()
