"""Jobs and statuses of other versions: what cannot be read costs nothing that can."""

from typing import Any

import pytest

from rlhf_operator.kinds import JOBS
from rlhf_operator.observed import read_job
from rlhf_operator.store import Store
from tests.api.specs import a_job
from tests.control.world import World, running

UNREADABLE = {"steps": "as many as it takes"}


def message(w: World, kind: str) -> str:
    return str(next(c["message"] for c in w.status["conditions"] if c["type"] == kind))


def test_a_running_job_whose_spec_cannot_be_read_is_suspended_and_resumed_when_it_can() -> None:
    w = running()
    w.edit(trainer=UNREADABLE, suspend=True)
    w.report("Drained", step=4)
    w.settle()
    w.reap()
    w.settle()
    assert w.status["phase"] == "Suspended"
    w.edit(suspend=False)
    w.settle()
    assert w.condition("Accepted") == ("False", "InvalidSpec")
    assert (w.status["phase"], w.clusters()) == ("Pending", [])
    w.edit(trainer={"steps": 10})
    w.settle()
    assert w.clusters() == ["sample-2"]


def test_a_running_job_whose_spec_cannot_be_read_meets_its_clocks() -> None:
    w = running(runPolicy={"activeDeadlineSeconds": 60})
    w.edit(trainer=UNREADABLE)
    w.later(60)
    w.settle()
    assert w.condition("Failed") == ("True", "DeadlineExceeded")
    assert w.clusters() == []


def test_a_policy_that_cannot_be_read_in_part_keeps_the_rest() -> None:
    w = running(runPolicy={"activeDeadlineSeconds": 60})
    w.edit(runPolicy={"activeDeadlineSeconds": 60, "backoffLimit": "none", "patience": 3})
    w.later(60)
    w.settle()
    assert w.condition("Failed") == ("True", "DeadlineExceeded")


def test_a_job_once_accepted_never_fails_by_its_spec() -> None:
    w = World(suspend=True)
    w.settle()
    w.edit(trainer=UNREADABLE)
    w.settle()
    assert (w.status["phase"], w.condition("Accepted")) == ("Suspended", ("False", "InvalidSpec"))


def test_conditions_of_a_spec_that_cannot_be_read_keep_their_generation() -> None:
    w = running()
    w.edit(trainer=UNREADABLE)
    w.settle()
    generations = {c["type"]: c["observedGeneration"] for c in w.status["conditions"]}
    assert generations.pop("Accepted") == 2
    assert set(generations.values()) == {1}
    assert (w.status["gpus"], w.status["mode"]) == (1, "Colocated")


def test_time_to_live_deletes_a_job_that_never_could_be_read() -> None:
    w = World(trainer=UNREADABLE, runPolicy={"ttlSecondsAfterFinished": 100})
    w.settle()
    assert w.condition("Failed") == ("True", "InvalidSpec")
    w.later(100)
    w.settle()
    assert not w.api.of(JOBS)


NEWER: list[tuple[str, dict[str, Any], str]] = [
    ("field", {"record": {"clusters": 3, "moods": ["good"]}}, "clusters"),
    (
        "class of failure",
        {"failures": [{"class": "Bored", "reason": "x", "message": "x", "time": "x"}], "record": {"clusters": 3}},
        "clusters",
    ),
    ("condition", {"conditions": [{"type": "Mood", "status": "True"}], "record": {"clusters": 3}}, "clusters"),
    ("type of a field", {"record": {"clusters": 3, "readyAt": {"a": 1}}}, "clusters"),
    ("list", {"record": {"clusters": 3, "charged": [{"uid": 1}, {"uid": "u", "container": "pod"}]}}, "clusters"),
    ("text that is too long", {"record": {"clusters": 3, "resultMessage": "x" * 2000}}, "clusters"),
]


@pytest.mark.parametrize(("what", "status", "field"), NEWER, ids=[n[0] for n in NEWER])
def test_a_status_of_another_version_keeps_what_can_be_read(what: str, status: dict[str, Any], field: str) -> None:
    read = read_job({**a_job(), "status": status}).status
    assert read.record.clusters == 3
    assert len(read.record.charged) == (1 if what == "list" else 0)


def heeded(raw: dict[str, Any]) -> tuple[bytes, bytes]:
    """What the store compares of a job to tell whether somebody is woken."""
    store = Store()
    store.put(JOBS, raw)
    facts = store.jobs.by_uid[raw["metadata"]["uid"]].facts
    return facts.heeded, facts.heeded_progress


def test_a_heartbeat_changes_nothing_that_is_heeded() -> None:
    w = running()
    before = heeded(w.job_raw)
    w.later(10)
    w.report(step=4, reward="0.5", activityTime="2026-01-01T12:00:30Z")
    w.job_raw["metadata"]["resourceVersion"] = "77"
    assert heeded(w.job_raw) == before


HEEDED: list[dict[str, Any]] = [
    {"state": "Draining"}, {"state": "Drained"}, {"degraded": "an engine"}, {"saveError": "disk full"},
    {"podUid": "another"},
    {"preflight": {"failed": "Memory", "message": "x", "seconds": "1"}},
    {"checkpoint": {"step": 3, "path": "/c", "time": "x"}},
    {"sync": {"version": 1, "seconds": "1", "backend": "nccl", "error": "timeout"}},
]  # fmt: skip


@pytest.mark.parametrize("news", HEEDED, ids=lambda n: next(iter(n)))
def test_news_of_the_driver_is_heeded(news: dict[str, Any]) -> None:
    w = running()
    before = heeded(w.job_raw)
    w.report(step=3, **news)
    assert heeded(w.job_raw) != before


def test_the_step_that_pays_restarts_back_is_heeded() -> None:
    w = running()
    w.later(5)
    w.driver_ends(1, "ValueError")
    w.settle()
    w.driver_restarts()
    w.report(step=3)
    w.settle()
    before = heeded(w.job_raw)
    w.report(step=4)
    assert heeded(w.job_raw) != before


def test_an_edit_is_heeded() -> None:
    w = running()
    before = heeded(w.job_raw)
    w.edit(suspend=True)
    assert heeded(w.job_raw) != before
