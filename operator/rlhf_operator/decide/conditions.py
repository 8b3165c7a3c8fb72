"""One function a condition: what is observed -> what the condition says, or None where it has no meaning.

A message never carries a number that moves at each step: that would be a write without news, and the step stands in
`status.progress` anyway.
"""

from collections.abc import Callable

from rlhf_api.progress import Progress
from rlhf_api.status import ConditionType, FailureClass
from rlhf_operator.clock import moment
from rlhf_operator.decide import acceptance, deadlines, readiness
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.restarts import CLUSTER_DELETED, POD, charged
from rlhf_operator.decide.verdict import Verdict, no, unknown, yes

STOPPED_REASONS = {
    FailureClass.APP: "AppFailed", FailureClass.OOM: "OOMKilled", FailureClass.HEAD_LOST: "HeadLost",
    FailureClass.NODE_LOST: "NodeLost", FailureClass.PREEMPTED: "Preempted", FailureClass.STALLED: "Stalled",
}
QUOTA_REASONS = ("NoMatchingFlavor", "ExceedsMaxQuota", "TopologyPlacementFailed", "Misconfigured")
QUEUE_REACTS_SECONDS = 60


def conditions(f: Facts) -> dict[ConditionType, Verdict]:
    """Of a job that does not parse only its acceptance can be judged; the rest stays as it was last told."""
    if f.job.parsed is None:
        last = {c.type: Verdict(c.status, c.reason, c.message) for c in f.job.status.conditions}
        ended = {ConditionType.FAILED: failed} if (failed := _failed(f)) else {}
        return {**last, ConditionType.ACCEPTED: acceptance.accepted(f), **ended}
    return {kind: verdict for kind, tell in TABLE.items() if (verdict := tell(f))}


def _quota_reserved(f: Facts) -> Verdict | None:
    if f.spec.queue is None:
        return None
    if f.cluster is None:
        return no("WaitingForQuota", "there is no RayCluster to queue yet")
    if not f.cluster.suspended:
        return yes("Reserved", f"queue {f.spec.queue.name} has admitted the job")
    return _waiting_in_queue(f)


def _waiting_in_queue(f: Facts) -> Verdict:
    workload = f.observed.queue.workload if f.observed.queue else None
    if workload is None:
        silent = f.since(f.record.cluster_created_at) > QUEUE_REACTS_SECONDS
        return unknown("KueueNotReacting", "Kueue has made no Workload for the RayCluster: is its RayCluster integration enabled?") if silent else no("WaitingForQuota", "waiting for Kueue")
    told = {c.type: c for c in workload}
    evicted, reserved = told.get("Evicted"), told.get("QuotaReserved")
    if evicted and evicted.status == "True":
        return no("Preempted" if evicted.reason == "Preempted" else "Evicted", evicted.message)
    if reserved is None or reserved.status == "True":
        return no("WaitingForQuota", "waiting for admission")
    return no(reserved.reason if reserved.reason in QUOTA_REASONS else "WaitingForQuota", reserved.message)


def _running(f: Facts) -> Verdict:
    if f.record.result:
        return no("Finished", "the job has ended")
    if f.training and not condemned(f):
        return yes("DriverRunning", "the driver is training")
    if f.spec.suspend:
        return no("DriverStopped", "the job is suspended")
    if failed := _failed_run(f):
        return failed
    if f.driver_runs:
        return no("DriverStarting", "the driver starts: status.progress.detail tells how far it is")
    return no("DriverPending", "the driver waits for its pod")


def condemned(f: Facts) -> bool:
    """The head pod is given up, though it may still be there."""
    return f.head is not None and bool(charged(f.record, f.head.uid, POD))


def _failed_run(f: Facts) -> Verdict | None:
    """A failure of this cluster, or the loss of the one before, after which training has not begun again."""
    failure = f.record.last_failure
    failed_at, made_at = moment(failure.time if failure else None), moment(f.record.cluster_created_at)
    if failure is None or failed_at is None:
        return None
    of_this_cluster = made_at is not None and failed_at >= made_at
    return no(STOPPED_REASONS[failure.failure_class], failure.message) if of_this_cluster or failure.reason == CLUSTER_DELETED else None


