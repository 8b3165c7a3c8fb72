"""Advantages from rewards. Pure tensor functions: (B,) has one entry a sample, (B, T) one a completion token, padded on
the right.
"""

import torch
from torch import Tensor, where, zeros, zeros_like

EPSILON = 1e-6


def centred(rewards: Tensor, groups: Tensor) -> Tensor:
    """R - mean of its group (Dr. GRPO, arXiv 2503.20783).

    `rewards`: (B,); `groups`: (B,) int64, the group's number of each. A group of equal rewards, or of one, gets exactly
    0, also where rounding would leave it something. """
    numbers = int(groups.max()) + 1
    edges = [
        zeros(numbers, dtype=rewards.dtype).scatter_reduce(0, groups, rewards, side, include_self=False)[groups]
        for side in ("amin", "amax")
    ]
    return where(edges[0] == edges[1], zeros_like(rewards), rewards - group_mean(rewards, groups))


def by_deviation(advantages: Tensor, groups: Tensor) -> Tensor:
    """Centred advantages over sigma + 1e-6 of their group, sigma unbiased: GRPO's (arXiv 2402.03300). (B,), (B,) ->
    (B,).
    """
    size = group_size(groups)
    variance = group_mean(advantages**2, groups) * size / (size - 1).clamp(min=1)
    return advantages / (variance.sqrt() + EPSILON)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """R - mean of the others of its group = K / (K - 1) (R - mean) (RLOO, arXiv 2402.14740). (B,), (B,) -> (B,)."""
    size = group_size(groups)
    return centred(rewards, groups) * size / (size - 1).clamp(min=1)


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """(B,), (B,) -> (B,): each entry's group's mean. Gradients flow through."""
    sums = zeros(int(groups.max()) + 1, dtype=values.dtype, device=values.device).index_add(0, groups, values)
    return sums[groups] / group_size(groups)


def group_size(groups: Tensor) -> Tensor:
    return torch.bincount(groups)[groups]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438). (B, T) each -> advantages, returns = advantages + values,
    (B, T).

    A token's successor is the next token that counts: value and advantage are carried across observations (mask False),
    which get 0 themselves, as does padding. With values of 0, gamma 1 and lambda 1 an advantage is the sum of the
    rewards from its token on. """
    advantages = zeros_like(rewards)
    carried = following = zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = where(mask[:, t], delta + gamma * lam * carried, carried)
        following = where(mask[:, t], values[:, t], following)
        advantages[:, t] = carried
    return advantages * mask, (advantages + values) * mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) to mean 0 and deviation 1 over all that counts; what does not count, and all when it is equal, gets 0."""
    counted = advantages[mask]
    if counted.numel() < 2 or bool((counted == counted[0]).all()):
        return zeros_like(advantages)
    return (advantages - counted.mean()) / (counted.std() + EPSILON) * mask
