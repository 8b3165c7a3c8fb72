"""A role's tensors on the host while the role is not used: their storages are emptied in place, so that every tensor
over them stays, and what refers to them, such as a weight sync's views, is good again after `fetch`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Shelf:
    """The host's memory for some tensors; on a machine with GPUs pinned, which takes long to make, so it is kept.

    Copies run one after the other without a wait between them, and in order with what the device computes.
    """

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []  # emptied storages, and their bytes here
        self._kept: dict[int, Tensor] = {}  # the memory, by the address of the storage that it belongs to

    def put_away(self, tensors: Iterable[Any]) -> None:
        """Those that are not away already. The host's own in shared memory, where engines read them, stay."""
        there = {storage._cdata: storage for storage in _storages(tensors)}  # tied tensors share one
        found = [storage for storage in there.values() if storage.nbytes() and _goes(storage)]
        if not found:
            return
        self._away += [(storage, self._copy(storage)) for storage in found]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        for storage in found:
            storage.resize_(0)
        self._kept = {storage._cdata: here for storage, here in self._away}  # of tensors that are gone, no more
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # other processes share the GPU

    def fetch(self) -> None:
        for storage, here in self._away:
            storage.resize_(here.nbytes)
            _bytes(storage).copy_(here, non_blocking=True)
        self._away = []

    def _copy(self, storage: torch.UntypedStorage) -> Tensor:
        there, here = _bytes(storage), self._kept.get(storage._cdata)
        if here is None or here.nbytes != there.nbytes:
            here = torch.empty(there.shape, dtype=torch.uint8, pin_memory=there.is_cuda)
        return here.copy_(there, non_blocking=True)


def _goes(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cuda" or not storage.is_shared()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(tensors: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()).untyped_storage()
