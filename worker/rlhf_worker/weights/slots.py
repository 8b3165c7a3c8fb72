"""What an engine rank computes with of a LoRA adapter: vLLM's slots. Runs in a vLLM worker process by its collective RPC, pickled."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

from rlhf_worker.weights.checksum import whole
from rlhf_worker.weights.compare import EngineSums

SLOTS = ("lora_a_stacked", "lora_b_stacked")
LOST = -1  # in place of the sum of a tensor that no layer has


def checksums(worker: Any, number: int, names: Sequence[str]) -> bytes:
    """Pickled EngineSums of adapter `number`, by PEFT's names of its tensors. indirect: those of layers whose slots have another form, as experts'."""
    manager = worker.model_runner.lora_manager._adapter_manager
    adapter = manager.get_adapter(number) if number in manager.lora_index_to_id else None
    sums, others = dict[tuple[str, bool], int](), set[str]()
    for name, layer in manager.modules.items() if adapter else ():
        parts = manager.packed_modules.get(name, [name])
        if not isinstance(layer, BaseLinearLayerWithLoRA):
            others.update(parts)
        elif weights := adapter.get_lora(name):
            for tensors, wrong, is_a in zip((weights.lora_a, weights.lora_b), _wrong(layer, manager.lora_index_to_id.index(number), weights), (True, False), strict=True):
                each = tensors if isinstance(tensors, list) else [tensors]
                sums |= {(part, is_a): int(whole(one)) + wrong for part, one in zip(parts, each, strict=True) if one is not None}
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    keys = {name: parse_fine_tuned_lora_name(name, mapper and mapper.get_rename_mapper()) for name in names}
    own = {name: sums.get(key, LOST) for name, key in keys.items() if key[0] not in others}
    return pickle.dumps(EngineSums(own, len(names) - len(own)))


def _wrong(layer: Any, slot: int, weights: Any) -> list[int]:
    """Of A and of B: elements in the slot that are not what vLLM makes of the whole tensors that it keeps on the host: this rank's own parts."""
    twin = copy.copy(layer)
    for name in SLOTS:
        setattr(twin, name, tuple(torch.zeros_like(one[:1]) for one in getattr(layer, name)))
    twin.set_lora(0, weights.lora_a, weights.lora_b)
    return [sum(int((new[0] != old[slot]).sum()) for new, old in zip(getattr(twin, name), getattr(layer, name), strict=True)) for name in SLOTS]
