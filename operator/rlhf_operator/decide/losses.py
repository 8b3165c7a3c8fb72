"""What broke under the driver. A loss is written down when it is seen, because a pod takes its history with it; so a
cause is a look-up.

A cause is near its effect: the driver's end lies between the loss's beginning and shortly after the pod is gone or
Ray's container
has ended. A loss that a later finished step survived is none. Among those left, the first domino.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from rlhf_api.status import FailureClass, Loss
from rlhf_operator.clock import moment, stamp
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.memory import Memory
from rlhf_operator.decide.words import how_it_ended
from rlhf_operator.names import HEAD
from rlhf_operator.observed import Pod, Termination

# The kubelet writes whole seconds, and two containers' ends in either order.
SLACK = timedelta(seconds=5)
# Ray notices that a node is gone within a minute, the driver's calls after that.
NEAR = timedelta(seconds=120)
# A step that ends this long after a loss did without what was lost.
SURVIVED = timedelta(seconds=30)
KEPT, WORDS_MAX = 16, 512
# Reasons of the DisruptionTarget condition: whether somebody else needed the room, or the node gave out.
DISRUPTIONS = {
    "PreemptionByScheduler": FailureClass.PREEMPTED, "EvictionByEvictionAPI": FailureClass.PREEMPTED,
    "DeletionByTaintManager": FailureClass.NODE_LOST, "DeletionByPodGC": FailureClass.NODE_LOST,
    "TerminationByKubelet": FailureClass.NODE_LOST,
}  # fmt: skip


def watch(f: Facts) -> Memory:
    """Losses that are seen now beside those that were."""
    return f.memory.noting(losses=[loss for loss in known(f) if loss in f.record.losses or not _over(f, loss)][-KEPT:])


def forget(f: Facts) -> Memory:
    """Losses that can be no cause any more."""
    return f.memory.noting(losses=[loss for loss in f.record.losses if not _over(f, loss)])


def known(f: Facts) -> tuple[Loss, ...]:
    """Each once, however long ago: an end that nobody saw may be as old. What is on record counts, but for its end."""
    seen = {_key(loss): loss for loss in _visible(f)}
    there = {p.uid for p in f.pods}
    written = [
        loss if loss.gone else _ended(f, loss, seen.get(_key(loss)), loss.uid in there) for loss in f.record.losses
    ]
    unseen = [] if any(loss.uid not in there for loss in written) else _unseen(f)
    found = {_key(loss): loss for loss in (*unseen, *seen.values())}
    return tuple({**found, **{_key(loss): loss for loss in written}}.values())


def _ended(f: Facts, loss: Loss, seen: Loss | None, there: bool) -> Loss:
    return loss.model_copy(update={"gone": (seen.gone if seen else None) if there else stamp(f.now)})


def of_pod(f: Facts, pod: Pod) -> Loss | None:
    """The pod is going or gone, and by whom, as far as it is told; as it was first seen."""
    lost = _pod_loss(f, pod)
    return next((loss for loss in f.record.losses if lost and _key(loss) == _key(lost)), lost)


def cause(f: Facts, run: Termination, head: Pod) -> Loss | None:
    """Another head pod is none: it took its own driver along, and nobody else's."""
    if run.finished_at is None:
        return None
    end, others = run.finished_at, {p.uid for p in f.heads if p.uid != head.uid}
    near = [
        loss
        for loss in known(f)
        if loss.uid not in others and _began(loss) <= end + SLACK and _near(loss, end) and not _survived(f, loss, end)
    ]
    return min(near, key=_began, default=None)


def _near(loss: Loss, end: datetime) -> bool:
    gone = moment(loss.gone)
    return gone is None or end <= gone + NEAR


def _survived(f: Facts, loss: Loss, by: datetime) -> bool:
    gone, step = moment(loss.gone), f.last_step_at
    return gone is not None and step is not None and gone + SURVIVED <= step <= by + SLACK


def _over(f: Facts, loss: Loss) -> bool:
    gone = moment(loss.gone)
    return gone is not None and (f.now > gone + NEAR or _survived(f, loss, f.now))


def _began(loss: Loss) -> datetime:
    return moment(loss.began) or datetime.max.replace(tzinfo=UTC)


def _key(loss: Loss) -> tuple[str, str]:
    """A pod is lost once; its Ray may end often."""
    return loss.uid, loss.began if loss.container else ""


def _visible(f: Facts) -> Iterator[Loss]:
    for pod in f.pods:
        if lost := _pod_loss(f, pod):
            yield lost
        yield from _ray_end(pod)


def _pod_loss(f: Facts, pod: Pod) -> Loss | None:
    if pod.deleting_since is None and pod.phase != "Failed" and not pod.disruption:
        return None
    class_ = DISRUPTIONS.get(pod.disruption, FailureClass.PREEMPTED) if pod.disruption else _class_of(pod)
    words = pod.disruption_message or pod.message or "it was deleted"
    began = pod.disrupted_at or pod.deleting_since or f.now
    return _loss(pod, class_, pod.disruption or pod.reason or "PodDeleted", words, began, _gone(f, pod, began))


def _gone(f: Facts, pod: Pod, began: datetime) -> datetime | None:
    """A pod that has failed does nothing any more, nor does one that is there for longer than it was given."""
    if pod.phase == "Failed":
        return began
    return pod.deletion_due if pod.deletion_due and f.now > pod.deletion_due + SLACK else None


def _ray_end(pod: Pod) -> Iterator[Loss]:
    last = pod.ray.last if pod.ray else None
    if last is None or last.finished_at is None:
        return
    class_ = FailureClass.OOM if last.reason == "OOMKilled" else _class_of(pod)
    words = how_it_ended(last, "Ray") + (": out of memory" if class_ is FailureClass.OOM else "")
    ended = _loss(pod, class_, last.reason or "Error", words, last.finished_at, last.finished_at)
    yield ended.model_copy(update={"container": pod.ray.name if pod.ray else None})


def _unseen(f: Facts) -> Iterator[Loss]:
    """Worker pods that went while nobody looked: one is missing, or was made after all had been ready, as far as we or
    the driver saw."""
    ready = moment(f.record.ready_at) or f.stepped_at
    if ready is None:
        return
    for group in f.groups:
        mine = [p for p in f.workers if p.role == group.name]
        young = [p for p in mine if p.created_at and p.created_at > ready + SLACK]
        for pod in young:
            began = max(ready, pod.created_at - NEAR) if pod.created_at else ready
            yield _loss(
                pod, FailureClass.NODE_LOST, "PodReplaced", "it takes the place of one that went", began, pod.created_at
            )
        if len(mine) < group.pods:
            yield Loss(
                uid=f"{group.name}-gone", pod=group.name, failure_class=FailureClass.NODE_LOST, reason="PodGone",
                message="one of them is gone", began=stamp(max(ready, f.now - NEAR)), gone=stamp(f.now),
            )  # fmt: skip


def _class_of(pod: Pod) -> FailureClass:
    return FailureClass.HEAD_LOST if pod.role == HEAD else FailureClass.NODE_LOST


def _loss(
    pod: Pod, class_: FailureClass, reason: str, words: str, began: datetime, gone: datetime | None = None
) -> Loss:
    return Loss(
        uid=pod.uid, pod=pod.name, failure_class=class_, reason=reason, message=words[:WORDS_MAX], began=stamp(began),
        gone=stamp(gone) if gone else None,
    )  # fmt: skip
