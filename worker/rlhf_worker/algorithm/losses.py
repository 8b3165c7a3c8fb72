"""Losses over the completion tokens of one micro-batch. Pure tensor functions: they sum, and never average.

Columns carry the one normaliser of the whole optimizer update: `loss_weights` that of the loss, `token_weights` that of the
metrics (a mean over the update's tokens). So the sums of all micro-batches of all ranks add up to the update's value, whatever
the packing. All tensors of a call have one shape, (N,), one entry a target; a target that must not count has weight 0 and finite values.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rlhf_api.job import AlgorithmSpec

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite and its square too
KL_LIMIT = 10.0

Metrics = dict[str, Tensor]
Estimator = Literal["k1", "k2", "k3"]


def policy_loss(spec: AlgorithmSpec, logprobs: Tensor, columns: Mapping[str, Tensor], sequence: Tensor) -> tuple[Tensor, Metrics]:
    """The loss of any algorithm, a scalar, and its metrics, weighted sums, detached. Gradients flow through `logprobs` only.

    `columns`: advantages, loss_weights, token_weights, rollout_logprobs; old_logprobs unless the policy is the one at the step's
    begin (then the ratio is exactly 1); ref_logprobs and kl_weights for a KL term. `sequence`: which sequence a target belongs to.

    The clipped policy gradient (PPO, arXiv 1707.06347): sum of w max(-r A, -clip(r, 1 - low, 1 + high) A).
    """
    old, advantages, weights = columns.get("old_logprobs", logprobs).detach(), columns["advantages"], columns["token_weights"]
    log_ratio = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high) * advantages
    loss = (columns["loss_weights"] * torch.maximum(free, clipped)).sum()
    with torch.no_grad():
        metrics = {
            "ratio": (weights * ratio).sum(),
            "clip_fraction": (weights * (clipped > free)).sum(),
            "policy_kl": (weights * _k3(-log_ratio)).sum(),
            **mismatch(old, columns["rollout_logprobs"], weights),
        }
    if "ref_logprobs" in columns:
        term = kl(spec.kl.estimator, logprobs, columns["ref_logprobs"])
        metrics["kl"] = (weights * term).sum().detach()
        loss = loss + (columns["kl_weights"] * term).sum() if "kl_weights" in columns else loss
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
        d = (rollout_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return {"mismatch": (weights * d.abs()).sum(), "mismatch_kl": (weights * kl("k3", rollout_logprobs, logprobs)).sum()}
