"""What should exist. Chosen from the record that the API server holds, never from the one that this pass is about to write:
so every action has its intent on record before it happens, and a crash between the two loses nothing.

Raising `record.clusters` or setting `record.result` condemns clusters; marking a head pod's `pod` in `record.charged` condemns
that pod. The next pass, seeing that on record, acts.
"""

from dataclasses import dataclass

from rlhf_operator.decide import acceptance, deadlines
from rlhf_operator.decide.conditions import kept
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.restarts import POD, charged
from rlhf_operator.observed import Cluster, Pod


@dataclass(frozen=True, slots=True)
class Want:
    """`cluster` is the number of the RayCluster to create, None for none: either it exists or it shall not."""

    cluster: int | None = None
    delete_clusters: tuple[Cluster, ...] = ()
    delete_pods: tuple[Pod, ...] = ()
    kill_pods: tuple[Pod, ...] = ()
    delete_job: bool = False
    finalizer: bool | None = None


def want(f: Facts) -> Want:
    if f.record.result:
        return _finished(f)
    if f.job.parsed is None:
        return Want()
    if f.old_clusters:
        return Want(delete_clusters=tuple(c for c in f.old_clusters if not c.deleting))
    if f.cluster is None:
        return Want(cluster=f.record.clusters) if _may_create(f) else Want()
    return Want(delete_pods=tuple(p for p in f.heads if p.deleting_since is None and charged(f.record, p.uid, POD)))


def _may_create(f: Facts) -> bool:
    """`cluster_uid` set: that cluster existed and is gone, and must never come back under its old number."""
    return (
        f.record.clusters > 0 and f.record.cluster_uid is None and not f.spec.suspend
        and not f.observed.pods and acceptance.accepted(f).status == "True"
    )


def _finished(f: Facts) -> Want:
    if f.job.parsed is None:
        return Want()
    return Want(
        delete_clusters=() if kept(f) else tuple(c for c in f.observed.clusters if not c.deleting),
        delete_job=deadlines.passed(deadlines.time_to_live(f), f.now),
    )
