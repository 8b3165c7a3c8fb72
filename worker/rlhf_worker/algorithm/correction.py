"""The engine that sampled and the trainer that learns do not agree on log probabilities to the last digit, and
asynchronous samples are of older weights. Importance weights w = exp(log pi_trainer - log pi_engine) tell how far they
are apart, and correct for it. """

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_api.algorithms import Correction
from rlhf_worker.algorithm.advantage import group_mean
from rlhf_worker.algorithm.divergence import LOG_RATIO_LIMIT, k3

Metrics = dict[str, Tensor]


@torch.no_grad()
def correction(
    spec: Correction, logprobs: Tensor, rollout_logprobs: Tensor, sequence: Tensor, weights: Tensor,
) -> tuple[Tensor, Metrics]:
    """What each token's loss is multiplied with, (N,), and metrics as sums by `weights`. All arguments (N,), in one
    order.

    min(w, cap) (truncated importance sampling, fengyao.notion.site/off-policy-rl), 0 for tokens outside of [tokenMin,
    tokenMax] (IcePop, arXiv 2510.18855) and for sequences whose geometric mean weight is outside of [sequenceMin,
    sequenceMax] (arXiv 2512.23075). """
    d = (logprobs - rollout_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weight = d.exp()
    keep = _inside(weight, spec.token_min, spec.token_max)
    if spec.sequence_min or spec.sequence_max:
        keep = keep & _inside(group_mean(d, sequence).exp(), spec.sequence_min, spec.sequence_max)
    factor = weight.clamp(max=spec.token_cap) if spec.token_cap else torch.ones_like(weight)
    sums = {"abs": d.abs(), "kl": k3(-d), "weight": weight, "weight_square": weight**2, "masked": (~keep).to(d.dtype)}
    return factor * keep, {f"mismatch/{name}": (weights * value).sum() for name, value in sums.items()}


def _inside(values: Tensor, low: float, high: float) -> Tensor:
    return (values >= low) & (values <= (high or torch.inf))


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """The finished sums of an update's metrics, with the effective sample size, as a share of the tokens, in place of
    the weights' moments.
    """
    left = dict(sums)
    mean, square = left.pop("mismatch/weight", 0.0), left.pop("mismatch/weight_square", 0.0)
    return left | ({"mismatch/ess": mean**2 / square} if square else {})


def alarm(spec: Correction, metrics: Mapping[str, float]) -> str | None:
    """A warning when engine and trainer are too far apart to trust."""
    found = metrics.get("mismatch/kl", 0.0)
    if found <= spec.alarm:
        return None
    return (
        f"the KL of the engine from the trainer is {found:.3g} nats a token, above "
            f"spec.algorithm.correction.alarm ({spec.alarm:g}): look at "
        f"rollout.engineArgs (quantisation, sampling), or set algorithm.correction.sequenceMin and sequenceMax"
    )
