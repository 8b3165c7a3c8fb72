"""plan(job, want) -> Plan. Pure: the objects to create and those to delete, in the order in which that happens."""

from dataclasses import dataclass
from typing import Any

from rlhf_api import API_VERSION, KIND
from rlhf_api.job import RLHFJob
from rlhf_operator.decide import Want
from rlhf_operator.names import JOB_LABEL
from rlhf_operator.observed import Job
from rlhf_operator.plan.access import access
from rlhf_operator.plan.raycluster import raycluster
from rlhf_operator.plan.run_config import run_config

Raw = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deletion:
    """`uid` is a precondition: what has the same name and another uid stays."""

    kind: str
    name: str
    uid: str
    grace_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """`ensure` may exist already and is brought up to date; `create` may not exist."""

    namespace: str
    ensure: tuple[Raw, ...] = ()
    create: tuple[Raw, ...] = ()
    delete: tuple[Deletion, ...] = ()
    finalizer: bool | None = None


def plan(job: Job, want: Want, home: str) -> Plan:
    delete = (
        *(Deletion("RayCluster", c.name, c.uid) for c in want.delete_clusters),
        *(Deletion("Pod", p.name, p.uid) for p in want.delete_pods),
        *(Deletion("Pod", p.name, p.uid, grace_seconds=0) for p in want.kill_pods),
        *([Deletion(KIND, job.meta.name, job.meta.uid)] if want.delete_job else []),
    )
    if want.cluster is None or job.parsed is None:
        return Plan(job.meta.namespace, delete=delete, finalizer=want.finalizer)
    metadata = owned_metadata(job.parsed)
    ensure = (run_config(job.parsed, metadata), *access(job.parsed, metadata))
    return Plan(job.meta.namespace, ensure, (raycluster(job.parsed, metadata, want.cluster),), delete, want.finalizer)


def owned_metadata(job: RLHFJob) -> Raw:
    """blockOwnerDeletion would need a right on the job's finalizers, and no deletion has to wait for another."""
    meta = job.metadata
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": meta.name, "uid": meta.uid, "controller": True, "blockOwnerDeletion": False}
    return {"namespace": meta.namespace, "labels": {JOB_LABEL: meta.name}, "ownerReferences": [owner]}
