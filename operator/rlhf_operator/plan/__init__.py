"""plan(job, want, home) -> Plan. Pure: the objects to delete and those to create, in the order in which that
happens.
"""

from dataclasses import dataclass, replace
from typing import Any

from rlhf_api import API_VERSION, KIND
from rlhf_api.job import RLHFJob
from rlhf_operator.decide import Want
from rlhf_operator.names import JOB_LABEL
from rlhf_operator.observed import Job
from rlhf_operator.plan.access import access
from rlhf_operator.plan.claim import checkpoint_claims
from rlhf_operator.plan.network import network_policy
from rlhf_operator.plan.raycluster import raycluster
from rlhf_operator.plan.run_config import run_config

Raw = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deletion:
    """`uid` is a precondition: what has the same name and another uid stays. `grace_seconds` None is the object's
    own; 0 ends a pod that no kubelet ends any more.
    """

    kind: str
    name: str
    uid: str
    grace_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """`ensure` may exist already and is brought up to date; `create` is made once and never touched again.
    `finalizer` True puts FINALIZER on the RLHFJob, False takes it off.
    """

    namespace: str
    ensure: tuple[Raw, ...] = ()
    create: tuple[Raw, ...] = ()
    delete: tuple[Deletion, ...] = ()
    finalizer: bool | None = None


def plan(job: Job, want: Want, home: str) -> Plan:
    """`home` is the operator's namespace."""
    found = Plan(job.meta.namespace, delete=_deletions(job, want), finalizer=want.finalizer)
    if job.parsed is None or job.problems:
        return found
    metadata = owned_metadata(job.parsed)
    policy = network_policy(job.parsed, metadata, home)
    if want.cluster is None:
        return replace(found, ensure=(policy,)) if _edited(job) else found
    ensure = (run_config(job.parsed, metadata), *access(job.parsed, metadata), policy)
    create = (*checkpoint_claims(job.parsed, metadata), raycluster(job.parsed, metadata, want.cluster, job.edition))
    return replace(found, ensure=ensure, create=create)


def _deletions(job: Job, want: Want) -> tuple[Deletion, ...]:
    return (
        *(Deletion("RayCluster", c.name, c.uid) for c in want.delete_clusters),
        *(Deletion("Pod", p.name, p.uid) for p in want.delete_pods),
        *(Deletion("Pod", p.name, p.uid, grace_seconds=0) for p in want.kill_pods),
        *([Deletion(KIND, job.meta.name, job.meta.uid)] if want.delete_job else []),
    )


def _edited(job: Job) -> bool:
    """Since the last status. Who may reach the pods can change while they run; what they are made of waits for the
    next RayCluster.
    """
    return job.status.record.clusters > 0 and job.meta.generation != job.status.observed_generation


def owned_metadata(job: RLHFJob) -> Raw:
    """blockOwnerDeletion would need a right on the job's finalizers, and no deletion has to wait for another."""
    meta = job.metadata
    owner: Raw = {"apiVersion": API_VERSION, "kind": KIND, "name": meta.name, "uid": meta.uid}
    owner |= {"controller": True, "blockOwnerDeletion": False}
    return {"namespace": meta.namespace, "labels": {JOB_LABEL: meta.name}, "ownerReferences": [owner]}
