"""Slots to bundles, and the check of who sits where. No Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_api.job import RLHFJobSpec
from rlhf_api.placement import Placement, plan_placement
from rlhf_worker import placement as module
from rlhf_worker.errors import PlacementFailed
from rlhf_worker.placement import (
    Bundle,
    Patience,
    Seat,
    Stage,
    check_seats,
    ray_share,
    reserve,
    shortage,
    tie,
    wanted_bundles,
)
from tests.worker.configs import run_config


def plan(mode: str, gpus: int, engines: int, size: int, node: int) -> Placement:
    spec: dict[str, Any] = {
        "image": "x", "model": {"path": "/m"}, "data": {"jsonl": {"path": "/d"}},
        "rewards": [{"name": "r", "type": "python", "function": "a:b"}],
        "trainer": {"gpus": gpus, "steps": 1}, "rollout": {"engines": engines, "tensorParallelSize": size},
        "placement": {"mode": mode, "gpusPerNode": node},
    }
    return plan_placement(RLHFJobSpec.model_validate(spec))


def bundles(places: list[tuple[str, str]]) -> list[Bundle]:
    return [Bundle(index, node, gpu, "cpu", 2) for index, (node, gpu) in enumerate(places)]


def test_one_bundle_a_gpu_with_its_groups_resource() -> None:
    assert wanted_bundles(plan("Separated", 1, 1, 1, 8)) == [
        {"GPU": 1, "rlhf-trainer": 1}, {"GPU": 1, "rlhf-rollout": 1}
    ]


@pytest.mark.parametrize(("rollout", "mode", "share"), [
    ({}, "Colocated", 0.5), ({"engine": "hf"}, "Colocated", 1.0), ({}, "Separated", 1.0),
])  # fmt: skip
def test_ray_finds_room_for_all_that_share_a_gpu_whatever_their_memory(
    rollout: dict[str, Any], mode: str, share: float
) -> None:
    fractions = {"trainer": 1.0, "rollout": 1.0}
    config = run_config(rollout={"maxTokens": 16, **rollout}, placement={"mode": mode, "fractions": fractions})
    assert ray_share(config.placement) == share


def test_an_engines_slots_are_tied_to_one_node_whatever_ray_chose() -> None:
    placement = plan("Colocated", 4, 2, 2, 2)
    tied = tie(placement, bundles([("b", "1"), ("a", "0"), ("b", "0"), ("a", "1")]))
    assert [(tied[slot].node, tied[slot].gpu) for slot in range(4)] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    assert [tied[slot].index for slot in range(4)] == [1, 3, 2, 0]


def test_gpus_are_ordered_as_numbers() -> None:
    tied = tie(plan("Colocated", 3, 3, 1, 8), bundles([("a", "10"), ("a", "9"), ("a", "2")]))
    assert [tied[slot].gpu for slot in range(3)] == ["2", "9", "10"]


def test_an_engine_over_two_nodes_is_an_error() -> None:
    with pytest.raises(PlacementFailed, match="engine 0 would lie on several nodes"):
        tie(plan("Colocated", 2, 1, 2, 2), bundles([("a", "0"), ("b", "0")]))


def test_shortage_names_what_was_asked_and_what_is_there() -> None:
    assert shortage(plan("Separated", 2, 1, 1, 8), {"GPU": 1.0, "CPU": 4}) == (
        "GPU: asked 3, Ray has 1, rlhf-trainer: asked 2, Ray has 0, rlhf-rollout: asked 1, Ray has 0"
    )


def test_a_deadline_counts_only_while_all_pods_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ready = [0.0], [False]
    monkeypatch.setattr("rlhf_worker.placement.time.monotonic", lambda: clock[0])
    patience = Patience(600.0, lambda: ready[0])
    times = ((86_400.0, False, False), (86_900.0, True, False), (87_001.0, True, True), (87_002.0, False, False))
    for clock[0], ready[0], over in times:
        assert patience.over is over, clock[0]


def test_gpus_are_waited_for_without_end_and_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all pods are ready, and Ray lacks them still."""
    asked, told = iter(range(1000)), list[str]()
    group = SimpleNamespace(wait=lambda timeout_seconds: False)
    monkeypatch.setattr(module, "placement_group", lambda *args, **more: group)
    monkeypatch.setattr(module, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(module, "_remove_left", lambda name: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1.0})
    patience = Patience(-1.0, lambda: next(asked) > 500)
    monkeypatch.setattr(Patience, "over", property(lambda self: self._counts()))
    with pytest.raises(PlacementFailed, match=r"no placement for 2 GPUs, though all pods have been ready.*GPU: asked "
        r"2, Ray has 1"):
        reserve(plan("Separated", 1, 1, 1, 8), patience, "rlhf-tiny", told.append)
    assert len(told) == 502 and told[0].startswith("GPU: asked 2, Ray has 1")


A, B, C = Seat("n", "GPU-a"), Seat("n", "GPU-b"), Seat("n", "GPU-c")


def test_colocated_roles_must_share() -> None:
    placement = plan("Colocated", 2, 1, 2, 8)
    check_seats(placement, [A, B], [[B, A]], {})
    with pytest.raises(PlacementFailed, match=r"engine 0 is Colocated with trainer ranks on n/GPU-a, n/GPU-b but runs "
        r"on n/GPU-a, n/GPU-c"):
        check_seats(placement, [A, B], [[A, C]], {})


def test_colocated_engines_must_not_swap_gpus() -> None:
    placement = plan("Colocated", 2, 2, 1, 8)
    check_seats(placement, [A, B], [[A], [B]], {})
    with pytest.raises(PlacementFailed, match="engine 0"):
        check_seats(placement, [A, B], [[B], [A]], {})


def test_separated_roles_must_not_share() -> None:
    placement = plan("Separated", 1, 1, 1, 8)
    check_seats(placement, [A], [[B]], {})
    with pytest.raises(PlacementFailed, match="Separated but share n/GPU-a"):
        check_seats(placement, [A], [[A]], {})


def test_a_role_with_gpus_of_its_own_shares_none() -> None:
    placement = plan("Colocated", 1, 1, 1, 8)
    check_seats(placement, [A], [[A]], {"critic": [B], "reference": [C]})
    with pytest.raises(PlacementFailed, match="critic has GPUs of its own, but shares n/GPU-a"):
        check_seats(placement, [A], [[A]], {"critic": [A]})
    with pytest.raises(PlacementFailed, match="critic has GPUs of its own, but shares n/GPU-b"):
        check_seats(placement, [A], [[A]], {"critic": [B], "reference": [B]})
    with pytest.raises(PlacementFailed, match="several critic ranks on one GPU"):
        check_seats(placement, [A], [[A]], {"critic": [B, B]})


def test_two_ranks_on_one_gpu_are_an_error() -> None:
    with pytest.raises(PlacementFailed, match="several trainer ranks on one GPU"):
        check_seats(plan("Colocated", 2, 2, 1, 8), [A, A], [[A], [B]], {})


def test_an_engine_sees_its_own_gpu_first_and_the_others_of_its_node() -> None:
    bundles = {
        slot: Bundle(slot, node, gpu, "cuda", 8)
        for slot, (node, gpu) in enumerate([("a", "0"), ("a", "10"), ("a", "2"), ("b", "0")])
    }
    stage = Stage(None, bundles)
    assert stage.visible(1) == ["10", "0", "2"]
    assert stage.visible(3) == ["0"]
