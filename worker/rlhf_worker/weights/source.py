"""The policy's parameters by their checkpoint names: the rows that this rank holds, or, for vLLM's own backends, whole tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from rlhf_worker.weights.plan import Extent

Named = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Held:
    """This rank's part of a checkpoint tensor: flat elements `extent` of the whole, in contiguous memory."""

    local: Tensor
    extent: Extent


class PolicySource(WeightSource):
    """named: the parameters, in one order on every rank; tied ones come once. dtype: the engine's.

    transient: their memory is given back after each sync, so that nobody may keep it open.
    """

    def __init__(self, named: Named, dtype: torch.dtype, *, transient: bool = False) -> None:
        self._named = named
        self.dtype = dtype
        self.transient = transient

    def held(self) -> dict[str, Held]:
        """No copies: the tensors are the parameters' own memory. Raises ValueError for a layout that is not rows."""
        return {name: _held(name, parameter.detach()) for name, parameter in self._named()}

    def local_tensors(self) -> list[Tensor]:
        """The memory of `held`, in its order: cheap, for each sync."""
        return [parameter._local_tensor if isinstance(parameter, DTensor) else parameter for _, parameter in self._named()]

    def own_metas(self) -> tuple[ParamMeta, ...]:
        """In the trainer's own types."""
        return tuple(ParamMeta(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in self._named())

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self.dtype, tuple(parameter.shape)) for name, parameter in self._named()]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in the engine's type. Gathering one is a collective: every rank iterates."""
        for name, parameter in self._named():
            # Cast before the gather: half the bytes.
            cast = parameter.detach().to(self.dtype)
            yield name, cast.full_tensor() if isinstance(cast, DTensor) else cast


def _held(name: str, parameter: Tensor) -> Held:
    if not isinstance(parameter, DTensor):
        return Held(parameter, (0, parameter.numel()))
    if parameter.placements != (Shard(0),):
        raise ValueError(f"weight sync: {name} is laid out as {parameter.placements}; it must be sharded by rows over one mesh dimension")
    _, first = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local()
    start = first[0] * (parameter.numel() // max(1, parameter.shape[0]))
    return Held(local, (start, start + local.numel()))
