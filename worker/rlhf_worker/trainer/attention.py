"""Attention over packed batches, under transformers' interface: block-diagonal by `cu_seqlens`, each causal."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from rlhf_worker.trainer.context import by_heads, by_positions

PACKED_ATTENTION = "rlhf_packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    cp_mesh: DeviceMesh | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' interface: query (1, H, T, D), key (1, H_kv, T, D), value (1, H_kv, T, E) -> (1, T, H, E).

    Causal in each sequence. softcap: scores become softcap * tanh(score / softcap) (Gemma 2); s_aux: sinks (H,).
    cp_mesh: T are this rank's positions, cu_seq_lens_q are all.
    """
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q: call the model through RoleModule")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if cp_mesh is None:
        shape = Shape(scaling, sliding_window, softcap, s_aux)
        return _attended(q, k, v, cu_seq_lens_q, max_length_q, shape)[None], None
    q, k, v = by_heads(cp_mesh, q, k, v)
    sinks = None if s_aux is None else s_aux.chunk(cp_mesh.size())[cp_mesh.get_local_rank()]
    shape = Shape(scaling, sliding_window, softcap, sinks)
    return by_positions(cp_mesh, _attended(q, k, v, cu_seq_lens_q, max_length_q, shape))[None], None


@dataclass(frozen=True, slots=True)
class Shape:
    """What an attention does besides looking back. `scale` None: 1 / sqrt(D); `window`: positions seen, its own too."""

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # (H,)

    def plain(self, length: int) -> bool:
        return self.softcap is None and self.sinks is None and (self.window is None or self.window >= length)


def _attended(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, shape: Shape) -> Tensor:
    """(T, H, D), (T, H_kv, D), (T, H_kv, E) -> (T, H, E)"""
    if not fused(q, v, shape):
        apart: Tensor = _by_sequence(q, k, v, cu_seqlens, shape)
        return apart
    reach, grouped = (shape.window - 1 if shape.window else -1, 0), q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=shape.scale, window_size=reach, enable_gqa=grouped
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def fused(q: Tensor, v: Tensor, shape: Shape) -> bool:
    """Whether FlashAttention's kernel serves: one launch for all sequences, whose work grows with the sum of their
    lengths' squares.
    """
    served = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1]
    return served and shape.softcap is None and shape.sinks is None


# Its code depends on the lengths: compiled, each batch would be a graph of its own.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, shape: Shape) -> Tensor:
    """One attention a run of equally long neighbours, so that a batch of one length is one call."""
    out, start = [], 0
    for length, run in groupby(cu_seqlens.diff().tolist()):
        count = len(list(run))
        query, key, value = (
            x[start : start + length * count].reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        if shape.plain(length):
            grouped = q.shape[1] != k.shape[1]
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=shape.scale, enable_gqa=grouped
            )
        else:
            attended = _scored(query, key, value, shape)
        out.append(attended.transpose(1, 2).reshape(count * length, *attended.shape[1::2]))
        start += length * count
    return torch.cat(out)


def _scored(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """(S, H, L, D), (S, H_kv, L, D), (S, H_kv, L, E) -> (S, H, L, E), by all scores: for what no fused kernel has."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if shape.scale is None else shape.scale)
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    place = torch.arange(q.shape[2], device=q.device)
    back = place[:, None] - place
    scores = scores.masked_fill((back < 0) | (back >= (shape.window or q.shape[2])), float("-inf"))
    if shape.sinks is not None:
        scores = torch.cat([scores, shape.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype)[..., : q.shape[2]] @ v


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask is `cu_seqlens`."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
