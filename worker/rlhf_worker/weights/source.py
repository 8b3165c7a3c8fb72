"""The policy's parameters as vLLM's weight-transfer API wants them: checkpoint names, whole tensors, the engine's dtype."""

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from rlhf_worker.model import PREFIX, PolicyModule


class PolicySource(WeightSource):
    """Every rank iterates in the same order: gathering a parameter is a collective. Tied parameters come once."""

    def __init__(self, module: PolicyModule, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name.removeprefix(PREFIX), self._dtype, tuple(p.shape)) for name, p in self._module.named_parameters()]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._module.named_parameters():
            # Cast before the gather: half the bytes.
            cast = parameter.detach().to(self._dtype)
            yield name.removeprefix(PREFIX), cast.full_tensor() if isinstance(cast, DTensor) else cast
