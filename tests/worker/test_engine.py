"""What is said of engine arguments before any engine starts. No vLLM."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from rlhf_worker.engines.arguments import (
    check_attention,
    check_context,
    check_engine_args,
    check_known,
    refused,
    settled,
)
from rlhf_worker.engines.engine import Engine
from rlhf_worker.errors import BadSpec
from tests.worker.configs import resolved, run_config


def test_a_context_that_cannot_hold_a_sample_names_the_numbers() -> None:
    config = run_config(rollout={"maxTokens": 16, "engineArgs": {"max_model_len": 20}})
    with pytest.raises(
        BadSpec,
        match=r"max_model_len is 20, but spec\.data\.maxPromptTokens \(16\) \+ spec\.rollout\.maxTokens \(16\) is 32",
    ):
        check_engine_args(config)


def test_a_model_with_too_few_positions_is_refused() -> None:
    check_context(run_config(), 32)
    check_context(run_config(), None)
    with pytest.raises(BadSpec, match=r"is 32, but the model at spec\.model\.path has a context of 31"):
        check_context(run_config(), 31)


def test_an_evaluation_that_needs_a_longer_context_is_named() -> None:
    data = {"jsonl": {"path": "/x"}, "maxPromptTokens": 20}
    config = run_config(
        evaluation=[{"name": "short", "data": data, "maxTokens": 1}, {"name": "held-out", "data": data}]
    )
    check_context(config, 36)
    with pytest.raises(
        BadSpec,
        match=r"evaluation\[held-out\]: data\.maxPromptTokens \(20\) \+ maxTokens \(16\) is 36, .* a context of 35",
    ):
        check_context(config, 35)


def test_latent_attention_is_refused() -> None:
    check_attention(run_config(), SimpleNamespace(use_mla=False))
    with pytest.raises(
        BadSpec, match=r"spec\.model\.path: /models/tiny: vLLM computes its latent attention .* use a model without it"
    ):
        check_attention(run_config(), SimpleNamespace(use_mla=True))


def test_a_model_class_that_vllm_does_not_know_is_named() -> None:
    """The message is that of vLLM 0.32.0; test_vllm_config.py holds it against the real one."""
    reason = ("Value error, Model architectures ['NopeForCausalLM'] are not supported for now. Supported "
        "architectures: dict_keys(['Afmoe'])")
    assert str(refused(run_config(), reason, "0.32.0")) == (
        "spec.model.path: /models/tiny: vLLM 0.32.0 does not know its model class ['NopeForCausalLM']: use a "
            "model that it knows, or for debugging "
        "spec.rollout.engine: hf"
    )
    assert "refuses them: something else" in str(refused(run_config(), "something else", "0.32.0"))


@pytest.mark.parametrize(
    "name", ["model", "tensor_parallel_size", "logprobs_mode", "weight_transfer_config", "enable_lora", "max_loras"]
)
def test_arguments_of_the_workers_own_are_refused(name: str) -> None:
    with pytest.raises(BadSpec, match=rf"engineArgs\.{name}: the worker sets it itself"):
        check_engine_args(run_config(rollout={"engineArgs": {name: "x"}}))


def test_sleep_is_on_where_engines_share_gpus_and_refused_where_they_cannot() -> None:
    for device, sleeps in (("cuda", True), ("cpu", False)):
        config = settled(resolved(), device)
        assert config.engines_sleep == sleeps
        args = Engine(config, 0, device, [0], ["0"], 1)._engine_args("ipc")
        assert (args["enable_sleep_mode"], args["gpu_memory_utilization"]) == (sleeps, 0.78)
    with pytest.raises(BadSpec, match=r"spec\.rollout\.sleep is true, but engines on CPUs cannot sleep: remove it"):
        settled(run_config(rollout={"maxTokens": 16, "sleep": True}), "cpu")


def test_an_unknown_argument_is_named_with_its_neighbours() -> None:
    with pytest.raises(
        BadSpec, match=r"engineArgs\.max_modle_len: vLLM 0\.0 has no such argument; close to it: max_model_len"
    ):
        check_known({"max_modle_len": 1}, {"max_model_len": int, "seed": int}, "0.0")


class Options:
    """An object of vLLM's own, which it makes of a mapping."""


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (int | None, "4096", "Input should be a valid integer"),
        (int | None, 4.5, "Input should be a valid integer"),
        (float, "0.9", "Input should be a valid number"),
        (bool, "yes", "Input should be a valid boolean"),
        (Literal["auto", "fp8"], "fp9", "Input should be 'auto' or 'fp8'"),
        (list[str] | None, "one", "Input should be a valid array"),
        (Literal["auto"] | list[int], ["x"], "Input should be 'auto'; Input should be a valid integer"),
        (int | None, None, ""),
        (int, 4096, ""),
        (float, 1, ""),
        (bool, True, ""),
        (tuple[int, ...], [1, 2], ""),
        (Options, {"level": 3}, ""),
        (Options | None, {"level": 3}, ""),
        ("ForwardReference", 3, ""),
        (Callable[[int], int] | None, None, ""),
    ],
)
def test_an_argument_is_held_against_vllms_own_type(kind: Any, value: Any, why: str) -> None:
    if not why:
        check_known({"one": value}, {"one": kind}, "0.0")
        return
    with pytest.raises(BadSpec) as told:
        check_known({"one": value}, {"one": kind}, "0.0")
    assert str(told.value) == f"spec.rollout.engineArgs.one: {value!r} is none of vLLM 0.0's: {why}"


@pytest.mark.parametrize(
    ("name", "value"), [("max_model_len", "4096"), ("max_model_len", True), ("gpu_memory_utilization", "0.9")]
)
def test_what_the_worker_computes_with_is_a_number(name: str, value: Any) -> None:
    with pytest.raises(BadSpec, match=rf"engineArgs\.{name} is {value!r}: it must be a number, without quotes"):
        check_engine_args(run_config(rollout={"maxTokens": 16, "engineArgs": {name: value}}))


def test_all_wrong_arguments_are_told_at_once() -> None:
    wrong = {"model": "x", "max_model_len": "4096", "dtype": "float16"}
    with pytest.raises(BadSpec) as told:
        check_engine_args(run_config(rollout={"maxTokens": 16, "engineArgs": wrong}))
    assert all(f"engineArgs.{name}" in str(told.value) for name in wrong)
    with pytest.raises(BadSpec, match=r"(?s)engineArgs\.a: .*engineArgs\.b: "):
        check_known({"a": 1, "b": "x"}, {"b": int}, "0.0")
