"""What is said of engine arguments before any engine starts. No vLLM."""

from types import SimpleNamespace

import pytest

from rlhf_worker.engines.arguments import check_attention, check_context, check_engine_args, check_known, refused
from rlhf_worker.errors import BadSpec
from tests.worker.configs import run_config


def test_a_context_that_cannot_hold_a_sample_names_the_numbers() -> None:
    config = run_config(rollout={"maxTokens": 16, "engineArgs": {"max_model_len": 20}})
    with pytest.raises(BadSpec, match=r"max_model_len is 20, but spec\.data\.maxPromptTokens \(16\) \+ spec\.rollout\.maxTokens \(16\) is 32"):
        check_engine_args(config)


def test_a_model_with_too_few_positions_is_refused() -> None:
    check_context(run_config(), 32)
    check_context(run_config(), None)
    with pytest.raises(BadSpec, match=r"is 32, but the model at spec\.model\.path has a context of 31"):
        check_context(run_config(), 31)


def test_an_evaluation_that_needs_a_longer_context_is_named() -> None:
    data = {"jsonl": {"path": "/x"}, "maxPromptTokens": 20}
    config = run_config(evaluation=[{"name": "short", "data": data, "maxTokens": 1}, {"name": "held-out", "data": data}])
    check_context(config, 36)
    with pytest.raises(BadSpec, match=r"evaluation\[held-out\]: data\.maxPromptTokens \(20\) \+ maxTokens \(16\) is 36, .* a context of 35"):
        check_context(config, 35)


def test_latent_attention_is_refused() -> None:
    check_attention(run_config(), SimpleNamespace(use_mla=False))
    with pytest.raises(BadSpec, match=r"spec\.model\.path: /models/tiny: vLLM computes its latent attention .* use a model without it"):
        check_attention(run_config(), SimpleNamespace(use_mla=True))


def test_a_model_class_that_vllm_does_not_know_is_named() -> None:
    """The message is that of vLLM 0.32.0; test_vllm_config.py holds it against the real one."""
    reason = "Value error, Model architectures ['NopeForCausalLM'] are not supported for now. Supported architectures: dict_keys(['Afmoe'])"
    assert str(refused(run_config(), reason, "0.32.0")) == (
        "spec.model.path: /models/tiny: vLLM 0.32.0 does not know its model class ['NopeForCausalLM']: use a model that it knows, or for debugging "
        "spec.rollout.engine: hf"
    )
    assert "refuses them: something else" in str(refused(run_config(), "something else", "0.32.0"))


@pytest.mark.parametrize("name", ["model", "tensor_parallel_size", "logprobs_mode", "weight_transfer_config", "enable_lora", "max_loras"])
def test_arguments_of_the_workers_own_are_refused(name: str) -> None:
    with pytest.raises(BadSpec, match=rf"engineArgs\.{name}: the worker sets it itself"):
        check_engine_args(run_config(rollout={"engineArgs": {name: "x"}}))


def test_an_unknown_argument_is_named_with_its_neighbours() -> None:
    with pytest.raises(BadSpec, match=r"engineArgs\.max_modle_len: vLLM 0\.0 has no such argument; close to it: max_model_len"):
        check_known({"max_modle_len": 1}, {"max_model_len", "seed"}, "0.0")
