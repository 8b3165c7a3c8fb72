"""One function a condition: what is observed -> what the condition says, or None where it has no meaning.

A message never carries a number that moves at each step: that would be a write without news, and the step stands in
`status.progress` anyway.
"""

from collections.abc import Callable
from datetime import timedelta

from rlhf_api.progress import Progress
from rlhf_api.status import ConditionType
from rlhf_operator.decide import acceptance, deadlines, readiness
from rlhf_operator.decide.classes import MEANINGS
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.restarts import condemned
from rlhf_operator.decide.verdict import Verdict, no, unknown, yes
from rlhf_operator.decide.want import kept
from rlhf_operator.decide.words import brief
from rlhf_operator.names import ROLLOUT

EPHEMERAL = (
    "checkpoints lie in the trainer's pod and go with it: use spec.checkpoint.claim, or a volume that outlives pods"
)
# Past the grace period of a pod nothing is saved any more.
SAVED = timedelta(seconds=5)
QUOTA_REASONS = ("NoMatchingFlavor", "ExceedsMaxQuota", "TopologyPlacementFailed", "Misconfigured")


def conditions(f: Facts) -> dict[ConditionType, Verdict]:
    return {kind: verdict for kind, judge in TABLE.items() if (verdict := judge(f))}


def _quota_reserved(f: Facts) -> Verdict | None:
    if f.job.queue is None:
        return None
    if f.cluster is None:
        return no("WaitingForQuota", "there is no RayCluster to queue yet")
    if not f.cluster.suspended:
        return yes("Reserved", f"queue {f.job.queue.name} has admitted the job")
    return _waiting_in_queue(f)


def _waiting_in_queue(f: Facts) -> Verdict:
    workload = f.observed.queue.workload if f.observed.queue else None
    if workload is None:
        return _no_workload(f)
    reported = {c.type: c for c in workload}
    evicted, reserved = reported.get("Evicted"), reported.get("QuotaReserved")
    if evicted and evicted.status == "True":
        return no("Preempted" if evicted.reason == "Preempted" else "Evicted", evicted.message)
    if reserved is None or reserved.status == "True":
        return no("WaitingForQuota", "waiting for admission")
    return no(reserved.reason if reserved.reason in QUOTA_REASONS else "WaitingForQuota", reserved.message)


def _no_workload(f: Facts) -> Verdict:
    if not deadlines.passed(deadlines.queue_silence(f), f.now):
        return no("WaitingForQuota", "waiting for Kueue")
    return unknown(
        "KueueNotReacting", "Kueue has made no Workload for the RayCluster: is its RayCluster integration enabled?"
    )


def _running(f: Facts) -> Verdict:
    if f.record.result:
        return no("Finished", "the job has ended")
    if f.training and not condemned(f):
        return yes("DriverRunning", "the driver is training")
    if f.stopping:
        return no("DriverStopped", "the job is being deleted" if f.deleted else "the job is suspended")
    if f.record.restarting and f.memory.failures:
        last = f.memory.failures[0]
        return no(MEANINGS[last.failure_class].reason, brief(last.message, last.words))
    if f.driver_runs:
        return no("DriverStarting", "the driver starts: status.progress.detail tells how far it is")
    return no("DriverPending", "the driver waits for its pod")


def _progressing(f: Facts) -> Verdict:
    progress = f.progress
    if f.record.result:
        return no("Finished", "the job has ended")
    if not f.driver_runs or progress is None:
        return unknown("NoReportYet", "the driver has not reported")
    if deadlines.passed(deadlines.stall(f), f.now):
        return no("Stalled", f"the run did not get further for {f.job.run_policy.stall_timeout_seconds} s")
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
    return f.reported if f.record.result else f.progress


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
    last = f.reported
    saved, error = (last.checkpoint, last.save_error) if last else (None, None)
    if f.ephemeral:
        return no("Ephemeral", f"{error}; {EPHEMERAL}" if error else EPHEMERAL)
    if error:
        return (
            yes("LastSaveFailed", f"status.progress.checkpoint is the newest; {error}")
            if saved
            else no("SaveFailed", error)
        )
    return (
        yes("Saved", "status.progress.checkpoint is the newest")
        if saved
        else no("NoneYet", "no checkpoint was saved yet")
    )


def _suspended(f: Facts) -> Verdict:
    if f.deleted and not f.record.result:
        return no("FinalSave", "the job is being deleted: the driver finishes its step and saves")
    if f.record.result:
        return no("NotSuspended", "the job has ended" if f.job.suspend else "spec.suspend is false")
    if f.would_lose:
        goes_on = "the run goes on" if f.job.suspend else "the run goes on with the spec that it was begun with"
        meant = "or set spec.checkpoint.ephemeral if losing all steps is meant"
        return no("WouldLoseCheckpoint", f"{goes_on}: {EPHEMERAL}; {meant}")
    if not f.job.suspend:
        return no("NotSuspended", "spec.suspend is false")
    if f.observed.clusters or f.all_pods:
        going = f.cluster is None or f.cluster.deleting
        return no("Stopping", "waiting for the pods to go" if going else "the driver finishes its step and saves")
    return yes("UserRequested", "spec.suspend is true: nothing is held")


def _degraded(f: Facts) -> Verdict:
    if f.record.result:
        return no("Healthy", "nothing is amiss")
    for pod in f.pods:
        if pod.deleting_since and not f.stopping:
            saves = f.driver_runs and pod.role != ROLLOUT and not deadlines.passed(pod.deletion_due, f.now - SAVED)
            return yes("PodEnding", f"pod {pod.name} is being deleted{': the driver saves' if saves else ''}")
        if pod.ray and pod.ray.failures and not pod.ray_ready:
            return yes("WorkerRestarting", f"Ray in pod {pod.name} restarts")
    if f.progress and f.progress.degraded and f.driver_runs:
        return yes("EngineRestarting", f.progress.degraded)
    return no("Healthy", "nothing is amiss")


def _resources_released(f: Facts) -> Verdict:
    if not f.observed.clusters and not f.all_pods:
        return yes("PodsGone", "the job holds no pods")
    if f.record.result and kept(f) and f.cluster:
        return no("RetainedByPolicy", f"runPolicy.cleanup keeps RayCluster {f.cluster.name}")
    if f.record.result or f.stopping:
        return no("Terminating", "waiting for the pods to go")
    return no("InUse", "the job holds its pods")


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
