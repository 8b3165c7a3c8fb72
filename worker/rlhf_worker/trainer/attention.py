"""Attention over packed batches, under transformers' interface for it: block-diagonal by `cu_seqlens`, causal within each sequence."""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from rlhf_worker.errors import BadSpec
from rlhf_worker.trainer.context import by_heads, by_positions

PACKED_ATTENTION = "rlhf_packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, sliding_window: int | None = None, s_aux: Tensor | None = None,
    cp_mesh: DeviceMesh | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D). Causal within each sequence.

    cp_mesh: T are this rank's positions, cu_seq_lens_q are all.
    """
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q: call the model through RoleModule")
    if s_aux is not None:
        raise BadSpec("spec.model.path: packed attention leaves out the model's attention sinks: set spec.trainer.batching to padded")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if cp_mesh is None:
        return _attended(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None
    q, k, v = by_heads(cp_mesh, q, k, v)
    made = _attended(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return by_positions(cp_mesh, made)[None], None


def _attended(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, window: int | None) -> Tensor:
    """(T, H, D) each -> (T, H, D)"""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return _by_sequence(q, k, v, cu_seqlens.diff().tolist(), scale, window)
    reach = (window - 1 if window else -1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=reach, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None, window: int | None) -> Tensor:
    """(T, H, D) each: one attention a run of equally long neighbours, so that a batch of one length is one call."""
    if window is not None and window < max(lengths):
        raise BadSpec(f"spec.model.path: sliding-window attention ({window}) over longer sequences ({max(lengths)}) is trained on GPU in bfloat16 only")
    out, start = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        query, key, value = (x[start : start + length * count].reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out.append(made.transpose(1, 2).reshape(count * length, *q.shape[1:]))
        start += length * count
    return torch.cat(out)


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask is `cu_seqlens`."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
