"""Whether a model computes each sequence of a batch as if it were alone: tried at load with two short ones.

What leaks from one sequence into the next (states of linear attention, convolutions), what an attention leaves out
(sinks, soft caps, biases) and what a head does to its logits show here, for models that nobody has heard of too.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Batching, TrainSequence, packed
from rlhf_worker.trainer.attention import PACKED_ATTENTION
from rlhf_worker.trainer.model import PolicyModule, RoleModule, inputs_of

LENGTHS = (26, 9)  # tokens; the second is the one that a state leaks into, most where it begins
# Largest mean difference of a sequence: nats; under a scalar head, the part of what its last states are on average.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
STRUCTURAL = (TypeError, ValueError, NotImplementedError, AttributeError, KeyError)  # raised alike on every rank


def choose(
    module: RoleModule, attentions: Sequence[str], dtype: str, device: torch.device, worst: Callable[[float], float],
    what: str,
) -> Batching:
    """Leaves `module` under the first of `attentions` by which a batch is each sequence alone. All ranks take part.

    worst: the largest of all ranks' values; what: field, path and kind of the model. Raises BadSpec when none does.
    """
    module.attend("eager") or module.attend(module.own_attention)
    rows, tried = [_tokens(module, length, seed) for seed, length in enumerate(LENGTHS)], []
    with torch.no_grad():
        wanted = [module.alone(torch.tensor(row, device=device)) for row in rows]
    for attention in attentions:
        apart = worst(_apart(module, attention, rows, wanted, device))
        layout = "packed" if attention == PACKED_ATTENTION else f"padded ({attention})"
        tried.append(f"{layout} batches differ from each sequence alone by {apart:.2g}")
        if apart <= TOLERANCE[dtype]:
            return Batching(
                attention != PACKED_ATTENTION, f"{what}: {', '.join(tried)}, of {TOLERANCE[dtype]:g} that are rounding"
            )
    raise BadSpec(
        f"{what}: {', '.join(tried)}, but {TOLERANCE[dtype]:g} at most are rounding: "
        "the trainer would learn from wrong numbers; "
        "use a model of another kind" + (", or set spec.trainer.contextParallel to 1" if module.cp_mesh else "")
    )


@torch.no_grad()
def _apart(
    module: RoleModule, attention: str, rows: list[list[int]], wanted: list[tuple[Tensor, Tensor]], device: torch.device
) -> float:
    """The largest mean difference of a sequence; infinite where the model cannot be called so."""
    if not module.attend(attention):
        return math.inf
    try:
        together = _together(module, rows, torch.cat([targets for _, targets in wanted]))
    except STRUCTURAL:
        return math.inf
    size = 1.0 if isinstance(module, PolicyModule) else wanted[0][0].abs().mean()
    apart = max(
        ((a - b).abs().mean() / size).item()
        for a, (b, _) in zip(torch.split(together, [*map(len, rows)], dim=-1), wanted, strict=True)
    )
    return math.inf if math.isnan(apart) else apart


def _together(module: RoleModule, rows: list[list[int]], targets: Tensor) -> Tensor:
    """(..., N): as each of `rows` alone, end to end."""
    batch = packed([TrainSequence.plain(row) for row in rows])
    where = torch.arange(len(targets), device=targets.device)
    if isinstance(module, PolicyModule):
        logprobs: Tensor = module(*inputs_of(batch, targets.device), where, targets)[0]
        return logprobs
    module.read = lambda hidden, *_: hidden.float().T  # type: ignore[method-assign]  # a new critic's head gives zeros
    try:
        states: Tensor = module(*inputs_of(batch, targets.device), where)
        return states
    finally:
        del module.read


def _tokens(module: RoleModule, length: int, seed: int) -> list[int]:
    """Scattered over the vocabulary, without the random numbers of anyone."""
    size = module.lm.get_input_embeddings().num_embeddings
    return [(7919 * (i + 1) + 104729 * (seed + 1)) % size for i in range(length)]
