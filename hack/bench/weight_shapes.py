"""The models that the weight benchmarks move: names and shapes of a checkpoint without its bytes."""

from math import prod
from pathlib import Path
from typing import Any

QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "head_dim": 64, "num_key_value_heads": 3, "max_position_embeddings": 2048, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6B": ("Qwen3", QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True,
    }),
    "4B": ("Qwen3", QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": True,
    }),
    "8B": ("Qwen3", QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False,
    }),
    "135M": ("Llama", SMOLLM2 | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "tie_word_embeddings": True,
    }),
}


def model_config(name: str, dtype: str) -> Any:
    """A transformers configuration of the shape `name`, a key of SHAPES."""
    import transformers

    family, values = SHAPES[name]
    return getattr(transformers, f"{family}Config")(**values, architectures=[f"{family}ForCausalLM"], dtype=dtype)


def parameters(name: str) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes, in order; tied parameters once. Takes no memory."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{SHAPES[name][0]}ForCausalLM")(model_config(name, "bfloat16"))
    return {parameter: tuple(p.shape) for parameter, p in model.named_parameters()}


def elements(name: str) -> int:
    return sum(map(prod, parameters(name).values()))


def write_model(directory: Path, name: str, dtype: str) -> None:
    """All that an engine with dummy weights and no tokenizer reads."""
    model_config(name, dtype).save_pretrained(directory)
