"""Policies by tables: one change of a world, one answer."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_api.status import ConditionType, Phase
from rlhf_operator.client import ApiError
from rlhf_operator.decide.phase import phase_of
from rlhf_operator.decide.verdict import Verdict, no, unknown, yes
from rlhf_operator.kinds import JOBS, RAYCLUSTERS
from rlhf_operator.observed import heeded
from tests.control.world import World, running

Change = Callable[[World], Any]


def message(w: World, kind: str) -> str:
    return str(next(c["message"] for c in w.status["conditions"] if c["type"] == kind))


def provisioning() -> World:
    world = World()
    world.settle()
    world.kuberay()
    return world


def trainer(w: World) -> dict[str, Any]:
    return w.pods("trainer")[0]


def unscheduled(w: World, reason: str, message: str) -> None:
    trainer(w)["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    ]


def replica_failure(w: World, message: str) -> None:
    (cluster,) = w.api.of(RAYCLUSTERS)
    cluster["status"]["conditions"] = [
        {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": message}
    ]


def no_pods(w: World) -> None:
    for pod in w.pods():
        del w.api.objects[("pods", "default", pod["metadata"]["name"])]


def invalid_cluster(w: World, message: str) -> None:
    no_pods(w)
    w.warn(w.api.of(RAYCLUSTERS)[0]["metadata"]["uid"], "InvalidRayClusterSpec", message)


def head_only(w: World) -> None:
    w.start_pods()
    w.waits(trainer(w), "ray", "PodInitializing")


READINESS: list[tuple[str, Change, str, str]] = [
    ("nothing yet", lambda w: None, "Creating", "sample-1"),
    (
        "image", lambda w: w.waits(trainer(w), "ray", "ImagePullBackOff", 'Back-off pulling image "no/such"'),
        "ImagePullFailed", "no/such",
    ),
    ("driver's image", lambda w: w.waits(w.head(), "driver", "ErrImagePull", "not found"), "ImagePullFailed", "driver"),
    (
        "secret", lambda w: w.waits(w.head(), "ray", "CreateContainerConfigError", 'secret "hf" not found'),
        "ContainerConfigFailed", '"hf"',
    ),
    (
        "claim", lambda w: unscheduled(w, "Unschedulable", 'persistentvolumeclaim "data" not found'), "Unschedulable",
        '"data"',
    ),
    ("gang", lambda w: unscheduled(w, "SchedulingGated", "gated"), "WaitingForGang", "gated"),
    (
        "quota", lambda w: replica_failure(w, "pods is forbidden: exceeded quota: team"), "QuotaExceeded",
        "exceeded quota",
    ),
    ("webhook", lambda w: replica_failure(w, "admission webhook denied the request"), "ReplicaFailure", "denied"),
    (
        "refused by KubeRay", lambda w: invalid_cluster(w, "headGroupSpec should have at least one container"),
        "InvalidRayCluster", "at least one",
    ),
    ("a mere warning", lambda w: invalid_cluster(w, "RayCluster spec warning: autoscaler"), "Creating", "sample-1"),
    (
        "volume", lambda w: w.warn(w.head()["metadata"]["uid"], "FailedMount", 'secret "key" not found'), "FailedMount",
        '"key"',
    ),
    ("workers", head_only, "WorkersMissing", "0 of 1 trainer"),
    ("all", lambda w: w.start_pods(), "AllPodsReady", "every worker"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "reason", "words"), READINESS, ids=[c[0] for c in READINESS])
def test_why_the_cluster_is_not_ready(case: str, change: Change, reason: str, words: str) -> None:
    world = provisioning()
    change(world)
    world.settle()
    told = next(c for c in world.status["conditions"] if c["type"] == "ClusterReady")
    assert told["reason"] == reason
    assert words in told["message"]


def test_a_crash_loop_tells_the_last_words_not_the_back_off() -> None:
    world = provisioning()
    world.start_pods()
    world.ends(trainer(world), "ray", 1, "ModuleNotFoundError: no module named ray")
    ray = world.container(trainer(world), "ray")
    ray.update(lastState=ray["state"], state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}})
    world.settle()
    assert world.condition("ClusterReady") == ("False", "ContainerCrashing")
    assert "no module named ray" in world.status["message"]


def ray_ends(w: World, pod: dict[str, Any], code: int, reason: str = "") -> None:
    """And the driver with it."""
    w.ends(pod, "ray", code, reason=reason)
    w.driver_ends(1)


def worker_goes(w: World, reason: str) -> None:
    w.disrupt(trainer(w), reason, "x")
    w.driver_ends(1)


CLASSES: list[tuple[str, Change, str]] = [
    ("python error", lambda w: w.driver_ends(1, "ValueError"), "app"),
    ("segmentation fault", lambda w: w.driver_ends(139), "app"),
    ("driver out of memory", lambda w: w.driver_ends(137, reason="OOMKilled"), "oom"),
    ("worker out of memory", lambda w: ray_ends(w, trainer(w), 137, "OOMKilled"), "oom"),
    ("head's Ray lost", lambda w: ray_ends(w, w.head(), 1), "headLost"),
    ("worker's Ray lost", lambda w: ray_ends(w, trainer(w), 1), "nodeLost"),
    ("worker preempted", lambda w: worker_goes(w, "PreemptionByScheduler"), "preempted"),
    ("worker's node gone", lambda w: worker_goes(w, "DeletionByTaintManager"), "nodeLost"),
    ("head drained", lambda w: w.disrupt(w.head(), "EvictionByEvictionAPI", "x"), "preempted"),
    ("head's node gone", lambda w: w.disrupt(w.head(), "DeletionByPodGC", "x"), "nodeLost"),
    (
        "head pod gone unseen", lambda w: w.api.objects.pop(("pods", "default", w.head()["metadata"]["name"])),
        "headLost",
    ),
    ("no step for long", lambda w: w.later(3601), "stalled"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "counter"), CLASSES, ids=[c[0] for c in CLASSES])
def test_each_incident_is_charged_once_to_its_class(case: str, change: Change, counter: str) -> None:
    world = running()
    world.later(5)
    change(world)
    world.settle()
    for _ in range(3):
        world.later(1)
        world.settle()
    assert {name: n for name, n in world.status["restarts"].items() if n} == {"total": 1, counter: 1}
    assert world.status["phase"] == "Restarting"
    assert world.record["restartsSinceProgress"] == (0 if counter == "preempted" else 1)


def test_two_crashes_between_two_looks_are_two() -> None:
    world = running()
    for _ in range(2):
        world.later(5)
        world.driver_ends(1, "ValueError")
        world.driver_restarts()
    world.settle()
    assert world.status["restarts"]["app"] == 2


def test_a_worker_that_restarts_while_training_goes_on_costs_nothing() -> None:
    world = running()
    world.ends(trainer(world), "ray", 1)
    world.settle()
    assert world.status["restarts"]["total"] == 0
    assert world.condition("Degraded") == ("True", "WorkerRestarting")


def test_a_report_of_an_earlier_run_does_not_make_the_new_one_train() -> None:
    world = running()
    world.later(5)
    world.driver_ends(1, "ValueError")
    world.later(5)
    world.driver_restarts()
    world.settle()
    assert world.condition("Running") == ("False", "AppFailed")
    assert world.condition("Progressing") == ("Unknown", "NoReportYet")


def test_repeated_steps_pay_nothing_back() -> None:
    """Steps that were finished before the crash already are no progress."""
    world = running()
    world.later(5)
    world.driver_ends(1)
    world.settle()
    world.driver_restarts()
    world.later(5)
    world.report(step=3)
    world.settle()
    assert world.record["restartsSinceProgress"] == 1
    world.report(step=4)
    world.settle()
    assert world.record["restartsSinceProgress"] == 0


ENDS: list[tuple[str, dict[str, Any], Change, str]] = [
    ("refused spec", {}, lambda w: w.driver_ends(64, "model.path"), "InvalidSpec"),
    ("bad data", {}, lambda w: w.driver_ends(65, "line 3"), "InvalidData"),
    ("no retry left", {"backoffLimit": 0}, lambda w: w.driver_ends(1, "ValueError"), "BackoffLimitExceeded"),
    ("active deadline", {"activeDeadlineSeconds": 60}, lambda w: w.later(60), "DeadlineExceeded"),
]


@pytest.mark.parametrize(("case", "policy", "change", "reason"), ENDS, ids=[c[0] for c in ENDS])
def test_the_job_fails(case: str, policy: dict[str, Any], change: Change, reason: str) -> None:
    world = running(runPolicy=policy)
    change(world)
    world.settle()
    assert world.condition("Failed") == ("True", reason)
    assert world.clusters() == []
    assert world.condition("ResourcesReleased") == ("False", "Terminating")
    world.reap()
    world.settle()
    assert world.condition("ResourcesReleased") == ("True", "PodsGone")


def test_success_is_seen_before_a_deadline_that_passed_meanwhile() -> None:
    world = running(runPolicy={"activeDeadlineSeconds": 60})
    world.driver_ends(0)
    world.later(600)
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_suspended_time_does_not_count_for_the_active_deadline() -> None:
    world = running(runPolicy={"activeDeadlineSeconds": 60})
    world.later(30)
    world.report("Drained", step=4)
    world.edit(suspend=True)
    world.settle()
    world.reap()
    world.later(600)
    world.edit(suspend=False)
    world.settle()
    world.up()
    world.later(5)
    world.report(step=5)
    world.settle()
    assert (world.status["phase"], world.record["activeSeconds"]) == ("Running", 30)
    world.later(30)
    world.settle()
    assert world.condition("Failed") == ("True", "DeadlineExceeded")


def test_a_finished_job_tells_how_it_ended_not_what_it_lacks() -> None:
    world = running()
    world.report(step=10, sync={"version": 10, "seconds": "0.1", "backend": "gloo", "verifiedVersion": 10})
    world.driver_ends(0)
    world.settle()
    assert world.condition("ClusterReady") == ("False", "Finished"), "while its pods end"
    world.reap()
    world.settle()
    told = {kind: world.condition(kind) for kind in ("ClusterReady", "Running", "Progressing", "WeightsInSync")}
    assert told == {
        "ClusterReady": ("False", "Finished"), "Running": ("False", "Finished"), "Progressing": ("False", "Finished"),
        "WeightsInSync": ("True", "InSync"),
    }  # fmt: skip


def test_a_failed_check_before_the_first_step_is_a_condition_by_its_name() -> None:
    world = running()
    assert world.condition("PreflightPassed") == ("Unknown", "NoReportYet")
    world.report(
        state="Starting", preflight={"failed": "SharedMemory", "message": "/dev/shm has 64 MiB", "seconds": "1.0"},
    )
    world.settle()
    assert world.condition("PreflightPassed") == ("False", "SharedMemory")
    world.report(preflight={"message": "SharedMemory, Reduce", "seconds": "1.0"})
    world.settle()
    assert world.condition("PreflightPassed") == ("True", "ChecksPassed")


def test_an_engine_that_is_started_again_degrades_the_job_while_it_lasts() -> None:
    world = running()
    world.report(step=4, degraded="engine 1 is restarting")
    world.settle()
    assert world.condition("Degraded") == ("True", "EngineRestarting")
    world.report(step=5)
    world.settle()
    assert world.condition("Degraded") == ("False", "Healthy")


def test_a_save_that_failed_is_told_and_the_checkpoint_before_it_counts() -> None:
    world = running()
    world.report(step=4, saveError="no checkpoint of step 4: disk full")
    world.settle()
    assert world.condition("CheckpointAvailable") == ("False", "SaveFailed")
    kept = {"step": 2, "path": "/c/step-2", "time": "2026-01-01T12:00:00Z"}
    world.report(step=4, checkpoint=kept, saveError="no checkpoint of step 4: disk full")
    world.settle()
    assert world.condition("CheckpointAvailable") == ("True", "LastSaveFailed")
    world.report(step=6, checkpoint={**kept, "step": 6}, saveError=None)
    world.settle()
    assert world.condition("CheckpointAvailable") == ("True", "Saved")


def test_a_kept_cluster_is_shown_as_kept() -> None:
    world = running(runPolicy={"cleanup": {"onSuccess": "Keep"}})
    world.driver_ends(0)
    world.settle()
    assert world.clusters() == ["sample-1"]
    assert world.condition("ResourcesReleased") == ("False", "RetainedByPolicy")


def test_time_to_live_deletes_the_job_and_not_before() -> None:
    world = running(runPolicy={"ttlSecondsAfterFinished": 100})
    world.driver_ends(0)
    world.settle()
    world.reap()
    world.later(99)
    world.settle()
    assert world.api.of(JOBS)
    world.later(1)
    world.settle()
    assert not world.api.of(JOBS)


def test_suspended_from_the_start_makes_nothing() -> None:
    world = World(suspend=True)
    world.settle()
    assert world.status["phase"] == "Suspended"
    assert world.clusters() == []
    world.edit(suspend=False)
    world.settle()
    assert world.clusters() == ["sample-1"]


def test_a_driver_that_never_drains_is_given_up_after_the_stall_timeout() -> None:
    world = running()
    world.edit(suspend=True)
    world.later(3599)
    world.report("Training", step=3, stepTime="2026-01-01T12:00:20Z")
    world.settle()
    assert world.status["phase"] == "Suspending"
    world.later(2)
    world.settle()
    assert world.clusters() == []


def test_a_worker_that_is_not_replaced_ends_a_job_that_cannot_train() -> None:
    world = running(runPolicy={"provisioningDeadlineSeconds": 60, "reprovisioningDeadlineSeconds": 600})
    world.later(5)
    worker_goes(world, "DeletionByTaintManager")
    world.reap_workers()
    world.settle()
    world.later(599)
    world.settle()
    assert world.status["phase"] == "Restarting"
    world.later(1)
    world.settle()
    assert world.condition("Failed") == ("True", "ReprovisioningDeadlineExceeded")


def test_a_job_that_trains_without_a_lost_worker_is_left_to_train() -> None:
    world = running(runPolicy={"provisioningDeadlineSeconds": 60}, placement__mode="Separated")
    world.disrupt(world.pods("rollout")[0], "DeletionByTaintManager", "x")
    world.settle()
    assert world.condition("ClusterReady") == ("False", "WorkersMissing")
    world.later(600)
    world.report(step=4)
    world.settle()
    assert world.status["phase"] == "Running"
    world.later(3601)
    world.settle()
    assert world.status["restarts"]["stalled"] == 1


def test_an_invalid_immutable_field_ends_the_job_with_field_and_fix() -> None:
    world = World(trainer__gpus=3)
    world.settle()
    assert world.status["phase"] == "Failed"
    assert world.condition("Accepted") == ("False", "InvalidSpec")
    assert "trainer.gpus" in world.status["message"]
    assert world.api.writes == ["apply RLHFJob sample", "create Event " + world.api.writes[1].split()[-1]]


def test_a_queue_that_only_a_label_names_is_refused_until_the_label_goes() -> None:
    """Kueue would hold the RayCluster back unseen. An edit of labels raises no generation, and is heeded."""
    w = World()
    w.job_raw["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team-a"}
    w.settle()
    assert (w.status["phase"], w.status["reason"], w.clusters()) == ("Pending", "InvalidSpec", [])
    assert "spec.queue" in w.status["message"]
    before = heeded(w.job_raw)
    w.job_raw["metadata"]["labels"] = {}
    assert heeded(w.job_raw) != before
    w.settle()
    assert w.clusters() == ["sample-1"]


def test_a_running_job_whose_override_turns_bad_runs_on() -> None:
    world = running()
    world.edit(pods={"head": {"containers": []}})
    world.settle()
    assert world.condition("Accepted") == ("False", "InvalidSpec")
    assert world.status["phase"] == "Running"
    assert world.clusters() == ["sample-1"]


def test_a_field_of_a_newer_crd_is_left_out_and_named() -> None:
    world = running()
    world.edit(fieldOfALaterVersion=1)
    world.settle()
    assert world.condition("Accepted") == ("True", "UnknownFieldsIgnored")
    assert "spec.fieldOfALaterVersion" in message(world, "Accepted")
    assert (world.status["phase"], world.clusters()) == ("Running", ["sample-1"])


def test_a_failed_pass_is_told_in_the_status() -> None:
    world = World()
    world.api.refuse["RayCluster"] = ApiError(500, "InternalError", "etcd has no leader")
    world.settle()
    assert world.condition("Degraded") == ("True", "ReconcileError")
    assert world.errors == ["InternalError: etcd has no leader"]


def test_a_new_job_of_the_same_name_waits_for_the_old_ones_pods() -> None:
    world = running()
    world.api.vanish(JOBS, world.job_raw)
    world.job_raw = world.api.put(JOBS, World().job_raw | {"status": {}})
    world.job_raw["metadata"]["uid"] = "another"
    world.settle()
    assert world.clusters() == []
    assert world.condition("ClusterReady") == ("False", "WaitingForOldPods")
    world.reap()
    world.settle()
    assert world.clusters() == ["sample-1"]


C = ConditionType
OK = {
    C.ACCEPTED: yes("Accepted", ""), C.CLUSTER_READY: yes("AllPodsReady", ""), C.RUNNING: yes("DriverRunning", ""),
    C.PROGRESSING: yes("StepAdvancing", ""), C.SUSPENDED: no("NotSuspended", ""),
}
STOPPED = {C.RUNNING: no("DriverPending", "")}
PHASES: list[tuple[Phase, ConditionType, dict[ConditionType, Verdict]]] = [
    (Phase.RUNNING, C.PROGRESSING, {}),
    (Phase.STARTING, C.RUNNING, STOPPED),
    (Phase.PROVISIONING, C.CLUSTER_READY, {**STOPPED, C.CLUSTER_READY: no("Creating", "")}),
    (Phase.PENDING, C.CLUSTER_READY, {**STOPPED, C.CLUSTER_READY: no("NotCreated", "")}),
    (Phase.PENDING, C.ACCEPTED, {**STOPPED, C.CLUSTER_READY: no("NotCreated", ""), C.ACCEPTED: no("InvalidSpec", "")}),
    (
        Phase.PENDING, C.ACCEPTED,
        {**STOPPED, C.CLUSTER_READY: no("NotCreated", ""), C.ACCEPTED: unknown("KubeRayNotInstalled", "")},
    ),
    (
        Phase.QUEUED, C.QUOTA_RESERVED,
        {**STOPPED, C.CLUSTER_READY: no("Suspended", ""), C.QUOTA_RESERVED: no("WaitingForQuota", "")},
    ),
    (Phase.RESTARTING, C.RUNNING, {C.RUNNING: no("OOMKilled", "")}),
    (Phase.RESTARTING, C.RUNNING, {C.RUNNING: no("HeadLost", ""), C.CLUSTER_READY: no("HeadNotReady", "")}),
    (Phase.SUSPENDING, C.SUSPENDED, {C.SUSPENDED: no("Stopping", "")}),
    (Phase.SUSPENDED, C.SUSPENDED, {C.SUSPENDED: yes("UserRequested", "")}),
    (Phase.SUCCEEDED, C.COMPLETE, {**STOPPED, C.COMPLETE: yes("JobSucceeded", "")}),
    (Phase.FAILED, C.FAILED, {**STOPPED, C.FAILED: yes("BackoffLimitExceeded", "")}),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "why", "change"), PHASES)
def test_phase_follows_from_conditions(phase: Phase, why: ConditionType, change: dict[ConditionType, Verdict]) -> None:
    assert phase_of({**OK, **change}) == (phase, why)
