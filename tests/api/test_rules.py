"""Each rule by one spec that breaks it and no other. tests/cluster sends the same table to a real API server."""

from typing import Any

import pytest

from rlhf_api.job import RLHFJob, RLHFJobSpec
from rlhf_api.rules import MUTABLE, RULES, immutable, violations
from tests.api.specs import BROKEN, FROZEN, a_job, rule


def parsed(raw: dict[str, Any]) -> RLHFJob:
    return RLHFJob.model_validate(raw)


def test_the_minimal_job_breaks_none() -> None:
    assert violations(parsed(a_job())) == []


@pytest.mark.parametrize(("part", "raw"), BROKEN, ids=[part.strip("<=> ") for part, _ in BROKEN])
def test_a_broken_rule_is_the_only_complaint_and_says_field_and_fix(part: str, raw: dict[str, Any]) -> None:
    (complaint,) = violations(parsed(raw))
    expected = rule(part)
    assert expected.field in complaint.split(":")[0]
    assert expected.message in complaint


def test_the_table_has_a_case_for_every_rule() -> None:
    assert {rule(part).cel for part, _ in BROKEN} == {one.cel for one in RULES}


@pytest.mark.parametrize(("name", "length"), [("a", 1), ("a1-b", 4), ("a" * 40, 40)])
def test_good_names(name: str, length: int) -> None:
    assert len(name) == length
    assert violations(parsed(a_job(name))) == []


@pytest.mark.parametrize("name", ["a\n", "A", "a-", "-a", "a_b", ""])
def test_bad_names(name: str) -> None:
    assert len(violations(parsed(a_job(name)))) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"placement__mode": "Separated", "rollout__engines": 3},
        {"placement__mode": "Separated", "rollout__engines": 16, "trainer__gpus": 16},
        {"placement__mode": "Separated", "placement__gpusPerNode": 8, "rollout__engines": 4, "rollout__tensorParallelSize": 3},
        {"trainer__gpus": 16, "rollout__engines": 8, "rollout__tensorParallelSize": 2},
        {"placement__fractions": {"trainer": 0.9, "rollout": 0.1}},
        {"placement__mode": "Separated", "placement__fractions": {"trainer": 1, "rollout": 1}},
        {"weightSync__backend": "gloo"},
        {"rollout__engine": "hf", "trainer__gpus": 2},
        {"rollout__staleness": 3, "placement__mode": "Separated"},
        {"rollout__environment": {"function": "package.module:Class"}},
    ],
)
def test_jobs_that_fit(changes: dict[str, Any]) -> None:
    assert violations(parsed(a_job(**changes))) == []


def test_two_broken_rules_are_both_told() -> None:
    complaints = violations(parsed(a_job("a" * 41, weightSync__backend="nccl")))
    assert [c.split(":")[0] for c in complaints] == ["metadata.name", "spec.weightSync.backend"]


def test_a_transition_rule_for_each_frozen_field_and_no_other() -> None:
    fields = [str(field.alias) for field in RLHFJobSpec.model_fields.values()]
    assert {one.field for one in immutable(fields)} == set(fields) - set(MUTABLE)
    assert {field for field, _ in FROZEN} | {"imagePullPolicy"} == set(fields) - set(MUTABLE)
    assert all("oldSelf" in one.cel and one.check is None for one in immutable(fields))
