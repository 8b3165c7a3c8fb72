"""Which driver runs ended without success, why, and what that costs.

The unit is one run of the driver, so that an incident is charged once however many containers it broke: a lost head or node
is the *cause* of the driver's end. `record.charged` says what is charged already: per head pod the failed runs of its driver,
and, as container "pod", that the pod itself is lost (or condemned: see `want.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC
from rlhf_api.status import Failure, FailureClass, PodSeen, Record
from rlhf_operator.clock import stamp
from rlhf_operator.decide import deadlines
from rlhf_operator.decide.facts import Facts
from rlhf_operator.names import DRIVER_CONTAINER, HEAD
from rlhf_operator.observed import Pod, Termination

POD = "pod"
CLUSTER_DELETED = "ClusterDeleted"
WORDS_MAX = 4096
# The job ends with these: no restart, so no charge.
FINAL_EXITS = (EXIT_BAD_SPEC, EXIT_BAD_DATA)
# A container's end and its consequence carry the kubelet's whole seconds, in either order.
SLACK = timedelta(seconds=5)
# Reasons of the DisruptionTarget condition that mean that the node, not the scheduler, ended the pod.
NODE_REASONS = ("DeletionByTaintManager", "DeletionByPodGC")
COUNTERS = {
    FailureClass.APP: "app", FailureClass.OOM: "oom", FailureClass.HEAD_LOST: "head_lost", FailureClass.NODE_LOST: "node_lost",
    FailureClass.PREEMPTED: "preempted", FailureClass.STALLED: "stalled",
}


@dataclass(frozen=True, slots=True)
class Cause:
    failure_class: FailureClass
    reason: str
    message: str
    pod: str
    time: datetime


def charge(f: Facts) -> Record:
    """Every loss that is not charged yet, charged. A job that is being suspended or has succeeded loses nothing."""
    if f.spec.suspend or f.cluster is None or f.cluster.deleting or f.succeeded:
        return f.record
    if f.cluster.suspended:
        return _evicted(f) if f.record.admitted_at else f.record
    record = _vanished_heads(f)
    for head in f.heads:
        record = _head(f.knowing(record), head)
    return _stalled(f.knowing(record))


def lose_cluster(f: Facts) -> Record:
    """The RayCluster itself is gone, and nobody asked us."""
    failure = Failure(failure_class=FailureClass.HEAD_LOST, reason=CLUSTER_DELETED, message="the RayCluster was deleted", time=stamp(f.now))
    return _add(f, failure)


def charged(record: Record, uid: str, container: str) -> int | None:
    """Failed runs charged so far; None for a container never seen."""
    return next((seen.restart_count for seen in record.charged if (seen.uid, seen.container) == (uid, container)), None)


def _evicted(f: Facts) -> Record:
    failure = Failure(failure_class=FailureClass.PREEMPTED, reason="Evicted", message="the queue took the job's quota back", time=stamp(f.now))
    record = _add(f, failure)
    for head in f.heads:
        record = _mark(record, head.uid, POD, 1)
    return record.model_copy(update={"admitted_at": None, "ready_at": None})


def _vanished_heads(f: Facts) -> Record:
    """Head pods that we knew and that are gone: charged unless they were, then forgotten, for they cannot come back."""
    record, present = f.record, {p.uid for p in f.heads}
    for uid in dict.fromkeys(seen.uid for seen in record.charged if seen.uid not in present):
        if charged(record, uid, POD) is None:
            failure = Failure(failure_class=FailureClass.HEAD_LOST, reason="PodGone", message="the head pod is gone", time=stamp(f.now))
            record = _add(f.knowing(record), failure)
    return record.model_copy(update={"charged": [seen for seen in record.charged if seen.uid in present]})


def _head(f: Facts, head: Pod) -> Record:
    record = f.record
    if charged(record, head.uid, DRIVER_CONTAINER) is None:
        record = _mark(record, head.uid, DRIVER_CONTAINER, 0)
    if charged(record, head.uid, POD):
        return record
    if lost := pod_lost(head, f.now):
        record = _add(f.knowing(record), _failure(lost))
        return _mark(record, head.uid, POD, 1)
    return _driver_runs(f.knowing(record), head)


def _driver_runs(f: Facts, head: Pod) -> Record:
    """Of several runs that ended unseen only the last one's end is known: all are charged to it."""
    driver, before = head.driver, charged(f.record, head.uid, DRIVER_CONTAINER) or 0
    if driver is None or driver.last is None or driver.failures <= before:
        return f.record
    failure = _failure_of(f, head, driver.last)
    if driver.last.exit_code in FINAL_EXITS:
        record = f.record.model_copy(update={"last_failure": failure})
    else:
        record = _add(f, failure, driver.failures - before)
    return _mark(record, head.uid, DRIVER_CONTAINER, driver.failures)


