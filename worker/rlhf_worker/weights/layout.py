"""Where each tensor of the checkpoint lies in transformers' parameters: a stretch of one of them.

Most parameters are a checkpoint tensor under its own name. transformers fuses others when it loads them (a layer's
experts are one parameter of three dimensions) or names them otherwise, by a mapping that `save_pretrained` reverses.
The same reversal over tensors without data, with its copies left out, tells which stretch of which parameter becomes
which tensor; no model is known here by name. """

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_worker.errors import BadSpec
from rlhf_worker.weights.plan import View


@dataclass(frozen=True, slots=True)
class Stretch:
    """A checkpoint tensor of this name and shape: the flat elements from `start` of a parameter."""

    name: str
    shape: torch.Size
    start: int = 0


Layout = Mapping[str, list[Stretch]]  # by parameter; they cover it


class _NoCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What would be a contiguous copy stays a view of its source."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))


def layout_of(lm: PreTrainedModel) -> Layout:
    """Of the policy. Raises BadSpec for a model whose checkpoint has tensors that are no stretches of its parameters.
    """
    path = f"spec.model.path: {lm.config.name_or_path}"
    wholes = {name: torch.empty(parameter.shape, device="meta") for name, parameter in lm.named_parameters()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in wholes.items()}
    found: dict[str, list[Stretch]] = {name: [] for name in wholes}
    with torch.no_grad(), _NoCopies():  # type: ignore[no-untyped-call]
        saved = revert_weight_conversion(lm, dict(wholes))
    for name, tensor in saved.items():
        owner = owners.get(tensor.untyped_storage()._cdata)
        if owner is None or not View(0, tuple(tensor.shape), tensor.stride()).contiguous:
            raise BadSpec(f"{path}: the trainer computes with {name} in another form than its checkpoint has: use "
                "another model")
        found[owner].append(Stretch(name, tensor.shape, int(tensor.storage_offset())))
    if lost := [
        name for name, parts in found.items() if sum(part.shape.numel() for part in parts) != wholes[name].numel()
    ]:
        raise BadSpec(f"{path}: transformers does not say which tensors of the checkpoint make up {lost[0]}")
    return found
