"""The RayCluster. Created once and never applied again: `workerGroupSpecs` is an atomic list that Kueue writes to as well."""

from typing import Any

from rlhf_api.job import RLHFJob
from rlhf_api.placement import PodGroup, plan_placement
from rlhf_operator.names import QUEUE_LABEL, cluster_name
from rlhf_operator.plan.pods import head_start_params, head_template, worker_start_params, worker_template

Raw = dict[str, Any]
# KubeRay takes authOptions.mode=token from 2.52 on and judges by this text; the image has this version of Ray.
RAY_VERSION = "2.60.0"


def raycluster(job: RLHFJob, metadata: Raw, number: int) -> Raw:
    name = cluster_name(job.metadata.name, number)
    queue = job.spec.queue
    labels = {**metadata["labels"], **({QUEUE_LABEL: queue.name} if queue else {})}
    spec = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": head_start_params(), "template": head_template(job, name)},
        "workerGroupSpecs": [_group(job, name, group) for group in plan_placement(job.spec).groups],
    }
    # Kueue's webhook sets the same; where its integration is off, the job must wait and say so, not run outside its quota.
    held = {"suspend": True} if queue else {}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {**metadata, "name": name, "labels": labels}, "spec": held | spec}


def _group(job: RLHFJob, cluster: str, group: PodGroup) -> Raw:
    return {
        "groupName": group.name, "replicas": group.pods, "minReplicas": group.pods, "maxReplicas": group.pods,
        "rayStartParams": worker_start_params(job, group), "template": worker_template(job, cluster, group),
    }