def _stalled(f: Facts) -> Record:
    deadline, head = deadlines.stall(f), f.head
    if head is None or not deadlines.passed(deadline, f.now) or charged(f.record, head.uid, POD):
        return f.record
    limit = f.spec.run_policy.stall_timeout_seconds
    failure = Failure(
        failure_class=FailureClass.STALLED, reason="Stalled", pod=head.name, time=stamp(f.now),
        message=f"no step finished for {limit} s (runPolicy.stallTimeoutSeconds): the head pod is replaced",
    )
    return _mark(_add(f, failure), head.uid, POD, 1)


def pod_lost(pod: Pod, now: datetime) -> Cause | None:
    """The pod is going or gone, and by whom, as far as it is told."""
    if pod.deleting_since is None and pod.phase != "Failed" and not pod.disruption:
        return None
    time = pod.disrupted_at or pod.deleting_since or now
    if pod.disruption:
        lost = FailureClass.NODE_LOST if pod.disruption in NODE_REASONS else FailureClass.PREEMPTED
        return Cause(lost, pod.disruption, pod.disruption_message or f"pod {pod.name} was disrupted", pod.name, time)
    lost = FailureClass.HEAD_LOST if pod.role == HEAD else FailureClass.NODE_LOST
    return Cause(lost, pod.reason or "PodDeleted", pod.message or f"pod {pod.name} was deleted", pod.name, time)


def _failure_of(f: Facts, head: Pod, run: Termination) -> Failure:
    """A run's end with its cause: what broke under it while it ran, else its own doing."""
    if run.reason != "OOMKilled" and (cause := _cause(f, head, run)):
        return _failure(cause, run)
    own = FailureClass.OOM if run.reason == "OOMKilled" else FailureClass.APP
    words = run.message[-WORDS_MAX:] or f"the driver ended with exit code {run.exit_code} and said nothing"
    return Failure(failure_class=own, reason=run.reason or "Error", message=words, exit_code=run.exit_code, pod=head.name, time=stamp(run.finished_at or f.now))


def _cause(f: Facts, head: Pod, run: Termination) -> Cause | None:
    start, end = run.started_at, run.finished_at
    if start is None or end is None:
        return None
    during = [c for c in (*_ray_ends(head), *_worker_losses(f)) if start <= c.time <= end + SLACK]
    return min(during, key=lambda c: c.time, default=None)


def _ray_ends(pod: Pod) -> Iterator[Cause]:
    last = pod.ray.last if pod.ray else None
    if last is None or last.finished_at is None:
        return
    lost = FailureClass.HEAD_LOST if pod.role == HEAD else FailureClass.NODE_LOST
    kind = FailureClass.OOM if last.reason == "OOMKilled" else lost
    words = f"Ray in pod {pod.name} ended with exit code {last.exit_code} ({last.reason or 'no reason given'})"
    yield Cause(kind, last.reason or "Error", words, pod.name, last.finished_at)


def _worker_losses(f: Facts) -> Iterator[Cause]:
    for pod in f.workers:
        if lost := pod_lost(pod, f.now):
            yield lost
        yield from _ray_ends(pod)


def _failure(cause: Cause, run: Termination | None = None) -> Failure:
    return Failure(
        failure_class=cause.failure_class, reason=cause.reason, message=cause.message[:WORDS_MAX], pod=cause.pod,
        exit_code=run.exit_code if run else None, time=stamp(run.finished_at if run and run.finished_at else cause.time),
    )


def _add(f: Facts, failure: Failure, count: int = 1) -> Record:
    """Preemption is counted and free: it takes nothing from `backoffLimit`."""
    record, counter = f.record, COUNTERS[failure.failure_class]
    restarts = record.restarts.model_copy(update={
        "total": record.restarts.total + count, counter: getattr(record.restarts, counter) + count,
    })
    cost = 0 if failure.failure_class is FailureClass.PREEMPTED else count
    step = f.job.status.progress.step if f.job.status.progress else 0
    return record.model_copy(update={
        "restarts": restarts, "last_failure": failure, "restarts_since_progress": record.restarts_since_progress + cost,
        "progress_step": max(record.progress_step, step),
    })


def _mark(record: Record, uid: str, container: str, count: int) -> Record:
    others = [seen for seen in record.charged if (seen.uid, seen.container) != (uid, container)]
    return record.model_copy(update={"charged": [*others, PodSeen(uid=uid, container=container, restart_count=count)]})
