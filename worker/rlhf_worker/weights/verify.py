"""Proof that the engines hold what the trainer has: what each engine rank's parameters must hash to. Pure.

vLLM fuses and splits the checkpoint's tensors: `packed` names its fused modules (qkv_proj: q_proj, k_proj, v_proj), and each
tensor-parallel rank holds a slice whose axis and place follow from the shapes.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]
Packed = Mapping[str, Sequence[str]]


def digest(tensor: Tensor) -> str:
    """As vLLM computes it: SHA-256 of the contiguous bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def part_names(name: str, packed: Packed) -> list[str]:
    """The checkpoint's names that make up the engine's parameter `name`; itself where it is not fused."""
    *path, module, kind = ["", *name.split(".")]
    return [".".join([*path, part, kind]).lstrip(".") for part in packed.get(module, [module])]


class Ledger:
    """Takes the checkpoint's tensors one by one, whole, and hashes every engine rank's slice as soon as its parts are there."""

    def __init__(self, shapes: Sequence[Mapping[str, Shape]], packed: Packed) -> None:
        """shapes: the engine's parameters of each tensor-parallel rank, by vLLM's names."""
        self.digests: list[dict[str, str]] = [{} for _ in shapes]
        self._shapes = shapes
        self._parts = {name: part_names(name, packed) for name in shapes[0]}
        self._waiting = {part: name for name, parts in self._parts.items() for part in parts}
        self._held: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Keeps the tensor until the last part of its fused parameter comes."""
        if (target := self._waiting.get(name)) is None:
            return
        self._held[name] = tensor
        parts = self._parts[target]
        if all(part in self._held for part in parts):
            self._hash(target, [self._held.pop(part) for part in parts])

    def _hash(self, target: str, parts: list[Tensor]) -> None:
        for rank, shapes in enumerate(self._shapes):
            made = engine_slice(parts, tuple(shapes[target]), rank, len(self._shapes))
            if made is not None:
                self.digests[rank][target] = digest(made)


def engine_slice(parts: Sequence[Tensor], shape: Shape, rank: int, ranks: int) -> Tensor | None:
    """The tensor of `shape` that rank `rank` of `ranks` holds of whole checkpoint tensors fused along axis 0; None if no rule makes it."""
    if len(shape) > 1 and parts[0].shape[1] == shape[1] * ranks and ranks > 1:
        made = parts[0].chunk(ranks, dim=1)[rank] if len(parts) == 1 else None
    elif sum(part.shape[0] for part in parts) == shape[0]:
        made = torch.cat(list(parts))
    elif len(parts) == 1:
        made = _rows(parts[0], shape[0], rank)
    else:
        made = torch.cat([part.chunk(ranks)[rank] for part in parts]) if all(part.shape[0] % ranks == 0 for part in parts) else None
    return made if made is not None and tuple(made.shape) == shape else None


def _rows(tensor: Tensor, rows: int, rank: int) -> Tensor:
    """Block `rank` of `rows` rows; vLLM pads vocabularies with zero rows."""
    block = tensor[rank * rows : (rank + 1) * rows]
    missing = rows - block.shape[0]
    return torch.cat([block, block.new_zeros(missing, *block.shape[1:])]) if missing else block
