"""Which driver runs ended without success, why, and what that costs.

The unit is one run of the driver, so that an incident is charged once however many containers it broke: a lost head
or node
is the *cause* of the driver's end. `record.charged` says what is charged already: per head pod the failed runs of its
driver,
and, as container "pod", that the pod itself is lost (or condemned: see `want.py`).
"""

import re
from dataclasses import replace

from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC
from rlhf_api.status import Failure, FailureClass, Loss, PodSeen, Record
from rlhf_operator.clock import moment, stamp
from rlhf_operator.decide import deadlines, losses
from rlhf_operator.decide.classes import MEANINGS
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.memory import Memory
from rlhf_operator.decide.words import how_it_ended, last_words
from rlhf_operator.names import DRIVER_CONTAINER, HEAD
from rlhf_operator.observed import Pod, Termination

POD = "pod"
WORDS_MAX = 1024
# The job ends with these: no restart, so no charge.
FINAL_EXITS = (EXIT_BAD_SPEC, EXIT_BAD_DATA)
# A driver that ends because it has not got what Kubernetes, or this operator, is to give it.
WAITED_IN_VAIN = re.compile(r"^(PlacementFailed|NotNumbered)\b", re.MULTILINE)


def charge(f: Facts) -> Memory:
    """Every loss that is not charged yet, charged."""
    if f.cluster is None or f.cluster.deleting or f.succeeded:
        return f.memory
    if f.cluster.suspended:
        return _evicted(f)
    memory = _vanished_heads(f)
    for head in f.heads:
        memory = _head(f.remembering(memory), head)
    return _stalled(f.remembering(memory))


def lose_cluster(f: Facts) -> Memory:
    """The RayCluster itself is gone, and nobody asked us. Whoever heard of its head's end first has charged that."""
    known = {seen.uid for seen in f.record.charged}
    if known and all(charged(f.record, uid, POD) for uid in known):
        return f.memory
    head = next((p.name for p in f.all_pods if p.role == HEAD and p.cluster_uid == f.record.cluster_uid), None)
    return _add(f, _failure(f, FailureClass.HEAD_LOST, "ClusterDeleted", "the RayCluster was deleted", head))


def overheard(f: Facts) -> Memory:
    """The last words of drivers whose pods were given up before they had ended."""
    memory = f.memory
    for head in (p for p in f.all_pods if p.role == HEAD):
        memory = _complete(f.remembering(memory), head)
    return memory


def charged(record: Record, uid: str, container: str) -> int | None:
    """Failed runs charged so far; None for a container never seen."""
    return next((seen.restart_count for seen in record.charged if (seen.uid, seen.container) == (uid, container)), None)


def condemned(f: Facts) -> bool:
    """The head pod is given up, though it may still be there."""
    return f.head is not None and bool(charged(f.record, f.head.uid, POD))


def _evicted(f: Facts) -> Memory:
    """The queue took back what it had given: once for all head pods that there were."""
    held = [uid for uid in dict.fromkeys(seen.uid for seen in f.record.charged) if not charged(f.record, uid, POD)]
    if not held and not f.record.admitted_at:
        return f.memory
    name = f.heads[-1].name if f.heads else None
    memory = _add(f, _failure(f, FailureClass.PREEMPTED, "Evicted", "the queue took the job's quota back", name))
    for uid in dict.fromkeys([*held, *(p.uid for p in f.heads)]):
        memory = _mark(memory, uid, POD, 1)
    return memory.noting(admitted_at=None)


def _vanished_heads(f: Facts) -> Memory:
    """Head pods that we knew and that are gone: charged unless they were, then forgotten, for they cannot come back."""
    memory, present = f.memory, {p.uid for p in f.heads}
    for uid in dict.fromkeys(seen.uid for seen in f.record.charged if seen.uid not in present):
        if charged(f.record, uid, POD) is None:
            memory = _add(
                f.remembering(memory), _failure(f, FailureClass.HEAD_LOST, "PodGone", "the head pod is gone", None)
            )
    gone = {seen.uid for seen in memory.record.charged} - present
    return memory.noting(
        charged=[seen for seen in memory.record.charged if seen.uid in present],
        losses=[loss for loss in memory.record.losses if loss.uid not in gone],
    )


def _head(f: Facts, head: Pod) -> Memory:
    memory = f.memory
    if charged(f.record, head.uid, DRIVER_CONTAINER) is None:
        memory = _mark(memory, head.uid, DRIVER_CONTAINER, 0)
    if charged(f.record, head.uid, POD):
        return memory
    lost = losses.of_pod(f, head)
    if lost is None:
        return _driver_runs(f.remembering(memory), head)
    run = _ended_with(f, head, lost)
    if run is None:
        memory = _driver_runs(f.remembering(memory), head)
    memory = _add(f.remembering(memory), _of_loss(f, lost, head, run))
    return _mark(memory, head.uid, POD, 1)


def _run_of(head: Pod) -> Termination | None:
    return head.driver.last if head.driver else None


def _ended_with(f: Facts, head: Pod, lost: Loss) -> Termination | None:
    """The driver's newest end, if it came with the pod's and not before it. One that is charged is an earlier run's,
    and so is that of a driver that runs again.
    """
    run = _run_of(head)
    if run is None or head.driver is None or head.driver.running_since or _uncharged(f, head) <= 0:
        return None
    return run if run.exit_code and _near(run, lost.began) else None


def _near(run: Termination, began: str) -> bool:
    since = moment(began)
    return bool(run.finished_at and since and run.finished_at + losses.SLACK >= since)


