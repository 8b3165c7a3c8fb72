"""The trainer's memory as the engine's processes see it: CUDA IPC on GPUs of one host, shared memory on CPUs.

Handles are made once and opened once. The engine's process must see the GPU that holds the memory; another GPU's is read over peer access.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rlhf_worker.errors import BadSpec
from rlhf_worker.weights.views import dtype_name

SHARED_MEMORY = "/dev/shm"
DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the index of the device, which is another in the other process


class Unreachable(Exception):
    """Another process's memory cannot be opened here."""


@dataclass(frozen=True, slots=True)
class Handle:
    """Of one contiguous tensor."""

    dtype: str
    numel: int
    cuda: tuple[Any, ...] | None  # what rebuild_cuda_tensor takes
    file: str | None  # of the shared memory, and where the tensor begins in it, in elements
    offset: int = 0


def export(tensors: Mapping[str, Tensor]) -> dict[str, Handle]:
    """Handles of contiguous tensors, which must live as long as the handles are used. On CPU their memory moves, in place, into shared memory.

    Raises BadSpec when there is too little of that.
    """
    _check_room(tensors.values())
    return {name: _export(tensor.detach()) for name, tensor in tensors.items()}


def _check_room(tensors: Iterable[Tensor]) -> None:
    """Before the kernel answers with SIGBUS."""
    own = [tensor for tensor in tensors if not tensor.is_cuda and not tensor.is_shared()]  # type: ignore[no-untyped-call]
    need = sum(tensor.nbytes for tensor in own)
    if need and need > (free := shutil.disk_usage(SHARED_MEMORY).free):
        raise BadSpec(
            f"spec.weightSync.backend: the parameters need {need >> 20} MiB in {SHARED_MEMORY}, which has {free >> 20} MiB free: "
            "set it to gloo, or give the pods more"
        )


def _export(tensor: Tensor) -> Handle:
    dtype = dtype_name(tensor.dtype)
    if not tensor.numel():
        return Handle(dtype, 0, None, None)
    if tensor.is_cuda:
        return Handle(dtype, tensor.numel(), reduce_tensor(tensor)[1], None)  # type: ignore[no-untyped-call]
    descriptor, _ = tensor.untyped_storage()._share_fd_cpu_()
    return Handle(dtype, tensor.numel(), None, f"/proc/{os.getpid()}/fd/{descriptor}", int(tensor.storage_offset()))


def open_all(handles: Mapping[str, Handle], device: torch.device) -> dict[str, Tensor]:
    """Flat tensors over the exporter's memory. They keep it mapped until they are dropped. Raises Unreachable."""
    try:
        return {name: _open(handle, device) for name, handle in handles.items()}
    except (RuntimeError, OSError) as error:
        raise Unreachable(f"a trainer rank's memory cannot be opened in the engine's process: {error}") from error


def _open(handle: Handle, device: torch.device) -> Tensor:
    if handle.cuda is not None:
        opened: Tensor = rebuild_cuda_tensor(*[*handle.cuda[:DEVICE_ARGUMENT], device.index, *handle.cuda[DEVICE_ARGUMENT + 1 :]])  # type: ignore[no-untyped-call]
        return opened.view(-1)
    made = torch.empty(0, dtype=getattr(torch, handle.dtype), device=device)
    if handle.file is None:
        return made
    storage: Any = torch.UntypedStorage.from_file(handle.file, shared=True, nbytes=Path(handle.file).stat().st_size)
    return made.set_(storage, handle.offset, (handle.numel,), (1,))
