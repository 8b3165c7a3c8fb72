"""Every wait has an end, and no clock ends what is well: provisioning, stuck deletions, stalls. Driven by worlds."""

from datetime import timedelta
from typing import Any

import pytest

from rlhf_operator.client import ApiError
from rlhf_operator.clock import stamp
from rlhf_operator.kinds import PODS, RAYCLUSTERS
from rlhf_operator.names import JOB_LABEL, RAY_CONTAINER, ROLE_LABEL
from tests.control.world import World, running

HOUR = 3600


def test_a_preempted_job_waits_for_capacity_longer_than_for_its_first_start() -> None:
    w = running()
    w.disrupt(w.head(), "PreemptionByScheduler", "x")
    w.settle()
    w.reap()
    w.kuberay()
    w.settle()
    w.later(23 * HOUR)
    w.settle()
    assert w.status["phase"] == "Restarting"
    w.start_pods()
    w.later(5)
    w.report(step=4)
    w.settle()
    assert w.status["phase"] == "Running"


def test_training_without_a_lost_pod_is_no_waiting_for_it() -> None:
    """The engines that are left go on for days; then the driver errs, and only now the wait begins."""
    w = running(placement__mode="Separated")
    w.disrupt(w.pods("rollout")[0], "DeletionByTaintManager", "x")
    w.settle()
    w.reap()
    for step in range(4, 8):
        w.later(20 * HOUR)
        w.report(step=step)
        w.settle()
    w.driver_ends(1, "ValueError")
    w.settle()
    assert w.status["phase"] == "Restarting"
    w.later(24 * HOUR)
    w.settle()
    assert w.condition("Failed") == ("True", "ReprovisioningDeadlineExceeded")


def test_workers_that_come_late_have_not_stalled() -> None:
    w = World(runPolicy={"stallTimeoutSeconds": 300})
    w.settle()
    w.kuberay()
    w.start(w.head())
    w.settle()
    w.later(400)
    w.start_pods()
    w.settle()
    assert w.status["phase"] == "Starting"
    w.later(301)
    w.settle()
    assert w.status["restarts"]["stalled"] == 1


def test_pods_that_come_back_late_have_not_stalled() -> None:
    w = running(runPolicy={"stallTimeoutSeconds": 300})
    w.disrupt(w.pods("trainer")[0], "PreemptionByScheduler", "x")
    w.settle()
    w.later(5)
    w.driver_ends(143)
    w.reap()
    w.kuberay()
    w.driver_restarts()
    w.settle()
    w.later(400)
    w.start_pods()
    w.settle()
    assert w.status["restarts"]["stalled"] == 0


def test_a_ray_that_ended_and_runs_again_while_nobody_looked_has_not_stalled() -> None:
    w = running(runPolicy={"stallTimeoutSeconds": 300})
    (worker,) = w.pods("trainer")
    w.ends(worker, RAY_CONTAINER, 1, "the raylet is gone")
    w.driver_ends(1, "ActorDiedError")
    w.later(1000)
    w.restarts(worker, RAY_CONTAINER)
    w.later(8)
    w.settle()
    assert (w.status["restarts"]["stalled"], w.status["restarts"]["nodeLost"]) == (0, 1)


ACTIVE: list[tuple[str, dict[str, Any]]] = [
    ("evaluates", {"step": 3, "state": "Training"}), ("loads a model", {"step": 0, "state": "Starting"}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "report"), ACTIVE, ids=[a[0] for a in ACTIVE])
def test_a_run_that_gets_further_without_a_step_has_not_stalled(what: str, report: dict[str, Any]) -> None:
    w = running(runPolicy={"stallTimeoutSeconds": 300})
    for _ in range(10):
        w.later(100)
        w.report(**report, stepTime="2026-01-01T12:00:20Z", activityTime=stamp(w.api.now))
        w.settle()
    assert w.status["restarts"]["stalled"] == 0
    w.later(301)
    w.report(**report, stepTime="2026-01-01T12:00:20Z", activityTime=stamp(w.api.now.replace(year=2025)))
    w.settle()
    assert w.status["restarts"]["stalled"] == 1, "a heartbeat alone is no activity"


