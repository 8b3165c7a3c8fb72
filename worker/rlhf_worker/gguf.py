"""GGUF -> Hugging Face checkpoint. Needs the packages gguf and accelerate."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rlhf_worker.errors import BadSpec
from rlhf_worker.pretrained import make_readable


def import_gguf(file: Path, directory: Path) -> None:
    """Dequantise `file` to bfloat16 with its tokenizer. transformers keeps the weights packed unless told to. Raises
    BadSpec.
    """
    if not file.is_file():
        raise BadSpec(f"{file}: no such file")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
    make_readable(directory)
    print(f"wrote {directory}", flush=True)
