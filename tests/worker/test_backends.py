"""Which backend a run gets, and what is said when it cannot have the one it wants."""

from typing import Any

import pytest

from rlhf_worker.errors import BadSpec
from rlhf_worker.weights.backends import choose, describe, engine_backend
from rlhf_worker.weights.plan import RankPlan
from tests.worker.configs import run_config


def config(mode: str, backend: str = "auto") -> Any:
    return run_config(placement={"mode": mode}, weightSync={"backend": backend})


@pytest.mark.parametrize(("mode", "device", "backend"), [
    ("Colocated", "cuda", "ipc"), ("Separated", "cuda", "nccl"), ("Colocated", "cpu", "shm"),
    ("Separated", "cpu", "shm"),
])
def test_auto(mode: str, device: str, backend: str) -> None:
    assert choose(config(mode), device) == backend


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_adapters_have_a_way_of_their_own(device: str) -> None:
    assert choose(run_config(model={"path": "/m", "lora": {}}), device) == "adapter"


def test_a_wish_that_can_be_met_is_met() -> None:
    assert choose(config("Colocated", "gloo"), "cpu") == "gloo"
    assert choose(config("Separated", "vllm-nccl"), "cuda") == "vllm-nccl"


@pytest.mark.parametrize(("mode", "wish", "device", "said"), [
    ("Separated", "nccl", "cpu", "is nccl, but the run is Separated on cpu: use auto, or one of shm, gloo"),
    ("Colocated", "gloo", "cuda", "is gloo, but the run is Colocated on cuda: use auto, or one of ipc, vllm-ipc"),
])
def test_a_wish_that_cannot_be_met_names_what_can(mode: str, wish: str, device: str, said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        choose(config(mode, wish), device)


def test_vllm_knows_ours_by_one_name_and_its_own_by_theirs() -> None:
    assert {engine_backend(name) for name in ("ipc", "shm", "nccl", "gloo")} == {"planned"}
    assert (engine_backend("vllm-nccl"), engine_backend("sharded_rdt")) == ("nccl", "sharded_rdt")


def test_what_is_not_written_in_place_is_told_with_its_reason() -> None:
    plans = [RankPlan((), {}, {"a.weight": "Fp8 may store it in another form", "b.weight": "Fp8 may store it in "
        "another form"}, ("k_scale",))] * 2
    assert describe(plans) == [
        "2 tensors go through load_weights, such as a.weight: Fp8 may store it in another form",
        "1 parameters stay as vLLM loaded them, such as k_scale: the trainer has no tensor for them",
    ]
