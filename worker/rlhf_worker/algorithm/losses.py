"""Losses over the completion tokens of one micro-batch. Pure tensor functions: they sum, and never average.

Columns carry the one normaliser of the whole optimizer update: `loss_weights` that of the loss, `token_weights` that of
the metrics (a mean over the update's tokens). So the sums of all micro-batches of all ranks add up to the update's
value, whatever the packing. All tensors of a call have one shape, (N,), one entry a target; a target that must not
count has weight 0 and finite values. """

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_api.algorithms import Algorithm
from rlhf_worker.algorithm.advantage import group_mean
from rlhf_worker.algorithm.correction import Metrics, correction
from rlhf_worker.algorithm.divergence import LOG_RATIO_LIMIT, k3, kl

Columns = Mapping[str, Tensor]


def policy_loss(
    spec: Algorithm, logprobs: Tensor, entropy: Tensor, columns: Columns, sequence: Tensor,
    custom: Callable[..., tuple[Tensor, dict[str, Any]]] | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """The loss of any algorithm, a scalar, and its metrics, weighted sums, detached.

    Gradients flow through `logprobs`, and with an entropy bonus (arXiv 1602.01783), which has the weights of the loss,
    through `entropy`. `custom`: the user's own terms, in place of the clipped ones; all else stays.

    `columns`: advantages, loss_weights, token_weights, rollout_logprobs; old_logprobs unless the policy is the one at
    the step's begin (then the ratio is exactly 1); ref_logprobs and kl_weights for a KL term. `sequence`: which
    sequence a target belongs to, all of whose targets are here. """
    old, weights = columns.get("old_logprobs", logprobs).detach(), columns["token_weights"]
    log_ratio = _log_ratio(spec, logprobs, old, sequence)
    if custom:
        terms, logged = custom(
            logprobs=logprobs, old_logprobs=old, advantages=columns["advantages"], entropy=entropy, sequence=sequence,
            columns=columns,
        )  # fmt: skip
    else:
        terms, clipped = _surrogate(spec, log_ratio.exp(), logprobs, columns["advantages"])
        logged = {"clip_fraction": clipped}
    factor, metrics = correction(spec.correction, old, columns["rollout_logprobs"], sequence, weights)
    loss = (columns["loss_weights"] * factor * terms).sum()
    if spec.entropy_coefficient:
        loss = loss - spec.entropy_coefficient * (columns["loss_weights"] * entropy).sum()
    with torch.no_grad():
        logged |= {"ratio": log_ratio.exp(), "policy_kl": k3(-log_ratio), "entropy": entropy}
        metrics |= {name: (weights * value).sum() for name, value in logged.items()}
    if "ref_logprobs" in columns:
        term = kl(spec.kl.estimator, logprobs, columns["ref_logprobs"])
        metrics["kl"] = (weights * term).sum().detach()
        loss = loss + (columns["kl_weights"] * term).sum() if "kl_weights" in columns else loss
    return loss, metrics


def _log_ratio(spec: Algorithm, logprobs: Tensor, old: Tensor, sequence: Tensor) -> Tensor:
    """(N,). gspo's (arXiv 2507.18071) has the sequence's geometric mean as its value and each token's own gradient."""
    each = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return each - each.detach() + group_mean(each.detach(), sequence) if spec.name == "gspo" else each


def _surrogate(spec: Algorithm, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss, and whether it was clipped, (N,).

    max(-r A, -clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347), at most -c A for A < 0 with a dual clip c (arXiv
    1912.09729). cispo (arXiv 2506.13585): -clip(r) A log pi with the ratio taken as a constant, so that clipped tokens
    keep a gradient. """
    bounded = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    if spec.name == "cispo":
        return -bounded.detach() * advantages * logprobs, bounded != ratio
    free, held = -ratio * advantages, -bounded * advantages
    terms = torch.maximum(free, held)
    if not spec.dual_clip:
        return terms, held > free
    ceiling = torch.where(advantages < 0, -spec.dual_clip * advantages, torch.inf)
    return torch.minimum(terms, ceiling), (held > free) | (terms > ceiling)


def value_loss(spec: Algorithm, values: Tensor, columns: Columns) -> tuple[Tensor, Metrics]:
    """The critic's: sum of w max((V - G)^2, (clip(V, V_old +- valueClip) - G)^2) / 2, a scalar, and metrics as in
    `policy_loss`.

    `columns`: values (V_old), returns (G), loss_weights, token_weights. Gradients flow through `values`, (N,), only.
    """
    returns, weights = columns["returns"], columns["token_weights"]
    free = (values - returns) ** 2
    reach = spec.value_clip or torch.inf
    held = (columns["values"] + (values - columns["values"]).clamp(-reach, reach) - returns) ** 2
    loss = (columns["loss_weights"] * torch.maximum(free, held)).sum() / 2
    with torch.no_grad():
        sums = {
            "value": values, "return": returns, "value_error": (values - returns).abs(),
            "value_clip_fraction": held > free,
        }
        return loss, {name: (weights * value).sum() for name, value in sums.items()}