def _progressing(f: Facts) -> Verdict:
    progress = f.progress
    if f.record.result:
        return no("Finished", "the job has ended")
    if not f.driver_runs or progress is None:
        return unknown("NoReportYet", "the driver has not reported")
    if deadlines.passed(deadlines.stall(f), f.now):
        return no("Stalled", f"no step finished for {f.spec.run_policy.stall_timeout_seconds} s")
    if progress.state == "Starting" or progress.step_time is None:
        return yes("WarmingUp", "before the first finished step of this run")
    return yes("StepAdvancing", "steps are finishing")


def _preflight_passed(f: Facts) -> Verdict:
    last = _last_report(f)
    found = last.preflight if last else None
    if found is None:
        return unknown("NoReportYet", "the checks before the first step have not ended")
    return no(found.failed, found.message) if found.failed else yes("ChecksPassed", found.message)


def _last_report(f: Facts) -> Progress | None:
    """Of a job that has ended: as it was at the end, for its driver is gone and cannot report anew."""
    return f.job.status.progress if f.record.result else f.progress


def _weights_in_sync(f: Facts) -> Verdict:
    last = _last_report(f)
    sync = last.sync if last else None
    if sync is None:
        return unknown("NoReportYet", "no weight sync was reported")
    if sync.error:
        return no("SyncFailed", sync.error)
    proof = "and their delivery was proven" if sync.verified_version is not None else "and their delivery is not proven"
    return yes("InSync", f"the engines hold the trainer's weights {proof}")


def _checkpoint_available(f: Facts) -> Verdict:
    told = f.job.status.progress
    saved, error = (told.checkpoint, told.save_error) if told else (None, None)
    if error:
        return yes("LastSaveFailed", f"status.progress.checkpoint is the newest; {error}") if saved else no("SaveFailed", error)
    return yes("Saved", "status.progress.checkpoint is the newest") if saved else no("NoneYet", "no checkpoint was saved yet")


def _suspended(f: Facts) -> Verdict:
    if not f.spec.suspend or f.record.result:
        return no("NotSuspended", "spec.suspend is false" if not f.spec.suspend else "the job has ended")
    if f.observed.clusters or f.observed.pods:
        return no("Stopping", "waiting for the pods to go" if f.cluster is None or f.cluster.deleting else "the driver finishes its step and saves")
    return yes("UserRequested", "spec.suspend is true: nothing is held")


def _degraded(f: Facts) -> Verdict:
    for pod in f.pods:
        if not f.record.result and pod.ray and pod.ray.failures and not pod.ray_ready:
            return yes("WorkerRestarting", f"Ray in pod {pod.name} restarts")
    if not f.record.result and f.progress and f.progress.degraded and f.driver_runs:
        return yes("EngineRestarting", f.progress.degraded)
    return no("Healthy", "nothing is amiss")


def _resources_released(f: Facts) -> Verdict:
    if not f.observed.clusters and not f.observed.pods:
        return yes("PodsGone", "the job holds no pods")
    if f.record.result and kept(f):
        return no("RetainedByPolicy", f"runPolicy.cleanup keeps RayCluster {f.cluster.name if f.cluster else ''}")
    if f.record.result or f.spec.suspend:
        return no("Terminating", "waiting for the pods to go")
    return no("InUse", "the job holds its pods")


def kept(f: Facts) -> bool:
    cleanup = f.spec.run_policy.cleanup
    return (cleanup.on_success if f.record.result == "Complete" else cleanup.on_failure) == "Keep"


def _complete(f: Facts) -> Verdict | None:
    return yes(f.record.result_reason or "", f.record.result_message or "") if f.record.result == "Complete" else None


def _failed(f: Facts) -> Verdict | None:
    return yes(f.record.result_reason or "", f.record.result_message or "") if f.record.result == "Failed" else None


TABLE: dict[ConditionType, Callable[[Facts], Verdict | None]] = {
    ConditionType.ACCEPTED: acceptance.accepted,
    ConditionType.QUOTA_RESERVED: _quota_reserved,
    ConditionType.CLUSTER_READY: readiness.explain,
    ConditionType.RUNNING: _running,
    ConditionType.PROGRESSING: _progressing,
    ConditionType.PREFLIGHT_PASSED: _preflight_passed,
    ConditionType.WEIGHTS_IN_SYNC: _weights_in_sync,
    ConditionType.CHECKPOINT_AVAILABLE: _checkpoint_available,
    ConditionType.SUSPENDED: _suspended,
    ConditionType.DEGRADED: _degraded,
    ConditionType.RESOURCES_RELEASED: _resources_released,
    ConditionType.COMPLETE: _complete,
    ConditionType.FAILED: _failed,
}
