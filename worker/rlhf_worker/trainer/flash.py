"""The FlashAttention that serves `varlen_attn`: the fourth, which vLLM carries, on GPUs that have it (Hopper,
Blackwell), where it is as right as torch's own, the second. Fewer of a GPU's cycles are lost between its products.
"""

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedConfig

from rlhf_worker.errors import said

FOURTH = "rlhf_fourth"
GENERATIONS = (9, 10)  # of GPUs, by compute capability
LENGTHS = (300, 1, 77)  # tokens of the sequences it is tried on: some tiles, one token, less than a tile
WINDOW = 64  # positions seen, for models of which a layer sees no more than some
TOLERANCE = 0.02  # of the mean of a result; bfloat16 rounds by 0.004


@dataclass(frozen=True, slots=True)
class Heads:
    """What a kernel is made for. Of a layer: query heads, key-value heads, size of each."""

    query: int
    key: int
    size: int
    windows: bool  # whether some layers see a window

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Heads | None":
        """None for a model whose layers have no such numbers in common."""
        text = config.get_text_config()
        query = getattr(text, "num_attention_heads", None)
        key = getattr(text, "num_key_value_heads", None) or query
        if not isinstance(query, int) or not isinstance(key, int):
            return None
        size = getattr(text, "head_dim", None) or text.hidden_size // query
        return cls(query, key, size, bool(getattr(text, "sliding_window", None)))

    @property
    def reaches(self) -> list[int]:
        return [-1, WINDOW - 1] if self.windows else [-1]


_serves: dict[Heads, bool] = {}  # tried in this process, of which one implementation serves all models


def choose(heads: Heads | None, device: torch.device) -> None:
    """From now on bfloat16 attention runs by the fourth, if it serves all models of this process; it compiles for some
    seconds.
    """
    if heads is None or heads in _serves or not all(_serves.values()) or not _made_for(device):
        return
    _restore()
    wanted = [_passes(heads, reach, device) for reach in heads.reaches]
    refusal = _refusal(heads, wanted, device)
    _serves[heads] = refusal is None
    if refusal is not None:
        _restore()
        print(f"attention: FlashAttention 2, for the fourth {refusal} with {heads}", file=sys.stderr, flush=True)


def _made_for(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in GENERATIONS


def _refusal(heads: Heads, wanted: list[list[Tensor]], device: torch.device) -> str | None:
    """Why the fourth, active from here on, does not serve."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its compiler's, of options that it was given without need
            activate_flash_attention_impl(FOURTH)
            made = [_passes(heads, reach, device) for reach in heads.reaches]
    except Exception as error:  # of any kind: another vLLM, a GPU that it does not know, no compiler
        return f"fails ({said(error)})"
    pairs = (pair for results in zip(made, wanted, strict=True) for pair in zip(*results, strict=True))
    apart = max(_apart(a, b) for a, b in pairs)
    return None if apart <= TOLERANCE else f"differs by {apart:.2g} of the mean"


def _passes(heads: Heads, reach: int, device: torch.device) -> list[Tensor]:
    """Attention over sequences of `LENGTHS`, (T, H, D), and its gradients by query, key and value."""
    draw, total = torch.Generator(device).manual_seed(0), sum(LENGTHS)
    q, k, v = (
        torch.randn(total, count, heads.size, generator=draw, device=device, dtype=torch.bfloat16).requires_grad_()
        for count in (heads.query, heads.key, heads.key)
    )
    borders = torch.tensor([0, *LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    out = varlen_attn(
        q, k, v, borders, borders, max(LENGTHS), max(LENGTHS), window_size=(reach, 0),
        enable_gqa=heads.query != heads.key,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    slope = torch.randn(out.shape, generator=draw, device=device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), slope)]


def _apart(a: Tensor, b: Tensor) -> float:
    """Infinite where a number is none."""
    apart = ((a.float() - b.float()).abs().mean() / b.float().abs().mean()).item()
    return apart if math.isfinite(apart) else math.inf


def _restore() -> None:
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def _register() -> Any:
    from torch.nn.attention._fa4 import register_flash_attention_fa4

    return register_flash_attention_fa4(__name__)


# By these names torch 2.13 asks a module for the kernels.
def _flash_attn_fwd(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of the four that vLLM 0.32 returns, the two that torch takes: attention and its log-sum-exp."""
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_fwd as forward

    out, lse, *_ = forward(*tensors, **options)
    return out, lse


def _flash_attn_bwd(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_bwd as backward

    dq, dk, dv = backward(*tensors, **options)
    return dq, dk, dv


register_flash_attention_impl(FOURTH, register_fn=_register)
