"""Each rule by one spec that breaks it and no other. tests/cluster sends the same table to a real API server."""

from typing import Any

import pytest

from rlhf_api.crd import job_schema
from rlhf_api.job import RLHFJob
from rlhf_api.rules import MUTABLE, NEVER, RULES, transitions, violations
from tests.api.cel import allows
from tests.api.schema import fill_defaults
from tests.api.specs import BROKEN, EVALUATION, FREE, FROZEN, HELD, LIVING, a_job, edited, rule


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
        {
            "placement__mode": "Separated", "placement__gpusPerNode": 8, "rollout__engines": 4,
            "rollout__tensorParallelSize": 3,
        },
        {"trainer__gpus": 16, "rollout__engines": 8, "rollout__tensorParallelSize": 2},
        {"placement__fractions": {"trainer": 1, "rollout": 1}},
        {"placement__fractions": {"trainer": 1, "rollout": 1}, "rollout__sleep": True},
        {"placement__fractions": {"trainer": 0.9, "rollout": 0.1}, "rollout__sleep": False},
        {"rollout__engine": "hf", "rollout__sleep": False},
        {"placement__mode": "Separated", "placement__fractions": {"trainer": 1, "rollout": 1}},
        {"weightSync__backend": "gloo"},
        {"rollout__engine": "hf", "trainer__gpus": 2},
        {"rollout__staleness": 3, "placement__mode": "Separated"},
        {"rollout__environment": {"function": "package.module:Class"}},
        {"algorithm": {"advantage": {"function": "m:a"}, "loss": {"code": "def loss(**given): ..."}}},
        {"trainer__learningRateFloor": 0.1, "trainer__learningRateSchedule": "cosine"},
        {"checkpoint__best": {"metric": "reward/mean", "mode": "min"}},
        {"checkpoint__best": {"metric": "eval/held-out/mean_reward"}, "evaluation": [EVALUATION]},
    ],
)
def test_jobs_that_fit(changes: dict[str, Any]) -> None:
    assert violations(parsed(a_job(**changes))) == []


def test_two_broken_rules_are_both_told() -> None:
    complaints = violations(parsed(a_job("a" * 41, weightSync__backend="nccl")))
    assert [c.split(":")[0] for c in complaints] == ["metadata.name", "spec.weightSync.backend"]


SPEC = job_schema()["properties"]["spec"]
FIELDS = list(SPEC["properties"])


def refusals(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = (fill_defaults(SPEC, job["spec"]) for job in (old, new))
    return [rule.message for rule in transitions(FIELDS) if not allows(rule.cel, before, after)]


def test_every_field_of_the_spec_has_its_kind_of_edit() -> None:
    assert {field.split(".")[0] for field, _ in (*FROZEN, *HELD, *FREE)} == set(FIELDS)
    assert set(NEVER) <= {field for field, _ in FROZEN} >= {
        rule.field for rule in transitions(FIELDS) if "can never" in rule.message
    }
    assert {rule.field for rule in transitions(FIELDS) if "oldSelf.suspend" in rule.cel} == {field for field, _ in HELD}
    assert set(MUTABLE) == {field for field, _ in FREE}


@pytest.mark.parametrize(("field", "value"), FROZEN, ids=[field for field, _ in FROZEN])
@pytest.mark.parametrize("suspend", [True, False], ids=["suspended", "running"])
def test_what_a_run_is_made_of_never_changes(field: str, value: Any, suspend: bool) -> None:
    found = refusals(a_job(**LIVING, suspend=suspend), edited(field, value, suspend=suspend))
    (message,) = [text for text in found if "delete the RLHFJob and create it anew" in text]
    assert message.startswith(field)


@pytest.mark.parametrize(("field", "value"), HELD, ids=[field for field, _ in HELD])
def test_what_changes_only_while_the_job_is_suspended(field: str, value: Any) -> None:
    assert refusals(a_job(**LIVING, suspend=True), edited(field, value, suspend=True)) == []
    assert refusals(a_job(**LIVING, suspend=True), edited(field, value)) == [], "the edit may resume it"
    for new in (edited(field, value), edited(field, value, suspend=True)):
        (message,) = refusals(a_job(**LIVING), new)
        words = "can change only while the job is suspended: set suspend to true first, in an edit of its own"
        assert message == f"{field} {words}"


@pytest.mark.parametrize(("field", "value"), FREE, ids=[field for field, _ in FREE])
def test_what_changes_at_any_time(field: str, value: Any) -> None:
    assert refusals(a_job(**LIVING), edited(field, value)) == []


def test_all_rules_of_edits_are_one_in_the_crd_which_a_write_of_the_status_passes_unread() -> None:
    """The API server compared the specs for every report of a driver: a third of its work for it."""
    (edits,) = [one for one in job_schema()["x-kubernetes-validations"] if "oldSelf" in one["rule"]]
    for field, value in (*FROZEN, *HELD, *FREE):
        old, new = ({"spec": fill_defaults(SPEC, job["spec"])} for job in (a_job(**LIVING), edited(field, value)))
        assert allows(edits["rule"], old, new) is ((field, value) in FREE)
        reported = {"status": {"phase": "Running"}}
        assert allows(edits["rule"], old | reported, new | reported) is ((field, value) in FREE), "an edit of the spec"
        assert allows(edits["rule"], old, new | reported), "the API server keeps the spec"
    assert all(rule.message in edits["messageExpression"] for rule in transitions(FIELDS))


def test_an_optional_part_may_neither_appear_nor_vanish_in_a_running_job() -> None:
    with_queue = a_job(**LIVING, queue={"name": "a"})
    assert len(refusals(a_job(**LIVING), with_queue)) == len(refusals(with_queue, a_job(**LIVING))) == 1
    with_model = a_job(**LIVING, suspend=True, critic={"model": {"path": "/m"}})
    assert len(refusals(with_model, a_job(**LIVING, suspend=True))) == 1
