"""What a job owned goes with it. Kubernetes' garbage collector sees to that, for all of a cluster 20 objects a
second; the leader is quicker, and leaves to it whatever it cannot delete or does not live to delete.

Only what the collector would take is deleted: the job is gone, and is the one owner that the object names, or the
object is a pod of such a RayCluster. With `--cascade=orphan` the collector strikes the job from what it owns before it
lets the job go.
"""

import logging

from rlhf_operator.client import ApiError, Raw
from rlhf_operator.cluster import ClusterIO
from rlhf_operator.kinds import (
    CONFIG_MAPS,
    JOBS,
    NETWORK_POLICIES,
    PODS,
    RAYCLUSTERS,
    ROLE_BINDINGS,
    ROLES,
    SERVICE_ACCOUNTS,
    Kind,
)
from rlhf_operator.names import driver_account_name, network_policy_name, run_config_name
from rlhf_operator.plan import Deletion
from rlhf_operator.shelf import Key

log = logging.getLogger(__name__)


async def sweep(cluster: ClusterIO, key: Key) -> None:
    """Once for each job of this name that went. Never raises for an API server that will not: nothing waits for it."""
    for uid in cluster.store.take_bereft(key):
        try:
            await _sweep(cluster, key, uid)
        except ApiError as error:
            log.warning("%s: what it owned is left to the garbage collector: %s", "/".join(key), error)


async def _sweep(cluster: ClusterIO, key: Key, uid: str) -> None:
    """The store may err, and knows owners as they were: both are asked for anew, the job first."""
    namespace, job = key
    there = await cluster.api.get(JOBS, namespace, job)
    if there is not None and there["metadata"]["uid"] == uid:
        cluster.store.put(JOBS, there)
        return
    clusters = [(RAYCLUSTERS, name) for name, _ in cluster.store.owned(RAYCLUSTERS, key, (uid,))]
    went = [await _delete(cluster, namespace, kind, name, uid) for kind, name in (*clusters, *owned(job))]
    for name, pod in cluster.store.owned(PODS, key, went):
        await cluster.delete(namespace, Deletion(PODS.kind, name, pod))


async def _delete(cluster: ClusterIO, namespace: str, kind: Kind, name: str, owner: str) -> str:
    """The uid of what was deleted, empty for nothing."""
    found = await cluster.api.get(kind, namespace, name)
    if found is None or not _only_owner(found, owner):
        return ""
    uid = str(found["metadata"]["uid"])
    await cluster.delete(namespace, Deletion(kind.kind, name, uid))
    return uid


def owned(job: str) -> tuple[tuple[Kind, str], ...]:
    """What a job owns besides RayClusters, by its name; but no claim: the collector may take its time with data."""
    account = driver_account_name(job)
    return (
        (ROLE_BINDINGS, account),
        (ROLES, account),
        (SERVICE_ACCOUNTS, account),
        (CONFIG_MAPS, run_config_name(job)),
        (NETWORK_POLICIES, network_policy_name(job)),
    )


def _only_owner(found: Raw, uid: str) -> bool:
    meta = found["metadata"]
    return "deletionTimestamp" not in meta and [o["uid"] for o in meta.get("ownerReferences") or ()] == [uid]
