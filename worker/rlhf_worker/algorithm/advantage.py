"""Advantages from rewards. Pure tensor functions."""

from torch import Tensor, where, zeros_like

EPSILON = 1e-6


def grpo(rewards: Tensor) -> Tensor:
    """Group-relative advantages (arXiv 2402.03300): (R - mean) / (sigma + 1e-6), sigma unbiased.

    `rewards`: (G, K), K >= 2 samples of each of G prompts; the result has the same shape. A group of equal rewards gets
    exactly 0, also where rounding would leave it a sigma.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (G, K) with K >= 2, not {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = centred / (rewards.std(dim=1, keepdim=True, correction=1) + EPSILON)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return where(equal, zeros_like(scaled), scaled)
