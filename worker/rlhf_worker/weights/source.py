"""The policy's weights as tensors of its checkpoint: the part that this rank holds, or, for vLLM's own backends, whole tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from rlhf_worker.weights.layout import Layout, Stretch
from rlhf_worker.weights.plan import Extent

Named = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Held:
    """This rank's part of a checkpoint tensor: flat elements `extent` of the whole, in contiguous memory."""

    local: Tensor
    extent: Extent


class PolicySource(WeightSource):
    """named: the parameters, in one order on every rank; tied ones come once. dtype: the engine's.

    layout: the checkpoint tensors that lie in each parameter; one that is not in it is a tensor of its own name.
    transient: their memory is given back after each sync, so that nobody may keep it open.
    """

    def __init__(self, named: Named, dtype: torch.dtype, layout: Layout | None = None, *, transient: bool = False) -> None:
        self._named = named
        self._layout = layout or {}
        self.dtype = dtype
        self.transient = transient

    def _stretches(self) -> Iterator[tuple[Stretch, Tensor]]:
        """Every checkpoint tensor, with the parameter in which it lies."""
        for name, parameter in self._named():
            for stretch in self._layout.get(name, [Stretch(name, parameter.shape)]):
                yield stretch, parameter

    def held(self) -> dict[str, Held]:
        """No copies: the tensors are the parameters' own memory. Raises ValueError for a layout that is not rows."""
        return {stretch.name: _held(stretch, parameter.detach()) for stretch, parameter in self._stretches()}

    def local_tensors(self) -> list[Tensor]:
        """The memory of `held`, a tensor a parameter: cheap, for each sync."""
        return [parameter._local_tensor if isinstance(parameter, DTensor) else parameter for _, parameter in self._named()]

    def own_metas(self) -> tuple[ParamMeta, ...]:
        """In the trainer's own types."""
        return tuple(ParamMeta(stretch.name, parameter.dtype, tuple(stretch.shape)) for stretch, parameter in self._stretches())

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(stretch.name, self.dtype, tuple(stretch.shape)) for stretch, _ in self._stretches()]

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by their own names, in the engine's type. Gathering one is a collective: every rank iterates."""
        for name, parameter in self._named():
            # Cast before the gather: half the bytes.
            cast = parameter.detach().to(self.dtype)
            yield name, cast.full_tensor() if isinstance(cast, DTensor) else cast

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Whole checkpoint tensors; as `whole` otherwise."""
        for name, tensor in self.whole():
            for stretch in self._layout.get(name, [Stretch(name, tensor.shape)]):
                yield stretch.name, tensor.flatten()[stretch.start : stretch.start + stretch.shape.numel()].view(stretch.shape)


def _held(stretch: Stretch, parameter: Tensor) -> Held:
    local, first = parameter, 0
    if isinstance(parameter, DTensor):
        if parameter.placements != (Shard(0),):
            raise ValueError(f"weight sync: {stretch.name} is laid out as {parameter.placements}; it must be sharded by rows over one mesh dimension")
        local, rows = parameter.to_local(), compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)[1][0]
        first = rows * (parameter.numel() // max(1, parameter.shape[0]))
    # The elements that are both of this rank's rows and of the stretch, counted from the beginning of the stretch.
    start, stop = (min(max(edge, 0), stretch.shape.numel()) for edge in (first - stretch.start, first + local.numel() - stretch.start))
    begin = start + stretch.start - first
    return Held(local.view(-1)[begin : begin + stop - start], (start, stop))
