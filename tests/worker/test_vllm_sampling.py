"""vLLM's log probabilities, sets and ends under every sampling option, by the definitions of test_sampling."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_api.job import SamplingSpec
from rlhf_worker.engines.engine import Engine
from rlhf_worker.experience import Sample
from tests.worker.test_sampling import REPLAYED, TEMPERATURE, expected, requests, shown
from tests.worker.test_vllm_config import engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
# As `Engine._environment` has it for a CPU.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
PENALTIES = {"repetitionPenalty": 1.3, "presencePenalty": 0.5, "frequencyPenalty": -0.25}


async def generated(made: Engine, *options: dict[str, Any]) -> list[list[Sample]]:
    """Of each of the options."""
    await made.start("shm")
    try:
        return [await made.generate(requests(**given), 120.0) for given in options]
    finally:
        await made.close()


def test_every_option_means_what_it_means_to_hf(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    made = engine(monkeypatch, tiny, maxTokens=24, sampling={"topK": 256})
    evaluation = {"trained": False, "topP": 0.7, "stop": ["e", "a"]}
    options = [
        *REPLAYED,
        PENALTIES,
        {**PENALTIES, "topK": 6},
        {"stopTokenIds": list(range(4, 14))},
        {"stop": ["e", "a"]},
        evaluation,
    ]
    samples = asyncio.run(generated(made, *options))
    lm = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for given, group in zip(options, samples, strict=True):
        spec = SamplingSpec.model_validate({name: value for name, value in given.items() if name != "trained"})
        for sample in group:
            values, sets = expected(lm, sample, spec, TEMPERATURE)
            assert sample.logprobs.tolist() == pytest.approx(values, abs=1e-3), given
            assert (sample.support is not None) == (spec.top_k > 0 and given.get("trained", True))
            if sample.support is not None:
                assert [set(row[row >= 0].tolist()) for row in sample.support] == sets, given
            _ends_right(sample, spec)
    assert {sample.finish_reason for group in samples[-3:] for sample in group} >= {"stop"}


def _ends_right(sample: Sample, spec: SamplingSpec) -> None:
    """What ended it is the last of its tokens, trained, and not in its text; nothing before it would have."""
    ends, token_ids = {2, *spec.stop_token_ids}, sample.token_ids.tolist()
    whole, before = shown(token_ids), shown(token_ids[:-1])
    by_token, by_text = token_ids[-1] in ends, any(text in whole for text in spec.stop)
    assert sample.finish_reason == ("stop" if by_token or by_text else "length")
    assert not ends & set(token_ids[:-1]) and not any(text in before for text in spec.stop)
    assert sample.text == (before if by_token or by_text else whole) and all(sample.mask)
    assert len(sample.token_ids) >= (spec.min_tokens if by_token else 1)
