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
    cuda: tuple[Any, ...] | None  # what rebuild_cuda_tensor takes, of the storage in which it lies
    file: str | None  # of the shared memory
    offset: int = 0  # where the tensor begins in either, in elements


def export(tensors: Mapping[str, Tensor]) -> dict[str, Handle]:
    """Handles of contiguous tensors, which must live as long as the handles are used. On CPU their memory moves, in place, into shared memory.

    Raises BadSpec when there is too little of that.
    """
    _check_room(tensors.values())
    opened: dict[int, tuple[Any, ...]] = {}
    return {name: _export(tensor.detach(), opened) for name, tensor in tensors.items()}


def _check_room(tensors: Iterable[Tensor]) -> None:
    """Before the kernel answers with SIGBUS."""
    own = [tensor for tensor in tensors if not tensor.is_cuda and not tensor.is_shared()]  # type: ignore[no-untyped-call]
    need = sum(tensor.nbytes for tensor in own)
    if need and need > (free := shutil.disk_usage(SHARED_MEMORY).free):
        raise BadSpec(
            f"spec.weightSync.backend: the parameters need {need >> 20} MiB in {SHARED_MEMORY}, which has {free >> 20} MiB free: "
            "set it to gloo, or give the pods more"
        )


def _export(tensor: Tensor, opened: dict[int, tuple[Any, ...]]) -> Handle:
    """opened: by storage; many tensors may lie in one."""
    dtype, storage = dtype_name(tensor.dtype), tensor.untyped_storage()
    if not tensor.numel():
        return Handle(dtype, 0, None, None)
    if tensor.is_cuda:
        if storage._cdata not in opened:
            opened[storage._cdata] = reduce_tensor(torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage))[1]  # type: ignore[no-untyped-call]
        return Handle(dtype, tensor.numel(), opened[storage._cdata], None, int(tensor.storage_offset()))
    descriptor, _ = storage._share_fd_cpu_()
    return Handle(dtype, tensor.numel(), None, f"/proc/{os.getpid()}/fd/{descriptor}", int(tensor.storage_offset()))


def open_all(handles: Mapping[str, Handle], device: torch.device) -> dict[str, Tensor]:
    """Flat tensors over the exporter's memory. They keep it mapped until they are dropped. Raises Unreachable."""
    opened: dict[Any, Any] = {}
    try:
        return {name: _open(handle, device, opened) for name, handle in handles.items()}
    except (RuntimeError, OSError) as error:
        raise Unreachable(f"a trainer rank's memory cannot be opened in the engine's process: {error}") from error


def _open(handle: Handle, device: torch.device, opened: dict[Any, Any]) -> Tensor:
    if not handle.numel:
        return torch.empty(0, dtype=getattr(torch, handle.dtype), device=device)
    key = handle.cuda or handle.file
    if key not in opened:
        opened[key] = _storage(handle, device)
    return torch.empty(0, dtype=getattr(torch, handle.dtype), device=device).set_(opened[key], handle.offset, (handle.numel,), (1,))


def _storage(handle: Handle, device: torch.device) -> Any:
    if handle.cuda is None:
        assert handle.file is not None
        return torch.UntypedStorage.from_file(handle.file, shared=True, nbytes=Path(handle.file).stat().st_size)
    arguments = list(handle.cuda)
    arguments[DEVICE_ARGUMENT] = device.index
    whole: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
    return whole.untyped_storage()
