"""From hidden states to log probabilities and entropies, in chunks whose logits nobody keeps: the forward pass leaves
each row's normaliser, the backward pass makes the logits once more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from rlhf_worker.trainer.compiled import compiled

LOGITS_BYTES = 1 << 30  # of the float32 logits that exist at the same time
NOWHERE = -1e30  # a logit; finite, for entropies multiply it with its probability of 0

# What models of transformers do to the head's logits, by the config's field: by which power of the value they are
# multiplied.
SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1, "logits_mup_width_multiplier": -1}
CAP = "final_logit_softcapping"


class Change(NamedTuple):
    """What is done to logits: times `scale`, to within +-`cap`, over `temperature`."""

    scale: float
    cap: float | None
    temperature: float


def change_of(config: PreTrainedConfig, temperature: float) -> Change:
    scale = 1.0
    for field, power in SCALES.items():
        scale *= (getattr(config, field, None) or 1.0) ** power
    return Change(scale, getattr(config, CAP, None), temperature)


@dataclass(frozen=True, slots=True)
class Head:
    layer: nn.Module  # (N, H) -> (N, V)
    change: Change
    vocabulary: int  # V
    fused: bool  # by compiled kernels


def logprobs_of(
    head: Head, hidden: Tensor, targets: Tensor, support: Tensor | None = None, *, entropy_gradient: bool
) -> Tensor:
    """hidden (N, H); targets (N,): the tokens that follow; support (N, 1 + topK): what they were drawn from, the target
    first and -1 for none, where not from all.

    -> (2, N) float32: their log probabilities, and entropies, of the distribution drawn from. Entropies pass on a
    gradient with `entropy_gradient` alone.
    """
    layer = head.layer
    if type(layer).forward is nn.Linear.forward:
        made: Tensor = _Logprobs.apply(  # type: ignore[no-untyped-call]
            hidden, layer.weight, layer.bias, targets, support, head, entropy_gradient
        )
        return made
    parts = [
        checkpoint(
            _by_autograd, head, entropy_gradient, hidden[part], targets[part], _part(support, part), use_reentrant=False
        )
        for part in _chunks(len(hidden), head.vocabulary)
    ]
    return torch.cat(parts, dim=1)


def wide_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, H), (V, H), (V,), of one type -> (N, V) float32. Of a lower type the sums stay float32, as in the engine's
    head: rounded to bfloat16, a logit of 20 is off by up to 0.06.
    """
    wide = _product(hidden, weight.t())
    return wide if bias is None else wide + bias.float()


def _by_autograd(
    head: Head, entropy_gradient: bool, hidden: Tensor, targets: Tensor, support: Tensor | None
) -> Tensor:  # fmt: skip
    """Of a head that is no linear layer."""
    logprobs, entropy, _ = _read(head.layer(hidden).float(), head.change, targets, support)
    return torch.stack([logprobs, entropy if entropy_gradient else entropy.detach()])


class _Logprobs(torch.autograd.Function):
    """See `logprobs_of`. Gradients are of their tensor's type; the weight's is summed over chunks in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, support: Tensor | None,
        head: Head, entropy_gradient: bool,
    ) -> Tensor:  # fmt: skip
        read = _kernel(_read, head, len(hidden))
        found = [
            read(wide_linear(hidden[part], weight, bias), head.change, targets[part], _part(support, part))
            for part in _chunks(len(hidden), head.vocabulary)
        ]
        logprobs, entropy, normaliser = (torch.cat(rows) for rows in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, support, entropy, normaliser)
        ctx.head, ctx.entropy_gradient = head, entropy_gradient
        return torch.stack([logprobs, entropy])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, support, entropy, normaliser = ctx.saved_tensors
        slopes, to_entropy = _kernel(_slopes, ctx.head, len(hidden)), gradient[1] if ctx.entropy_gradient else None
        to_hidden, to_weight, to_bias = torch.empty_like(hidden), None, None
        for part in _chunks(len(hidden), ctx.head.vocabulary):
            lower = slopes(
                wide_linear(hidden[part], weight, bias), ctx.head.change, targets[part], _part(support, part),
                normaliser[part], entropy[part], gradient[0, part], _part(to_entropy, part), weight.dtype,
            )  # fmt: skip
            to_hidden[part] = lower @ weight
            if ctx.needs_input_grad[1]:
                to_weight = _added(to_weight, _product(lower.t(), hidden[part]))
            if ctx.needs_input_grad[2]:
                to_bias = _added(to_bias, lower.sum(0, dtype=torch.float32))
        lowered = (None if wide is None else wide.to(weight.dtype) for wide in (to_weight, to_bias))
        return to_hidden, *lowered, None, None, None, None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    """`rows` in runs of nearly one length, each of one row at the least."""
    count = max(1, -(-rows * vocabulary * 4 // LOGITS_BYTES))
    cuts = [rows * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(cuts) if end > start]


def _part(rows: Tensor | None, part: slice) -> Tensor | None:
    return None if rows is None else rows[part]


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(N, K), (K, M), of one type -> (N, M) float32"""
    if a.dtype is torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function)


def _kernel(function: Callable[..., Any], head: Head, rows: int) -> Callable[..., Any]:
    """One row, which only fillers have, would be a graph of its own."""
    return _compiled(function) if head.fused and rows > 1 else function


def _changed(logits: Tensor, change: Change, support: Tensor | None) -> Tensor:
    """(N, V) -> (N, V), or those of `support`, (N, S), and for -1 one so low that it counts for nothing."""
    logits = logits * change.scale if change.scale != 1 else logits
    logits = change.cap * torch.tanh(logits / change.cap) if change.cap is not None else logits
    logits = logits / change.temperature if change.temperature != 1 else logits
    if support is None:
        return logits
    return logits.gather(1, support.clamp(min=0)).masked_fill(support < 0, NOWHERE)


def _read(
    logits: Tensor, change: Change, targets: Tensor, support: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> log probabilities, entropies and normalisers, (N,) each."""
    logits = _changed(logits, change, support)
    chosen = targets[:, None] if support is None else torch.zeros_like(targets)[:, None]
    highest = logits.detach().amax(-1)  # apart, so that the logits are read twice in all
    weights = (logits - highest[:, None]).exp()
    total = weights.sum(-1)
    normaliser = highest + total.log()
    entropy = normaliser - (weights * logits).sum(-1) / total
    return logits.gather(1, chosen)[:, 0] - normaliser, entropy, normaliser


def _slopes(
    logits: Tensor, change: Change, targets: Tensor, support: Tensor | None, normaliser: Tensor, entropy: Tensor,
    gradient: Tensor, entropy_gradient: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Of what `_read` gives, back to the logits, (N, V) of `dtype`; p = softmax of the changed logits z:
    d log p_t / d z = [t] - p, d H / d z = -p (log p + H).
    """
    logprobs = _changed(logits, change, support) - normaliser[:, None]
    share = gradient[:, None]
    if entropy_gradient is not None:
        share = share + entropy_gradient[:, None] * (logprobs + entropy[:, None])
    place = torch.arange(logprobs.shape[1], device=logits.device)
    chosen = targets[:, None] if support is None else torch.zeros_like(targets)[:, None]
    slopes = torch.where(place == chosen, gradient[:, None], 0.0) - logprobs.exp() * share
    if support is not None:
        slopes = torch.zeros_like(logits).scatter_add(1, support.clamp(min=0), slopes)
    slopes = slopes * (change.scale / change.temperature)
    if change.cap is not None:
        slopes = slopes * (1 - torch.tanh(logits * change.scale / change.cap).square())
    return slopes.to(dtype)
