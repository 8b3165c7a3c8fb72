"""Reads and writes: how many, in which order, and what happens on a conflict."""

import asyncio

from rlhf_operator.client import ApiError
from rlhf_operator.kinds import CONFIG_MAPS, EVENTS, JOBS, LEASES, NAMESPACED, RAYCLUSTERS
from rlhf_operator.rbac import rules
from tests.control.stories import STORIES
from tests.control.world import World, running


def test_nothing_is_written_while_nothing_changes() -> None:
    world = running()
    before = list(world.api.writes)
    for step in range(4, 14):
        world.later(10)
        world.report(step=step, reward=f"0.{step}", checkpoint={"step": step, "path": f"/c/{step}", "time": "2026-01-01T12:00:00Z"})
        world.settle()
    assert world.api.writes[len(before) :] == ["apply RLHFJob sample"], "one write: CheckpointAvailable turned True"


def test_the_drivers_progress_is_never_touched() -> None:
    world = running()
    mine = dict(world.status["progress"], somethingNew="x")
    world.job_raw["status"]["progress"] = mine
    world.driver_ends(1, "ValueError")
    world.settle()
    assert world.status["progress"] == mine


def test_the_record_is_written_before_the_cluster_is_made() -> None:
    world = World()
    world.settle()
    writes = [w for w in world.api.writes if "Event" not in w]
    assert writes[0] == "apply RLHFJob sample"
    assert writes.index("create RayCluster sample-1") > 0


def test_what_is_ours_already_is_brought_up_to_date() -> None:
    world = World()
    world.settle()
    made = world.api.objects[("configmaps", "default", "sample-run")]
    made["data"] = {"run.yaml": "of an earlier version"}
    (cluster,) = world.api.of(RAYCLUSTERS)
    world.api.vanish(RAYCLUSTERS, cluster)
    world.settle()
    assert "job:" in world.api.of(CONFIG_MAPS)[0]["data"]["run.yaml"]


def test_an_object_of_another_is_never_changed() -> None:
    world = World()
    world.api.put(CONFIG_MAPS, {"metadata": {"name": "sample-run"}, "data": {"theirs": "1"}})
    world.settle()
    assert world.api.of(CONFIG_MAPS)[0]["data"] == {"theirs": "1"}
    assert world.condition("Accepted") == ("False", "NameConflict")
    assert "sample-run" in world.status["message"]


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    world = World()
    world.job_raw["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    world.settle()
    assert world.api.writes == []


def test_events_that_are_refused_stop_nothing() -> None:
    world = World()
    world.api.refuse["Event"] = ApiError(403, "Forbidden", "no")
    world.settle()
    assert world.clusters() == ["sample-1"]


def test_an_event_is_about_the_job_and_is_told_once() -> None:
    world = World()
    world.settle()
    world.settle()
    (event,) = world.api.of(EVENTS)
    assert (event["involvedObject"]["kind"], event["involvedObject"]["name"]) == ("RLHFJob", "sample")
    assert event["reason"] == "Creating"


def test_every_call_is_covered_by_the_rules_and_every_rule_is_needed() -> None:
    """Of the verbs that the client uses. Watches are kopf's, leases the election's."""
    used = set()
    for story in STORIES.values():
        world = World()
        world.job_raw["spec"]["checkpoint"] = {"claim": {"size": "1Gi"}}
        for _ in story(world):
            world.settle()
        asyncio.run(world.api.list(JOBS, None))
        used |= world.api.used
    used |= {("delete", JOBS)}  # runPolicy.ttlSecondsAfterFinished
    for kind in NAMESPACED:
        mine = {verb for verb, other in used if other is kind}
        assert {v for v in mine if " " not in v} | {"patch"} == set(kind.verbs) - {"watch"} | {"patch"}, kind.plural
        assert {v.split()[0] for v in mine if " " in v} | {"get"} == set(kind.status_verbs) | {"get"}


def test_rules_cover_what_the_drivers_role_grants() -> None:
    by_resource = {(r["apiGroups"][0], r["resources"][0]): set(r["verbs"]) for r in rules()}
    assert "get" in by_resource[("rlhf.dev", "rlhfjobs")]
    assert "patch" in by_resource[("rlhf.dev", "rlhfjobs/status")]
    assert by_resource[("coordination.k8s.io", "leases")] == set(LEASES.verbs)
