"""What should exist. Chosen from the record that the API server holds, never from the one that this pass is about to
write: so every action has its intent on record before it happens, and a crash between the two loses nothing. The first
RayCluster alone is made by the pass that gives it its number.

Raising `record.clusters` or setting `record.result` condemns clusters; marking a head pod's `pod` in `record.charged`
condemns that pod. The next pass, seeing that on record, acts.
"""

from dataclasses import dataclass, replace

from rlhf_operator.decide import acceptance, deadlines
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.record import drained
from rlhf_operator.decide.restarts import POD, charged
from rlhf_operator.names import FINALIZER
from rlhf_operator.observed import Cluster, Pod


@dataclass(frozen=True, slots=True)
class Want:
    """`cluster` is the number of the RayCluster to create, None for none: either it exists or it shall not.
    `kill_pods` are overdue:
    no kubelet ends them. `finalizer`: True puts it on the RLHFJob, False takes it off."""

    cluster: int | None = None
    delete_clusters: tuple[Cluster, ...] = ()
    delete_pods: tuple[Pod, ...] = ()
    kill_pods: tuple[Pod, ...] = ()
    delete_job: bool = False
    finalizer: bool | None = None


def want(f: Facts, *, learned: bool = False) -> Want:
    """`learned`: this pass learns what is not on record yet. A pod that is not condemned by the record may be the only
    one to know it, and is removed once it is written."""
    found = replace(_want(f), finalizer=_finalizer(f))
    if learned:
        return found
    orphans = f.orphans if deadlines.passed(deadlines.orphaned(f), f.now) else ()
    overdue = tuple(p for p in f.all_pods if deadlines.passed(deadlines.kill(p), f.now))
    return replace(found, delete_pods=(*found.delete_pods, *orphans), kill_pods=overdue)


def kept(f: Facts) -> bool:
    """The RayCluster stays for a look when the job has ended. The driver ends by itself: it reads that the job has."""
    cleanup = f.job.run_policy.cleanup
    return (cleanup.on_success if f.record.result == "Complete" else cleanup.on_failure) == "Keep"


def _want(f: Facts) -> Want:
    if f.deleted:
        return Want()
    if f.record.result:
        return _finished(f)
    if f.old_clusters:
        return Want(delete_clusters=tuple(c for c in f.old_clusters if not c.deleting))
    if f.cluster is None:
        return Want(cluster=f.record.clusters) if _may_create(f) else Want()
    return Want(delete_pods=tuple(p for p in f.heads if p.deleting_since is None and charged(f.record, p.uid, POD)))


def _may_create(f: Facts) -> bool:
    """`cluster_uid` set: that cluster existed and is gone, and must never come back under its old number."""
    return (
        f.record.clusters > 0 and f.record.cluster_uid is None and not f.suspended
        and not f.all_pods and acceptance.accepted(f).status == "True"
    )  # fmt: skip


def _finished(f: Facts) -> Want:
    condemned = f.old_clusters if kept(f) else f.observed.clusters
    return Want(
        delete_clusters=tuple(c for c in condemned if not c.deleting),
        delete_job=deadlines.passed(deadlines.time_to_live(f), f.now),
    )


def _finalizer(f: Facts) -> bool | None:
    """On from the first cluster to the end; off before that when the deletion need not wait: nothing is lost, or it
    waited enough."""
    on = FINALIZER in f.job.meta.finalizers
    if f.deleted:
        done = f.record.result or drained(f) or deadlines.passed(deadlines.final_save(f), f.now)
        return False if on and done else None
    wanted = f.job.run_policy.final_save and f.record.clusters > 0 and not f.record.result
    return wanted if wanted != on else None
