"""Specs to pods and slots: a table, and the properties that every placement has."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_api.job import RLHFJob
from rlhf_api.placement import Placement, plan_placement
from rlhf_api.rules import violations
from tests.api.specs import MODEL, a_job

Changes = dict[str, Any]


def placed(**changes: Any) -> Placement:
    return plan_placement(RLHFJob.model_validate(a_job(**changes)).spec)


def groups(placement: Placement) -> list[tuple[str, int, int, int]]:
    return [(group.name, group.pods, group.gpus_per_pod, group.first_slot) for group in placement.groups]


SEPARATED = {"placement__mode": "Separated"}
CASES: list[tuple[str, Changes, list[tuple[str, int, int, int]], list[list[int]]]] = [
    ("one GPU, shared", {}, [("trainer", 1, 1, 0)], [[0]]),
    ("one GPU each", SEPARATED, [("trainer", 1, 1, 0), ("rollout", 1, 1, 1)], [[1]]),
    ("no engine", {"rollout__engine": "hf", "trainer__gpus": 2}, [("trainer", 1, 2, 0)], []),
    (
        "one node, two engines of two", {"trainer__gpus": 4, "rollout__engines": 2, "rollout__tensorParallelSize": 2},
        [("trainer", 1, 4, 0)], [[0, 1], [2, 3]],
    ),
    (
        "two nodes, shared", {"trainer__gpus": 8, "rollout__engines": 8, "placement__gpusPerNode": 4},
        [("trainer", 2, 4, 0)], [[i] for i in range(8)]
    ),
    (
        "3 engines on one node", {**SEPARATED, "rollout__engines": 3, "trainer__gpus": 2},
        [("trainer", 1, 2, 0), ("rollout", 1, 3, 2)], [[2], [3], [4]],
    ),
    ("tensor parallel 3 leaves 2 of 8 GPUs out", {**SEPARATED, "rollout__engines": 4, "rollout__tensorParallelSize": 3},
     [("trainer", 1, 1, 0), ("rollout", 2, 6, 1)], [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "pods", "engines"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_pods_and_slots(changes: Changes, pods: list[tuple[str, int, int, int]], engines: list[list[int]]) -> None:
    placement = placed(**changes)
    assert groups(placement) == pods
    assert placement.engine_slots == engines


def test_colocated_takes_the_fractions_and_separated_whole_gpus() -> None:
    shared, apart = placed(placement__fractions={"trainer": 0.3, "rollout": 0.6}), placed(**SEPARATED)
    assert (shared.trainer_fraction, shared.engine_fraction) == (0.3, 0.6)
    assert (apart.trainer_fraction, apart.engine_fraction) == (1.0, 1.0)


def test_roles_with_gpus_of_their_own_follow_the_trainer_in_its_pods() -> None:
    changes: Changes = {"trainer__gpus": 2, "critic": {"gpus": 2}, "reference": {"gpus": 1}}
    rewards = [{**MODEL, "gpus": 3}, {**MODEL, "name": "shared"}]
    shared = placed(**changes, rewards=rewards, rollout__engines=2)
    assert groups(shared) == [("trainer", 1, 8, 0)]
    assert shared.role_slots == {"critic": [2, 3], "reference": [4], "reward:rm": [5, 6, 7]}
    assert shared.engine_slots == [[0], [1]]
    apart = placed(**changes, **SEPARATED, rewards=rewards, placement__gpusPerNode=4)
    assert groups(apart) == [("trainer", 2, 4, 0), ("rollout", 1, 1, 8)]
    assert apart.engine_slots == [[8]]


def test_the_groups_hold_every_slot_in_order() -> None:
    placement = placed(**SEPARATED, trainer__gpus=2, rollout__engines=2)
    assert [
        group.ray_resource for slot in range(placement.gpus) for group in placement.groups if slot in group.slots
    ] == ["rlhf-trainer"] * 2 + ["rlhf-rollout"] * 2


@given(
    mode=st.sampled_from(["Colocated", "Separated"]),
    node=st.integers(1, 9),
    engines=st.integers(1, 18),
    size=st.integers(1, 9),
    gpus=st.integers(1, 36),
    own=st.integers(0, 9),
)
def test_whatever_the_rules_let_through_fits(
    mode: str, node: int, engines: int, size: int, gpus: int, own: int,
) -> None:
    raw = a_job(
        placement__mode=mode, placement__gpusPerNode=node, rollout__engines=engines, rollout__tensorParallelSize=size,
        trainer__gpus=gpus,
        rewards=[{**MODEL, **({"gpus": own} if own else {})}],
    )
    job = RLHFJob.model_validate(raw)
    if violations(job):
        return
    placement = plan_placement(job.spec)
    pod_of = {
        slot: (group.name, (slot - group.first_slot) // group.gpus_per_pod) for group in placement.groups
        for slot in group.slots
    }
    assert sorted(pod_of) == list(range(placement.gpus))
    assert all(group.gpus_per_pod <= node for group in placement.groups)
    assert all(len({pod_of[slot] for slot in slots}) == 1 for slots in placement.engine_slots)
    engine_slots = [slot for slots in placement.engine_slots for slot in slots]
    own_slots = [slot for slots in placement.role_slots.values() for slot in slots]
    assert sorted(engine_slots) == (
        placement.trainer_slots if mode == "Colocated" else [*range(gpus + own, placement.gpus)]
    )
    assert placement.trainer_slots + own_slots == [*range(gpus + own)]
