"""Losses over the completion tokens of one micro-batch. Pure tensor functions: they sum, and never average.

`weights` carries the one normaliser of the whole optimizer update, so the sums (losses and metrics alike) of all
micro-batches of all ranks add up to the update's value, whatever the packing. All tensors of a call have one shape, one
entry a token; a token that must not count has weight 0 and finite values.
"""

from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite and its square too
KL_LIMIT = 10.0

Metrics = dict[str, Tensor]
Estimator = Literal["k1", "k2", "k3"]


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """The clipped policy gradient (PPO, arXiv 1707.06347): sum of w max(-r A, -clip(r, 1 - low, 1 + high) A), a scalar.

    Gradients flow through `logprobs` only. Metrics are weighted sums, detached: ratio, clipped fraction and policy KL (k3 of
    the old policy from the new one).
    """
    log_ratio = (logprobs - old_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = (weights * torch.maximum(free, clipped)).sum()
    with torch.no_grad():
        metrics = {
            "ratio": (weights * ratio).sum(),
            "clip_fraction": (weights * (clipped > free)).sum(),
            "policy_kl": (weights * _k3(-log_ratio)).sum(),
        }
    return loss, metrics


def kl(estimator: Estimator, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Each token's estimate of KL(pi || pi_ref) with d = log pi - log pi_ref (joschu.net/blog/kl-approx.html), same shape.

    k1 = d (unbiased; as a loss its expected gradient is 0), k2 = d^2 / 2 (right gradient on-policy), k3 = exp(-d) - 1 + d
    (unbiased, low variance). d is clamped to +-20 and the result to +-10.
    """
    d = (logprobs - ref_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    value = {"k1": lambda: d, "k2": lambda: 0.5 * d * d, "k3": lambda: _k3(d)}[estimator]()
    return value.clamp(-KL_LIMIT, KL_LIMIT)


def _k3(d: Tensor) -> Tensor:
    return torch.expm1(-d) + d


def mismatch(logprobs: Tensor, rollout_logprobs: Tensor, weights: Tensor) -> Metrics:
    """How far the engine's log probabilities are from the trainer's, as weighted sums: mean |difference| and KL (k3) of engine from trainer."""
    with torch.no_grad():
        d = rollout_logprobs - logprobs
        return {"mismatch": (weights * d.abs()).sum(), "mismatch_kl": (weights * kl("k3", rollout_logprobs, logprobs)).sum()}