def test_a_drivers_clock_that_is_behind_does_not_count_against_it() -> None:
    """By an hour: the API server wrote down when it took the report."""
    w = running(runPolicy={"stallTimeoutSeconds": 300})
    w.later(60)
    late = stamp(w.api.now.replace(hour=11))
    w.container(w.head(), "driver")["state"]["running"]["startedAt"] = "2026-01-01T10:00:00Z"
    w.report(step=4, activityTime=late, stepTime=late, reportTime=late)
    w.job_raw["metadata"]["managedFields"] = [{"manager": "rlhf-driver", "time": stamp(w.api.now)}]
    w.record["readyAt"] = "2026-01-01T10:00:00Z"
    w.settle()
    assert w.status["restarts"]["stalled"] == 0
    w.later(301)
    w.settle()
    assert w.status["restarts"]["stalled"] == 1


def stranger(w: World) -> None:
    labels = {JOB_LABEL: "sample", ROLE_LABEL: "tensorboard"}
    w.api.put(
        PODS,
        {
            "metadata": {"name": "tensorboard", "labels": labels},
            "status": {"phase": "Running", "containerStatuses": []},
        },
    )


def test_a_strangers_pod_with_our_label_is_none_of_the_jobs() -> None:
    w = World()
    stranger(w)
    w.settle()
    assert w.clusters() == ["sample-1"]
    w.up()
    w.later(5)
    w.report(step=3)
    w.settle()
    w.driver_ends(0)
    w.settle()
    w.reap()
    w.settle()
    assert w.condition("ResourcesReleased") == ("True", "PodsGone")
    w.later(HOUR)
    w.settle()
    assert [p["metadata"]["name"] for p in w.pods()] == ["tensorboard"]


def test_a_new_cluster_waits_for_old_pods_at_most_until_they_are_overdue() -> None:
    w = running()
    w.delete_cluster()
    w.settle()
    assert w.condition("ClusterReady") == ("False", "WaitingForOldPods")
    w.later(301)
    w.settle()
    assert w.clusters() == ["sample-2"]


def test_pods_that_the_garbage_collector_forgot_are_deleted() -> None:
    w = running()
    w.api.remove(RAYCLUSTERS, "sample-1")
    w.settle()
    w.later(299)
    w.settle()
    assert not any("deletionTimestamp" in p["metadata"] for p in w.pods())
    w.later(1)
    w.settle()
    assert all("deletionTimestamp" in p["metadata"] for p in w.pods())


def test_a_refused_job_waits_for_an_edit_and_costs_no_call() -> None:
    """What an admin may end without an edit is looked at again, at a slow pace."""
    w = World(pods={"head": {"nodeName": "here"}})
    w.settle()
    assert (w.condition("Accepted"), w.wake) == (("False", "InvalidSpec"), None)
    calls = len(w.api.calls)
    w.later(3600)
    w.settle()
    assert len(w.api.calls) == calls
    w.edit(pods={})
    w.api.refuse["RayCluster"] = ApiError(403, "Forbidden", "exceeded quota: count/rayclusters.ray.io")
    w.settle()
    assert w.condition("Accepted") == ("False", "Refused")
    assert w.wake is not None and timedelta(seconds=30) <= w.wake - w.api.now <= timedelta(seconds=120)
    del w.api.refuse["RayCluster"]
    w.api.now = w.wake
    w.settle()
    assert w.clusters() == ["sample-1"]


def test_every_wait_wakes_the_operator_by_itself() -> None:
    w = running()
    w.disrupt(w.head(), "DeletionByTaintManager", "x")
    w.settle()
    assert w.wake is not None
    w.api.now = w.wake
    w.settle()
    assert any(write.startswith("kill Pod") for write in w.api.writes)


def test_pods_that_were_all_there_when_the_job_was_suspended_were_there_once() -> None:
    w = World(runPolicy={"provisioningDeadlineSeconds": 60, "reprovisioningDeadlineSeconds": 600})
    w.settle()
    w.up()
    w.edit(suspend=True)
    w.settle()
    w.reap()
    w.edit(suspend=False)
    w.settle()
    w.later(500)
    w.settle()
    assert w.status["phase"] == "Provisioning"
    w.later(101)
    w.settle()
    assert w.status["phase"] == "Failed" and w.record["resultReason"] == "ReprovisioningDeadlineExceeded"
