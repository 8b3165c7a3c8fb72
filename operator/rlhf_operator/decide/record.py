"""The memory after this look at the world: facts that would vanish with the children. Each step takes Facts and gives
the next
memory; the order matters and is the order of `STEPS`."""

from collections.abc import Callable
from dataclasses import replace

from rlhf_api.status import Attempt
from rlhf_operator.clock import stamp
from rlhf_operator.decide import acceptance, deadlines, losses, restarts
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.memory import Memory
from rlhf_operator.decide.outcome import Outcome, outcome


def remember(f: Facts) -> Memory:
    for step in AFTER_THE_END if f.record.result else STEPS:
        f = f.remembering(step(f))
    return f.memory


def _accept(f: Facts) -> Memory:
    return f.memory if f.record.accepted or acceptance.accepted(f).status != "True" else f.memory.noting(accepted=True)


def _begin(f: Facts) -> Memory:
    """The first cluster gets its number before anything is known of it: it may be there already, and nobody told."""
    starts = not f.record.clusters and not f.deleted and not f.suspended and acceptance.accepted(f).status == "True"
    return f.memory.noting(clusters=1) if starts else f.memory


def _adopt(f: Facts) -> Memory:
    """The present cluster exists: remember its identity, and that it holds quota."""
    if f.cluster is None:
        return f.memory
    made = f.record.cluster_created_at or stamp(f.cluster.created_at or f.now)
    admitted = f.record.admitted_at or (stamp(f.now) if f.job.queue and not f.cluster.suspended else None)
    return f.memory.noting(cluster_uid=f.cluster.uid, cluster_created_at=made, admitted_at=admitted)


def _attempt(f: Facts) -> Memory:
    """Each new head pod gets the next number, before anything else of it is judged."""
    head, last = f.head, f.record.attempt
    if head is None or head.deleting_since is not None or (last is not None and last.pod_uid == head.uid):
        return f.memory
    return f.memory.noting(attempt=Attempt(number=last.number + 1 if last else 1, pod_uid=head.uid))


def _number(f: Facts) -> Memory:
    """The number of the cluster that should be. Raising it condemns the one before: intent is written before it is
    acted on."""
    if f.deleted or f.record.cluster_uid is None or not f.observed.kuberay:
        return f.memory
    if f.cluster is None:
        return _next_cluster(f if f.suspended else f.remembering(restarts.lose_cluster(f)))
    if f.succeeded:
        return f.memory
    due = drained(f) if f.suspended else f.outdated
    return _next_cluster(f) if due else f.memory


def drained(f: Facts) -> bool:
    """Nothing would be lost with the pods: the driver has saved, has not begun, does not run, or does not come to an
    end."""
    if not f.training or f.progress is None:
        return True
    return f.progress.state == "Drained" or deadlines.passed(deadlines.stall(f), f.now)


def _next_cluster(f: Facts) -> Memory:
    """What a user suspends or edits is no restart."""
    by_user = f.suspended or (f.cluster is not None and f.outdated)
    gone = dict.fromkeys(("cluster_uid", "cluster_created_at", "admitted_at", "ready_at", "awaited_since"))
    return _stop_clock(f).noting(
        **gone, clusters=f.record.clusters + 1, charged=[], losses=[], released_at=stamp(f.now),
        restarting=f.record.restarting and not by_user,
    )  # fmt: skip


def _stop_clock(f: Facts) -> Memory:
    """activeDeadlineSeconds counts only while a cluster works."""
    return f.memory.noting(active_seconds=f.record.active_seconds + f.since(f.record.started_at), started_at=None)


def _credit(f: Facts) -> Memory:
    """A step that was never finished before pays every restart back. Steps are not written otherwise: they change too
    often."""
    step = f.reported.step if f.reported else 0
    paid = f.record.restarts_since_progress and step > f.record.progress_step
    return f.memory.noting(restarts_since_progress=0, progress_step=step) if paid else f.memory


def _first_ready(f: Facts) -> Memory:
    """That all pods were there once, also where this look is what gives them up."""
    stepped = f.reported is not None and f.reported.step > 0
    seen = f.record.first_ready_at is None and (f.ready or f.training or stepped)
    return f.memory.noting(first_ready_at=stamp(f.now)) if seen else f.memory


def _provision(f: Facts) -> Memory:
    """Since when all pods are there, or are awaited."""
    if not f.record.clusters or f.stopping or _held_back(f):
        return f.memory.noting(awaited_since=None, ready_at=f.record.ready_at if f.usable else None)
    if f.ready:
        return f.memory.noting(awaited_since=None, ready_at=f.record.ready_at or stamp(f.now))
    return f.memory.noting(awaited_since=None if f.training else f.record.awaited_since or stamp(f.now), ready_at=None)


def _held_back(f: Facts) -> bool:
    """By the queue, or by what only an edit or an admin can mend: then no pods are to be awaited."""
    return f.cluster.suspended if f.cluster else acceptance.accepted(f).status != "True"


def _activity(f: Facts) -> Memory:
    if f.cluster is not None and f.cluster.suspended:
        return _stop_clock(f)
    if not f.training:
        return f.memory
    begun = replace(f.memory, start_time=f.memory.start_time or stamp(f.now))
    return begun.noting(
        started_at=f.record.started_at or stamp(f.now), restarting=f.record.restarting and restarts.condemned(f)
    )


def _allocate(f: Facts) -> Memory:
    """How long pods were held that a node had room for."""
    held, since = any(p.scheduled and p.phase != "Failed" for p in f.all_pods), f.record.allocated_since
    if held:
        return f.memory if since else f.memory.noting(allocated_since=stamp(f.now))
    return f.memory.noting(allocated_seconds=f.record.allocated_seconds + f.since(since), allocated_since=None)


def _finish(f: Facts) -> Memory:
    """First match wins. A spec that cannot be right, of a job that was never accepted, ends it: no change from
    outside can heal it."""
    if not f.record.clusters and not f.record.accepted and acceptance.hopeless(f.job):
        return _ended(f, Outcome("Failed", "InvalidSpec", acceptance.accepted(f).message))
    end = outcome(f)
    return _ended(f, end) if end else f.memory


def _ended(f: Facts, end: Outcome) -> Memory:
    return _stop_clock(f).noting(
        result=end.result, result_reason=end.reason, result_message=end.message, finished_at=stamp(f.now),
        awaited_since=None,
    )  # fmt: skip


STEPS: tuple[Callable[[Facts], Memory], ...] = (
    _accept, _begin, _adopt, _attempt, _credit, losses.watch, restarts.charge, losses.forget, restarts.overheard,
    _first_ready, _number, _provision, _activity, _allocate, _finish,
)  # fmt: skip
# A job that has ended learns no more than what its pods still have to say.
AFTER_THE_END = (restarts.overheard, _allocate)
