"""The record after this look at the world: facts that would vanish with the children. Each step takes Facts and gives the next
record; the order matters and is the order of `STEPS`."""

from collections.abc import Callable

from rlhf_api.status import Record
from rlhf_operator.clock import stamp
from rlhf_operator.decide import acceptance, deadlines, restarts
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.outcome import Outcome, outcome


def remember(f: Facts) -> Record:
    """A finished job learns nothing more; one that does not parse, nothing at all."""
    if f.job.parsed is None:
        return _refuse_for_ever(f)
    for step in STEPS:
        if f.record.result:
            break
        f = f.knowing(step(f))
    return f.record


def _refuse_for_ever(f: Facts) -> Record:
    """A spec that cannot be right, of a job that has made nothing yet: no change from outside can heal it."""
    if f.record.result or f.record.clusters or not acceptance.hopeless(f.job):
        return f.record
    return _ended(f, Outcome("Failed", "InvalidSpec", acceptance.accepted(f).message))


def _adopt(f: Facts) -> Record:
    """The present cluster exists: remember its identity, and that it holds quota."""
    if f.cluster is None:
        return f.record
    known = {"cluster_uid": f.cluster.uid, "cluster_created_at": f.record.cluster_created_at or stamp(f.cluster.created_at or f.now)}
    if not f.cluster.suspended and f.record.admitted_at is None:
        known["admitted_at"] = stamp(f.now)
    return f.record.model_copy(update=known)


def _number(f: Facts) -> Record:
    """The number of the cluster that should be. Raising it condemns the one before: intent is written before it is acted on."""
    if f.record.clusters == 0:
        starts = acceptance.accepted(f).status == "True" and not f.spec.suspend
        return f.record.model_copy(update={"clusters": 1}) if starts else f.record
    if f.record.cluster_uid is None or not f.observed.kuberay:
        return f.record
    if f.cluster is None:
        return _next_cluster(f if f.spec.suspend else f.knowing(restarts.lose_cluster(f)))
    return _next_cluster(f) if f.spec.suspend and drained(f) else f.record


def drained(f: Facts) -> bool:
    """Nothing would be lost with the pods: the driver has saved, has not begun, does not run, or does not come to an end."""
    if not f.training or f.progress is None:
        return True
    return f.progress.state == "Drained" or deadlines.passed(deadlines.stall(f), f.now)


def _next_cluster(f: Facts) -> Record:
    gone = dict.fromkeys(("cluster_uid", "cluster_created_at", "admitted_at", "ready_at"))
    return _stop_clock(f).model_copy(update={**gone, "clusters": f.record.clusters + 1, "charged": []})


def _stop_clock(f: Facts) -> Record:
    """activeDeadlineSeconds counts only while a cluster works."""
    return f.record.model_copy(update={"active_seconds": f.record.active_seconds + f.since(f.record.started_at), "started_at": None})


def _clocks(f: Facts) -> Record:
    if f.cluster is None:
        return f.record
    if f.cluster.suspended:
        return _stop_clock(f)
    known = {"started_at": f.record.started_at or (stamp(f.now) if f.training else None)}
    if f.ready and not f.record.ready_at:
        known["ready_at"] = stamp(f.now)
    if f.record.ready_at and not f.ready:  # pods are to be provided once more
        known |= {"ready_at": None, "admitted_at": stamp(f.now)}
    return f.record.model_copy(update=known)


def _credit(f: Facts) -> Record:
    """A step that was never finished before pays every restart back. Steps are not written otherwise: they change too often."""
    step = f.job.status.progress.step if f.job.status.progress else 0
    paid = f.record.restarts_since_progress and step > f.record.progress_step
    return f.record.model_copy(update={"restarts_since_progress": 0, "progress_step": step}) if paid else f.record


def _finish(f: Facts) -> Record:
    end = outcome(f)
    return _ended(f, end) if end else f.record


def _ended(f: Facts, end: Outcome) -> Record:
    return _stop_clock(f).model_copy(update={
        "result": end.result, "result_reason": end.reason, "result_message": end.message, "finished_at": stamp(f.now),
    })


STEPS: tuple[Callable[[Facts], Record], ...] = (_adopt, _number, _credit, restarts.charge, _clocks, _finish)
