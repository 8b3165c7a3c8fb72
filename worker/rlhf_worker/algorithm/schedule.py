"""The learning rate from update to update."""

import math

from rlhf_api.job import TrainerSpec


def learning_rate(spec: TrainerSpec, base: float, update: int, total: int) -> float:
    """`update` counts from 0, of `total` in the run: linear warm-up to `base`, then as torch.optim.lr_scheduler's
    LinearLR or CosineAnnealingLR (arXiv 1608.03983, without restarts), which reach the floor after the last update.
    """
    if update < spec.warmup_steps:
        return base * (update + 1) / spec.warmup_steps
    done = min(1.0, (update - spec.warmup_steps) / max(1, total - spec.warmup_steps))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return base * (spec.learning_rate_floor + (1 - spec.learning_rate_floor) * left[spec.learning_rate_schedule])
