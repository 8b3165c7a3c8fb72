"""How runs end and are told of: final saves, pods that are kept, history. Driven by worlds."""

from rlhf_operator.decide import broken
from rlhf_operator.kinds import JOBS
from rlhf_operator.observed import read_job
from tests.control.world import World, running

FINALIZER = "rlhf.dev/final-save"


def finalizers(w: World) -> list[str]:
    return list(w.job_raw["metadata"].get("finalizers", []))


def deleted(**policy: object) -> World:
    w = running(runPolicy={"finalSave": True, **policy})
    w.later(5)
    w.report(step=4)
    w.delete()
    w.settle()
    return w


def test_a_deletion_waits_for_the_driver_to_drain() -> None:
    w = deleted()
    assert (w.status["phase"], w.status["reason"]) == ("Suspending", "FinalSave")
    assert w.api.of(JOBS)
    w.report("Drained", step=5)
    w.settle()
    assert not w.api.of(JOBS)


def test_a_deletion_waits_no_longer_than_its_time_out() -> None:
    w = deleted(finalSaveTimeoutSeconds=60)
    w.later(59)
    w.settle()
    assert w.api.of(JOBS)
    assert w.wake is not None
    w.later(1)
    w.settle()
    assert not w.api.of(JOBS)


def test_a_namespace_that_goes_waits_for_nothing() -> None:
    """Its RayClusters and pods are deleted with it."""
    w = deleted()
    w.delete_cluster()
    w.settle()
    assert not w.api.of(JOBS)


def test_a_deletion_makes_nothing_and_charges_nothing() -> None:
    w = deleted()
    w.driver_ends(1, "OSError: disk full")
    w.settle()
    assert not w.api.of(JOBS)
    assert (w.status["restarts"]["total"], w.clusters()) == (0, [])


def test_a_job_that_ended_or_holds_nothing_goes_at_once() -> None:
    w = World(suspend=True, runPolicy={"finalSave": True})
    w.settle()
    w.delete()
    assert not w.api.of(JOBS)
    w = running(runPolicy={"finalSave": True})
    w.driver_ends(0)
    w.settle()
    assert finalizers(w) == []


def test_others_finalizers_are_left_alone() -> None:
    w = World(runPolicy={"finalSave": True})
    w.job_raw["metadata"]["finalizers"] = ["example.com/theirs"]
    w.settle()
    assert finalizers(w) == ["example.com/theirs", FINALIZER]
    w.edit(runPolicy={"finalSave": False})
    w.settle()
    assert finalizers(w) == ["example.com/theirs"]


def test_a_resume_is_no_restart() -> None:
    w = running()
    w.later(5)
    w.driver_ends(1, "ValueError")
    w.settle()
    w.driver_restarts()
    w.edit(suspend=True)
    w.settle()
    w.reap()
    w.settle()
    assert w.status["phase"] == "Suspended"
    w.edit(suspend=False)
    w.settle()
    w.up()
    w.settle()
    assert (w.status["phase"], w.status["reason"]) == ("Starting", "DriverStarting")


def test_the_queue_alone_admits() -> None:
    assert "admittedAt" not in running().record


def test_history_has_start_end_and_goodput() -> None:
    w = running()
    start = w.status["startTime"]
    w.later(80)
    w.report(step=5, productiveSeconds=45, checkpoint={"step": 5, "path": "/c", "time": "x"})
    w.settle()
    assert w.status["goodput"] == "0.50"
    written = len(w.api.writes)
    w.later(1000)
    w.report(step=5, productiveSeconds=60, checkpoint={"step": 5, "path": "/c", "time": "x"})
    w.settle()
    assert (w.status["goodput"], len(w.api.writes)) == ("0.50", written), "it is not written for its own sake"
    w.driver_ends(0)
    w.settle()
    assert w.status["goodput"] == "0.06"
    assert (w.status["startTime"], w.status["completionTime"]) == (start, w.record["finishedAt"])


def test_without_a_decision_the_status_keeps_what_it_says() -> None:
    w = running()
    job = read_job(w.job_raw)
    status = broken(job, "KeyError: x" + "y" * 2000, w.api.now)
    degraded = next(c for c in status.conditions if c.type == "Degraded")
    assert (degraded.status, degraded.reason, len(degraded.message)) == ("True", "ReconcileError", 1024)
    assert (status.phase, status.record) == (job.status.phase, job.status.record)


def test_what_is_known_stays_through_a_restart() -> None:
    saved = {"step": 3, "path": "/c", "time": "2026-01-01T12:00:20Z"}
    w = running()
    w.report(step=3, checkpoint=saved)
    w.settle()
    w.later(5)
    w.driver_ends(1, "ValueError")
    w.settle()
    w.driver_restarts()
    w.later(5)
    w.report("Starting", step=3, checkpoint=saved)
    w.settle()
    assert w.condition("CheckpointAvailable") == ("True", "Saved")


def test_a_save_into_the_trainers_pod_is_called_what_it_is() -> None:
    w = running(checkpoint={"path": "/checkpoints"})
    w.report(step=4, checkpoint={"step": 4, "path": "/checkpoints", "time": "x"})
    w.settle()
    assert w.condition("CheckpointAvailable") == ("False", "Ephemeral")


def test_a_suspend_before_the_first_step_loses_nothing_and_is_not_refused() -> None:
    w = World(checkpoint={"path": "/checkpoints"})
    w.settle()
    w.up()
    w.report("Starting")
    w.edit(suspend=True)
    w.settle()
    w.reap()
    w.settle()
    assert w.status["phase"] == "Suspended"
