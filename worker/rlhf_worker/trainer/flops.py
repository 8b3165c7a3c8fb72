"""What a training pass must compute, by the model's shape, and what the device could: the two sides of its MFU."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_worker.experience import PackedBatch
from rlhf_worker.pretrained import backbone, decoder_layers

# Dense bfloat16 FLOP/s by the begin of the device's name, as their makers tell them; the first that fits counts.
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "GeForce RTX 4090": 165e12,
}  # fmt: skip
OF_NO_PAIRS = ("linear_attention", "conv", "mamba", "moe", "mlp")  # transformers' kinds of layers
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of their number in transformers' configs


def peak_flops(name: str) -> float:
    """Dense bfloat16 FLOP/s of a device by the name that torch gives it; NaN for one that is not known, such as a part
    of a GPU.
    """
    model = name.removeprefix("NVIDIA ").replace("-", " ") + " "
    fits = (peak for card, peak in PEAKS.items() if model.startswith(f"{card} "))
    return math.nan if "MIG" in name else next(fits, math.nan)


def device_peak(device: torch.device) -> float:
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan


def pairs(length: int, window: int | None) -> float:
    """Keys that the queries of a causal sequence see, its own position too, together."""
    seen = min(length, window or length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a forward and a backward pass. Products alone: norms, activations, rotary angles and the recurrence of linear
    attention are left out, and so is what is recomputed.

    `token`, `target`: of the weights that act on each token, and on each position that is read. `attention`: by window
    (None: the whole sequence before) those of one pair of a query and a key, all layers and heads together.
    """

    token: float
    target: float
    attention: dict[int | None, float]

    @classmethod
    def of(cls, lm: PreTrainedModel, head: nn.Module) -> "Flops":
        """lm, with adapters or without, sharded or whole; head: what reads its hidden states."""
        config = lm.config.get_text_config()
        body = [(name, owner) for name, owner in backbone(lm).named_modules() if owner is not head]
        token = sum(_of_weights(owner) * _share(name, config) for name, owner in body)
        return cls(token, _of_weights(head), _attention(config, len(decoder_layers(lm))))

    def of_batches(self, batches: Iterable[PackedBatch]) -> float:
        return sum(self._of(batch) for batch in batches)

    def _of(self, batch: PackedBatch) -> float:
        lengths = Counter(batch.cu_seqlens.diff().tolist())
        attended = sum(
            each * pairs(length, window) * count
            for window, each in self.attention.items() for length, count in lengths.items()
        )
        return self.token * len(batch.token_ids) + self.target * int(batch.target_mask.sum()) + attended


def _of_weights(owner: nn.Module) -> float:
    """Two forward and two backward for the inputs, two more for a weight's own gradient (arXiv 2001.08361, 2.1)."""
    if isinstance(owner, nn.Embedding) or "norm" in type(owner).__name__.lower():
        return 0.0
    own = owner.named_parameters(recurse=False)
    return sum((6.0 if p.requires_grad else 4.0) * p.numel() for name, p in own if p.ndim > 1 and "bias" not in name)


def _share(name: str, config: Any) -> float:
    """Of a module's weights, those that act on one token: routed experts' are a part of all."""
    if "experts" not in name.split("."):
        return 1.0
    experts = next((value for key in EXPERTS if (value := getattr(config, key, None))), math.nan)
    return float(getattr(config, "num_experts_per_tok", math.nan) / experts)


def _attention(config: Any, layers: int) -> dict[int | None, float]:
    """By window. Two products a pair, six FLOPs an element each, forward and backward."""
    if not getattr(config, "num_attention_heads", None):
        return {}
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    windows = {"sliding_attention": window, "hybrid_sliding": window}
    windows["chunked_attention"] = getattr(config, "attention_chunk_size", None)
    each = getattr(config, "per_layer_config", [config] * layers)  # not every 5.x has it
    found: dict[int | None, float] = {}
    for number, kind in enumerate(kinds):
        if kind not in OF_NO_PAIRS:
            seen = windows.get(kind)
            found[seen] = found.get(seen, 0.0) + 6.0 * _width(each[number])
    return found


def _width(config: Any) -> int:
    """Elements of one query and of one value, of all heads of a layer."""
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
    size = size or config.hidden_size // heads
    queries, values = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
    return int(heads * (queries + values))
