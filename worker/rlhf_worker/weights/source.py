"""The policy's weights as tensors of its checkpoint: the part that this rank holds, or, for vLLM's own backends, whole
tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from rlhf_worker.weights.layout import Layout, Stretch
from rlhf_worker.weights.plan import Extent

Named = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Held:
    """This rank's part of a parameter: flat elements `extent` of the whole, in contiguous memory."""

    local: Tensor
    extent: Extent


class PolicySource(WeightSource):
    """named: the parameters, in one order on every rank; tied ones come once. dtype: the engine's.

    layout: the checkpoint tensors that lie in each parameter; one that is not in it is a tensor of its own name.
    transient: their memory is given back after each sync, so that nobody may keep it open.
    """

    def __init__(
        self, named: Named, dtype: torch.dtype, layout: Layout | None = None, *, transient: bool = False,
    ) -> None:
        self._named = named
        self._layout = layout or {}
        self.dtype = dtype
        self.transient = transient

    def _of(self, name: str, shape: torch.Size) -> list[Stretch]:
        return self._layout.get(name) or [Stretch(name, shape)]

    def held(self) -> dict[str, Held]:
        """No copies: the tensors are the parameters' own memory. Raises ValueError for a layout that is not rows."""
        return {name: _held(name, parameter.detach()) for name, parameter in self._named()}

    def places(self) -> dict[str, tuple[str, int]]:
        """By tensor of the checkpoint: the parameter in which it lies, and its first element there."""
        return {
            part.name: (name, part.start)
            for name, parameter in self._named() for part in self._of(name, parameter.shape)
        }

    def local_tensors(self) -> list[Tensor]:
        """The memory of `held`, a tensor a parameter: cheap, for each sync."""
        return [
            parameter._local_tensor if isinstance(parameter, DTensor) else parameter for _, parameter in self._named()
        ]

    def own_metas(self) -> tuple[ParamMeta, ...]:
        """In the trainer's own types."""
        return tuple(
            ParamMeta(part.name, parameter.dtype, tuple(part.shape))
            for name, parameter in self._named() for part in self._of(name, parameter.shape)
        )

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(meta.name, self.dtype, meta.shape) for meta in self.own_metas()]

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by their own names, in the engine's type. Gathering one is a collective: every rank
        iterates.
        """
        for name, parameter in self._named():
            # Cast before the gather: half the bytes.
            cast = parameter.detach().to(self.dtype)
            yield name, cast.full_tensor() if isinstance(cast, DTensor) else cast

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Whole checkpoint tensors; as `whole` otherwise."""
        for name, tensor in self.whole():
            for part in self._of(name, tensor.shape):
                yield part.name, tensor.view(-1)[part.start : part.start + part.shape.numel()].view(part.shape)


def _held(name: str, parameter: Tensor) -> Held:
    if not isinstance(parameter, DTensor):
        return Held(parameter.view(-1), (0, parameter.numel()))
    if parameter.placements not in ((Shard(0),), (Replicate(), Shard(0))):
        raise ValueError(f"weight sync: {name} is laid out as {parameter.placements}; it must be sharded by rows, or "
            "copied and sharded by rows")
    local, rows = parameter.to_local(), compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements,
    )[1][0]
    first = rows * (parameter.numel() // max(1, parameter.shape[0]))
    return Held(local.view(-1), (first, first + local.numel()))
