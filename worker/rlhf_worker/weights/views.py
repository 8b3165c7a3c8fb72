"""The plan's integers as torch sees them."""

import torch
from torch import Tensor

from rlhf_worker.weights.plan import View


def placed(tensor: Tensor, view: View) -> Tensor:
    """The view of a contiguous tensor's memory."""
    return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)


def copy_all(into: list[Tensor], out: list[Tensor]) -> None:
    """A GPU copies a list of contiguous tensors by few kernels; a single strided one in it would leave each to a kernel
    of its own.
    """
    for plain in (True, False):
        pairs = [
            pair for pair in zip(into, out, strict=True) if plain == all(tensor.is_contiguous() for tensor in pair)
        ]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [of for _, of in pairs])


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", as plans and handles carry it; getattr(torch, name) is the way back."""
    return str(dtype).removeprefix("torch.")
