"""A tiny reward model on disk."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel


def write_reward(policy: Path, target: Path, *, labels: int = 1, pad: bool = True) -> PreTrainedModel:
    """The policy's backbone under a random head, and its tokenizer. Returns the model as transformers loads it."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=labels, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if not pad:
        tokenizer.pad_token, model.config.pad_token_id = None, None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(target, dtype=torch.float32).eval()
    return loaded
