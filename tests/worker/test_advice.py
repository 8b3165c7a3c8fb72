"""Out of memory: errors as torch, vLLM and Ray word them, and the number to lower."""

from typing import Any

import pytest

from rlhf_worker.advice import advice
from tests.worker.configs import run_config

TORCH = ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "139.72 GiB of which 1.10 GiB is free.\n  File trainer.py, in _backward")
VLLM = ("EngineDeadError: vllm/v1/worker/gpu_worker.py: torch.OutOfMemoryError: CUDA out of memory. Tried to "
    "allocate 512.00 MiB")
CACHE = ("ValueError: To serve at least one request with the models's max seq len (4096), 0.44 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (0.21 GiB)")
BUSY = ("ValueError: Free memory on device cuda:0 (40.1/139.7 GiB) on startup is less than desired GPU memory "
    "utilization (0.36, 50.3 GiB). Decrease GPU memory utilization (vllm)")
RAY = "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory."
SEPARATED = {"placement": {"mode": "Separated"}}

CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    (TORCH, {}, ["in the trainer; first things first: lower spec.trainer.tokensPerMicroBatch (8192; the longest "
        "sample has 32 tokens)", "spec.placement.fractions.rollout (0.78)", "set spec.trainer.offload"]),
    (TORCH, {"rollout": {"maxTokens": 16, "sleep": False}}, ["remove spec.rollout.sleep"]),
    (TORCH, {"trainer": {"steps": 1, "gradientCheckpointing": False}}, ["first things first: set "
        "spec.trainer.gradientCheckpointing"]),
    (TORCH, {"trainer": {"steps": 1, "tokensPerMicroBatch": 16}}, ["raise spec.trainer.contextParallel (1) with "
        "spec.trainer.gpus, or lower spec.rollout.maxTokens (16): one sample of 32 tokens"]),
    (
        TORCH,
        {
            "trainer": {"steps": 1, "gpus": 2, "contextParallel": 2, "tokensPerMicroBatch": 20},
            "rollout": {"maxTokens": 16, "engines": 2},
        },
        ["lower spec.trainer.tokensPerMicroBatch (20; the"],
    ),
    (TORCH, {"trainer": {"steps": 1, "sharding": "Hybrid"}}, ["set spec.trainer.sharding to Full"]),
    (
        VLLM, {},
        [
            "in an engine; first things first: lower spec.placement.fractions.rollout (0.78)",
            "set spec.rollout.engineArgs.max_num_seqs"
        ],
    ),
    (
        VLLM,
        {
            **SEPARATED,
            "rollout": {"maxTokens": 16, "engineArgs": {"gpu_memory_utilization": 0.95, "max_num_seqs": 512}},
        },
        ["lower spec.rollout.engineArgs.gpu_memory_utilization (0.95)", "max_num_seqs (512)"],
    ),
    (CACHE, {}, ["raise spec.placement.fractions.rollout; lower spec.rollout.maxTokens (16) or "
        "spec.data.maxPromptTokens (16)"]),
    (CACHE, SEPARATED, ["raise spec.rollout.engineArgs.gpu_memory_utilization"]),
    (BUSY, {}, ["something else holds the GPU's memory: the trainer, or a process that is still ending"]),
    (RAY, {}, ["Out of host memory: raise spec.pods.trainer.resources.limits.memory"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "changes", "words"), CASES)
def test_the_number_to_lower_is_named(text: str, changes: dict[str, Any], words: list[str]) -> None:
    told = advice(text, run_config(**changes))
    assert told is not None
    assert [word for word in words if word not in told] == [], told
    assert ("spec.placement.fractions" in told) <= (changes.get("placement") != SEPARATED["placement"])


@pytest.mark.parametrize("text", [
    "ValueError: bad", "OSError: [Errno 28] No space left on device",
    "RuntimeError: CUDA error: an illegal memory access was encountered",
])  # fmt: skip
def test_other_errors_get_no_advice(text: str) -> None:
    assert advice(text, run_config()) is None
