"""LoRA (arXiv 2106.09685): low-rank adapters on the decoder's linear layers, made by PEFT, and its files of them. A
layer gives W x + alpha / rank * B A x.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_api.job import LoRASpec, PolicySpec
from rlhf_worker.pretrained import adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
NAME = "default"  # of the adapter, inside PEFT's layers


def inject(module: nn.Module, layers: nn.ModuleList, spec: PolicySpec, seed: int) -> None:
    """In place, into the decoder's layers; everything else of the module is frozen. B is zero, A drawn from the seed,
    the same on every rank. Raises BadSpec.
    """
    from peft import inject_adapter_in_model

    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(spec, adapted(spec)), layers, NAME)


def _config(spec: PolicySpec, targets: list[str], **more: Any) -> Any:
    from peft import LoraConfig

    assert spec.lora is not None
    return LoraConfig(
        r=spec.lora.rank, lora_alpha=spec.lora.alpha, target_modules=targets, task_type="CAUSAL_LM",  # type: ignore[arg-type]  # PEFT divides any number
        base_model_name_or_path=spec.path, **more,
    )


def off(module: nn.Module) -> AbstractContextManager[None]:
    """The model as it was before training."""
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(module, 0.0)


def merged(weights: Mapping[str, Tensor], lora: LoRASpec | None) -> Mapping[str, Tensor]:
    """Whole weights by the names of the model without adapters, which are added to them: W + alpha / rank * B A, in W's
    type.
    """
    if lora is None:
        return weights
    made = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in [name for name in made if name.endswith("base_layer.weight")]:
        a, b = (weights[name.replace("base_layer", f"lora_{which}.{NAME}")].float() for which in "AB")
        made[name] = (made[name].float() + lora.alpha / lora.rank * b @ a).to(made[name].dtype)
    return {name.replace("base_layer.", ""): weight for name, weight in made.items()}


def files(spec: PolicySpec, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The adapters of `weights`, whole and by the trainer's names, in PEFT's format: contents by file name."""
    from safetensors.torch import save

    own = {name: weight.contiguous() for name, weight in weights.items() if ".lora_" in name}
    config = _config(spec, sorted({name.split(".")[-4] for name in own}), inference_mode=True).to_dict()
    plain = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": weight for name, weight in own.items()}
    return {CONFIG: json.dumps(config, default=sorted).encode(), WEIGHTS: save(plain, {"format": "pt"})}


def write(directory: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        (directory / name).write_bytes(content)
