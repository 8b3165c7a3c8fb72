"""Rewards brought to one scale before they are summed, so that none drowns the others. Pure."""

from collections.abc import Sequence

import torch

from rlhf_api.run import RunConfig
from rlhf_worker.algorithm.advantage import by_deviation, centred
from rlhf_worker.experience import ScoredSample


def training_rewards(config: RunConfig, scored: Sequence[ScoredSample], groups: Sequence[int]) -> list[float]:
    """What the algorithm maximises of each sample: sum_k weight_k z_k, over the rewards k and the environment.

    z = (v - mean) / (sigma + 1e-6) where normalize is group (mean and unbiased sigma of the sample's group) or batch
    (of all that the reward judges), after GDPO (arXiv 2601.05242); else z is the value. Values that are all equal get
    exactly 0. `groups`: one number a sample, alike for samples of one prompt. Nothing is kept from step to step. """
    if all(spec.normalize == "none" for spec in config.rewards):
        return [item.reward for item in scored]
    environment = config.rollout.environment
    total = torch.zeros(len(scored), dtype=torch.float64)
    for spec in config.rewards:
        values = torch.tensor([item.parts[spec.name] for item in scored], dtype=torch.float64)
        judged = torch.tensor([item.sample.prompt.judged_by(spec.name) for item in scored])
        among = torch.tensor(groups) if spec.normalize == "group" else (~judged).long()  # what it does not judge apart
        total += spec.weight * (values if spec.normalize == "none" else by_deviation(centred(values, among), among))
    if environment is not None:
        total += environment.weight * torch.tensor([item.parts["environment"] for item in scored], dtype=torch.float64)
    return [float(value) for value in total]
