"""The plan's integers as torch sees them."""

import torch
from torch import Tensor

from rlhf_worker.weights.plan import View


def placed(tensor: Tensor, view: View) -> Tensor:
    """The view of a contiguous tensor's memory."""
    return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", as plans and handles carry it; getattr(torch, name) is the way back."""
    return str(dtype).removeprefix("torch.")