def _driver_runs(f: Facts, head: Pod) -> Memory:
    """Of several runs that ended unseen only the last one's end is known: all are charged to it."""
    driver, new = head.driver, _uncharged(f, head)
    if driver is None or driver.last is None or new <= 0:
        return f.memory
    count = 0 if driver.last.exit_code in FINAL_EXITS else new
    memory = (
        _add(f, _of_run(f, head, driver.last), count)
        if not _in_vain(f, driver.last)
        else f.memory.failed(_waited(f, head, driver.last))
    )
    return _mark(memory, head.uid, DRIVER_CONTAINER, driver.failures)


def _in_vain(f: Facts, run: Termination) -> bool:
    found = WAITED_IN_VAIN.search(run.message)
    return found is not None and (found[1] == "NotNumbered" or not (f.ready and f.record.ready_at))


def _waited(f: Facts, head: Pod, run: Termination) -> Failure:
    return _failure(
        f, FailureClass.NODE_LOST, "PodsMissing", "the driver waited in vain for pods: costs nothing", head.name, run
    )


def _stalled(f: Facts) -> Memory:
    head = f.head
    if (
        head is None
        or f.stopping
        or not deadlines.passed(deadlines.stall(f), f.now)
        or charged(f.record, head.uid, POD)
    ):
        return f.memory
    seconds = int(deadlines.stall_limit(f).total_seconds())
    what = (
        "the run did not get further for {} s (runPolicy.stallTimeoutSeconds)"
        if f.driver_runs
        else "the driver did not run again for {} s"
    )
    words = f"{what.format(seconds)}: the head pod is replaced"
    return _mark(_add(f, _failure(f, FailureClass.STALLED, "Stalled", words, head.name)), head.uid, POD, 1)


def _of_run(f: Facts, head: Pod, run: Termination) -> Failure:
    """A run's end with its cause: what broke under it, else its own doing."""
    if run.reason == "OOMKilled":
        return _failure(f, FailureClass.OOM, run.reason, f"{how_it_ended(run)}, out of memory", head.name, run)
    if lost := losses.cause(f, run, head):
        return _of_loss(f, lost, head, run)
    return _failure(f, FailureClass.APP, run.reason or "Error", how_it_ended(run), head.name, run)


def _of_loss(f: Facts, lost: Loss, head: Pod, run: Termination | None) -> Failure:
    failure = _failure(f, lost.failure_class, lost.reason, f"{lost.pod}: {lost.message}", head.name, run)
    return failure if run else failure.model_copy(update={"time": lost.began})


def _failure(
    f: Facts, class_: FailureClass, reason: str, message: str, pod: str | None, run: Termination | None = None
) -> Failure:
    ended = run.finished_at if run and run.finished_at else f.now
    failure = Failure(
        failure_class=class_, reason=reason, message=message[:WORDS_MAX], pod=pod, time=stamp(ended),
        step=f.reported.step if f.reported else 0, attempt=f.record.attempt.number if f.record.attempt else None,
    )  # fmt: skip
    return _with_words(failure, run) if run else failure


def _with_words(failure: Failure, run: Termination) -> Failure:
    return failure.model_copy(update={"words": last_words(run), "exit_code": run.exit_code, "signal": run.signal})


def _complete(f: Facts, head: Pod) -> Memory:
    """The newest failure of this pod gets the driver's end, unless that end has a failure of its own."""
    run, told = _run_of(head), f.memory.failures
    if run is None or not run.exit_code or run.finished_at is None:
        return f.memory
    if any(one.pod == head.name and one.exit_code is not None and one.time == stamp(run.finished_at) for one in told):
        return f.memory
    at = next((i for i, one in enumerate(told) if one.pod == head.name and one.exit_code is None), None)
    if at is None or not (_near(run, told[at].time) or _heard_late(f, head)):
        return f.memory
    return replace(f.memory, failures=(*told[:at], _with_words(told[at], run), *told[at + 1 :]))


def _heard_late(f: Facts, head: Pod) -> bool:
    """An end that was seen only after its pod had been given up, however long ago it was."""
    return charged(f.record, head.uid, DRIVER_CONTAINER) is not None and _uncharged(f, head) > 0


def _uncharged(f: Facts, head: Pod) -> int:
    """Failed runs of its driver, all of them for a head that was never seen."""
    return head.driver.failures - (charged(f.record, head.uid, DRIVER_CONTAINER) or 0) if head.driver else 0


def _add(f: Facts, failure: Failure, count: int = 1) -> Memory:
    """A run that is to save and end loses nothing by ending: its failure is told, and not counted."""
    memory = f.memory.failed(failure)
    if f.stopping or not count:
        return memory
    meaning = MEANINGS[failure.failure_class]
    before = getattr(memory.restarts, meaning.counter)
    restarts = memory.restarts.model_copy(
        update={"total": memory.restarts.total + count, meaning.counter: before + count}
    )
    step = f.reported.step if f.reported else 0
    return replace(memory, restarts=restarts).noting(
        restarting=True,
        restarts_since_progress=f.record.restarts_since_progress + meaning.cost * count,
        progress_step=max(f.record.progress_step, step),
    )


def _mark(memory: Memory, uid: str, container: str, count: int) -> Memory:
    others = [seen for seen in memory.record.charged if (seen.uid, seen.container) != (uid, container)]
    return memory.noting(charged=[*others, PodSeen(uid=uid, container=container, restart_count=count)])
