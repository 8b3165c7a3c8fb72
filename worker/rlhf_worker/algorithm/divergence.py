"""How far two policies are apart, estimated from log probabilities of sampled tokens, kept finite."""

from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite and its square too
KL_LIMIT = 10.0

Estimator = Literal["k1", "k2", "k3"]


def kl(estimator: Estimator, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Each token's estimate of KL(pi || pi_ref) with d = log pi - log pi_ref (joschu.net/blog/kl-approx.html), same
    shape.

    k1 = d (unbiased; as a loss its expected gradient is 0), k2 = d^2 / 2 (right gradient on-policy), k3 = exp(-d) - 1 +
    d (unbiased, low variance). d is clamped to +-20 and the result to +-10. """
    d = (logprobs - ref_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    value = {"k1": lambda: d, "k2": lambda: 0.5 * d * d, "k3": lambda: k3(d)}[estimator]()
    return value.clamp(-KL_LIMIT, KL_LIMIT)


def k3(d: Tensor) -> Tensor:
    """exp(-d) - 1 + d, at most 10."""
    return (torch.expm1(-d) + d).clamp(max=KL_LIMIT)
