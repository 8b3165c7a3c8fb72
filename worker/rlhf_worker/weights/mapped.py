"""The trainer's memory as the engine's processes see it: CUDA IPC on GPUs of one host, shared memory on CPUs.

The engine's process must see the GPU that holds the memory; another GPU's is read over peer access. torch counts a CUDA
handle's readers down by one, from one: each engine rank opens, once, a handle of its own, or the trainer's memory would
never be free again. """

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
# Of rebuild_cuda_tensor: the index of the device, which is another in the other process; and whether to wait for an
# event of the exporter, which has waited itself, and which torch would never destroy.
DEVICE_ARGUMENT, EVENT_ARGUMENT = 6, 14


class Unreachable(Exception):
    """Another process's memory cannot be opened here."""


@dataclass(frozen=True, slots=True)
class Handle:
    """Of one contiguous tensor."""

    dtype: str
    numel: int
    cuda: tuple[tuple[Any, ...], ...]  # by reader: what rebuild_cuda_tensor takes; none on CPU
    file: str | None  # of the shared memory, and where the tensor begins in it, in elements
    offset: int = 0


def export(tensors: Mapping[str, Tensor], readers: int) -> dict[str, Handle]:
    """Handles of contiguous tensors, which must live as long as the handles are used. On CPU their memory moves, in
    place, into shared memory.

    readers: engine ranks; each must open every handle, once. What was written to the tensors must be there. Raises
    BadSpec when there is too little shared memory. """
    _check_room(tensors.values())
    return {name: _export(tensor.detach(), readers) for name, tensor in tensors.items()}


def _check_room(tensors: Iterable[Tensor]) -> None:
    """Before the kernel answers with SIGBUS."""
    own = [
        tensor for tensor in tensors if not tensor.is_cuda and not tensor.is_shared()  # type: ignore[no-untyped-call]
    ]
    need = sum(tensor.nbytes for tensor in own)
    if need and need > (free := shutil.disk_usage(SHARED_MEMORY).free):
        raise BadSpec(
            f"spec.weightSync.backend: the parameters need {need >> 20} MiB in {SHARED_MEMORY}, which has "
                f"{free >> 20} MiB free: "
            "set it to gloo, or give the pods more"
        )


def _export(tensor: Tensor, readers: int) -> Handle:
    dtype = dtype_name(tensor.dtype)
    if not tensor.numel():
        return Handle(dtype, 0, (), None)
    if tensor.is_cuda:
        return Handle(
            dtype, tensor.numel(), tuple(reduce_tensor(tensor)[1] for _ in range(readers)), None  # type: ignore[no-untyped-call]
        )
    descriptor, _ = tensor.untyped_storage()._share_fd_cpu_()
    return Handle(dtype, tensor.numel(), (), f"/proc/{os.getpid()}/fd/{descriptor}", int(tensor.storage_offset()))


def open_all(handles: Mapping[str, Handle], device: torch.device, reader: int) -> dict[str, Tensor]:
    """Flat tensors over the exporter's memory, for one of its readers. They keep it mapped until they are dropped.
    Raises Unreachable.
    """
    try:
        return {name: _open(handle, device, reader) for name, handle in handles.items()}
    except (RuntimeError, OSError) as error:
        raise Unreachable(f"a trainer rank's memory cannot be opened in the engine's process: {error}") from error


def _open(handle: Handle, device: torch.device, reader: int) -> Tensor:
    if handle.cuda:
        arguments = list(handle.cuda[reader])
        arguments[DEVICE_ARGUMENT], arguments[EVENT_ARGUMENT] = device.index, False
        opened: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
        return opened.view(-1)
    made = torch.empty(0, dtype=getattr(torch, handle.dtype), device=device)
    if handle.file is None:
        return made
    storage: Any = torch.UntypedStorage.from_file(handle.file, shared=True, nbytes=Path(handle.file).stat().st_size)
    return made.set_(storage, handle.offset, (handle.numel,), (1,))
