"""A training pass's FLOPs by the model's shape against those that torch counts, and the peaks of devices."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_worker import lora
from rlhf_worker.experience import TrainSequence, pack
from rlhf_worker.pretrained import decoder_layers
from rlhf_worker.trainer.flops import Flops, pairs, peak_flops
from tests.worker import families
from tests.worker.configs import run_config

LENGTH = 24  # three windows


def counted(lm: PreTrainedModel, window: int | None, kinds: list[str]) -> float:
    """Of one sequence of which every token but the first is a target: what torch counts, but of a layer's scores, which
    it computes in whole, the share that it looks at.
    """
    tokens = torch.arange(LENGTH)[None] % 90 + 3
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=tokens, use_cache=False).logits[0, :-1].sum().backward()
    by = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    scores = sum(flops for op, flops in by.items() if "bmm" in op)
    seen = [pairs(LENGTH, window if "sliding" in kind else None) / LENGTH**2 for kind in kinds]
    return float(sum(by.values()) - scores + scores * sum(seen) / len(seen))


def batch() -> Any:
    sequence = TrainSequence(
        token_ids=np.full(LENGTH, 3, np.int32), prompt_length=1, index=0, mask=np.ones(LENGTH - 1, np.bool_),
        columns={},
    )  # fmt: skip
    return pack([sequence], LENGTH)[0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral", "opt", "qwen3_moe", "mixtral", "glm4_moe",
    "deepseek_v3", "qwen2_moe"])  # fmt: skip
def test_they_are_what_torch_counts(kind: str) -> None:
    config = families.config_of(kind)
    lm = families.tiny(kind, attn_implementation="eager")
    lm.set_attn_implementation("eager")
    if hasattr(lm, "set_experts_implementation"):
        lm.set_experts_implementation("eager")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (["sliding"] if window else ["full"]) * len(decoder_layers(lm))
    made = Flops.of(lm, lm.get_output_embeddings()).of_batches([batch()])
    assert made == pytest.approx(counted(lm, window, kinds), rel=0.01)


def test_frozen_weights_have_no_gradient_of_their_own(tmp_path: Path) -> None:
    lm = families.tiny("llama", num_hidden_layers=12)
    lm.set_attn_implementation("eager")
    lm.config.save_pretrained(tmp_path)
    spec = run_config(model={"path": str(tmp_path), "lora": {"rank": 4, "alpha": 8}}).model
    lora.inject(lm, decoder_layers(lm), spec, 0)
    made = Flops.of(lm, lm.get_output_embeddings()).of_batches([batch()])
    # A first layer's inputs need no gradient either, which is not told apart.
    assert counted(lm, None, ["full"]) < made < 1.05 * counted(lm, None, ["full"])


def test_every_family_has_them() -> None:
    """Or is known not to: it must not keep a run from its start."""
    unknown = set()
    for kind in families.served():
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(families.config_of(kind))
        if kind != "hrm_text":  # which no trainer takes
            found = Flops.of(lm, lm.get_output_embeddings())
            unknown |= set() if found.token > 0 and found.target > 0 else {kind}
    assert unknown == {"dbrx"}


def test_a_critic_reads_one_number() -> None:
    lm = families.tiny("llama")
    assert Flops.of(lm.model, nn.Linear(32, 1, bias=False)).target == 6 * 32


@pytest.mark.parametrize(("length", "window", "seen"), [(4, None, 10), (4, 2, 7), (4, 9, 10), (1, 1, 1)])
def test_pairs_of_a_causal_sequence(length: int, window: int | None, seen: int) -> None:
    assert pairs(length, window) == seen


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA GH200 480GB", 989e12),
])  # fmt: skip
def test_a_known_device_has_a_peak(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300X", ""])
def test_others_have_none(name: str) -> None:
    assert math.isnan(peak_flops(name))
