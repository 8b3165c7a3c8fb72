"""What is said of engine arguments before any engine starts. No vLLM."""

import pytest

from rlhf_worker.actors.engine import request_seed
from rlhf_worker.actors.engine_args import check_context, check_engine_args, check_known
from rlhf_worker.errors import BadSpec
from tests.worker.configs import run_config


def test_a_context_that_cannot_hold_a_sample_names_the_numbers() -> None:
    config = run_config(rollout={"maxTokens": 16, "engineArgs": {"max_model_len": 20}})
    with pytest.raises(BadSpec, match=r"max_model_len is 20, but data\.maxPromptTokens \(16\) \+ rollout\.maxTokens \(16\) is 32"):
        check_engine_args(config)


def test_a_model_with_too_few_positions_is_refused() -> None:
    check_context(run_config(), 32)
    check_context(run_config(), None)
    with pytest.raises(BadSpec, match=r"is 32, but the model at spec\.model\.path has a context of 31"):
        check_context(run_config(), 31)


@pytest.mark.parametrize("name", ["model", "tensor_parallel_size", "logprobs_mode", "weight_transfer_config"])
def test_arguments_of_the_workers_own_are_refused(name: str) -> None:
    with pytest.raises(BadSpec, match=rf"engineArgs\.{name}: the worker sets it itself"):
        check_engine_args(run_config(rollout={"engineArgs": {name: "x"}}))


def test_an_unknown_argument_is_named_with_its_neighbours() -> None:
    with pytest.raises(BadSpec, match=r"engineArgs\.max_modle_len: vLLM 0\.0 has no such argument; close to it: max_model_len"):
        check_known({"max_modle_len": 1}, {"max_model_len", "seed"}, "0.0")


def test_request_seeds_differ_by_everything_and_repeat() -> None:
    seeds = {request_seed(s, step, uid, k) for s in (0, 1) for step in (1, 2) for uid in ("0:1", "0:2") for k in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 1, "0:1", 0) == request_seed(0, 1, "0:1", 0)
