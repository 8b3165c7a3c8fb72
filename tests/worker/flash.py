"""torch's FlashAttention operators on a CPU, by plain formulas: what is compiled around them is what a GPU compiles."""

from typing import Any

import torch
from torch import Tensor


def _weights(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """(T, H, D), (T, H_kv, D) -> (H, T, T): causal in each sequence."""
    rows = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff().long())
    seen = (rows[:, None] == rows) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", q.float(), _repeated(k, q)) * (scale or q.shape[-1] ** -0.5)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).float()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, _: Any, __: int, ___: int, causal: bool = False,
    scale: float | None = None, *____: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = torch.einsum("hqk,khd->qhd", _weights(q, k, cu_seqlens, scale), _repeated(v, q))
    return torch.empty_like(q).copy_(made), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, _: Tensor, cu_seqlens: Tensor, *rest: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    scale = rest[5] or q.shape[-1] ** -0.5
    weights, wide = _weights(q, k, cu_seqlens, scale), gradient.float()
    slopes = torch.einsum("qhd,khd->hqk", wide, _repeated(v, q))
    slopes = weights * (slopes - (slopes * weights).sum(-1, keepdim=True)) * scale
    whole = (
        torch.einsum("hqk,khd->qhd", slopes, _repeated(k, q)), torch.einsum("hqk,qhd->khd", slopes, q.float()),
        torch.einsum("hqk,qhd->khd", weights, wide),
    )  # fmt: skip
    return tuple(
        torch.empty_like(like).copy_(made.reshape(len(made), like.shape[1], -1, made.shape[2]).sum(2))
        for like, made in zip((q, k, v), whole, strict=True)
    )


def install() -> None:
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", _backward)
