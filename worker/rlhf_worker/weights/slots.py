"""What an engine rank computes with of a LoRA adapter: vLLM's slots. Runs in a vLLM worker process by its collective
RPC, pickled.
"""

import copy
import pickle
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

from rlhf_worker.weights.checksum import whole
from rlhf_worker.weights.compare import EngineSums


def held(worker: Any, number: int, names: tuple[str, ...]) -> bytes:
    """Pickled EngineSums of adapter `number`, by PEFT's names of its tensors. indirect: those of layers whose slots
    have another form, as experts'.
    """
    manager = worker.model_runner.lora_manager._adapter_manager
    adapter = manager.get_adapter(number) if number in manager.lora_index_to_id else None
    sums, others = dict[tuple[str, bool], int](), set[str]()
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        if not isinstance(layer, BaseLinearLayerWithLoRA):
            others.update(parts)
        elif weights := adapter and adapter.get_lora(name):
            wrong = _wrong(layer, manager.lora_index_to_id.index(number), weights)
            for is_a, given in ((True, weights.lora_a), (False, weights.lora_b)):
                each = zip(parts, given if isinstance(given, list) else [given], strict=True)
                sums |= {(part, is_a): int(whole(tensor)) + wrong for part, tensor in each if tensor is not None}
    renamed = (mapper := getattr(manager.model, "hf_to_vllm_mapper", None)) and mapper.get_rename_mapper()
    # -1: no layer has it
    own = {
        name: sums.get(key, -1) for name in names if (key := parse_fine_tuned_lora_name(name, renamed))[0] not in others
    }
    return pickle.dumps(EngineSums(own, len(names) - len(own)))


def _wrong(layer: Any, slot: int, weights: Any) -> int:
    """Elements of a layer's slot that are not what vLLM makes, for this rank, of the whole tensors that it keeps on the
    host.
    """
    twin = copy.copy(layer)
    twin.lora_a_stacked, twin.lora_b_stacked = (
        [torch.zeros_like(one[:1]) for one in kept] for kept in (layer.lora_a_stacked, layer.lora_b_stacked)
    )
    twin.set_lora(0, weights.lora_a, weights.lora_b)
    pairs = zip(
        [*twin.lora_a_stacked, *twin.lora_b_stacked], [*layer.lora_a_stacked, *layer.lora_b_stacked], strict=True,
    )
    return sum(int((new[0] != old[slot]).sum()) for new, old in pairs)
