"""The RayCluster. Created once and never applied again: `workerGroupSpecs` is an atomic list that Kueue writes to
as well.
"""

from typing import Any

from rlhf_api.job import RLHFJob
from rlhf_api.overrides import ephemeral
from rlhf_api.parse import QUEUE_LABEL
from rlhf_api.placement import PodGroup, plan_placement
from rlhf_operator.names import EDITION_ANNOTATION, EPHEMERAL_ANNOTATION, cluster_name
from rlhf_operator.plan.labels import passed_on
from rlhf_operator.plan.pods import head_start_params, head_template, worker_start_params, worker_template

Raw = dict[str, Any]
# Which Ray an image has, only the image knows. By this text KubeRay judges what it may ask of it: tokens from 2.52
# on, a node's health page from 2.53 on. So it is the least version that a worker image may have.
LEAST_RAY = "2.53.0"


def raycluster(job: RLHFJob, metadata: Raw, number: int, edition: str) -> Raw:
    name = cluster_name(job.metadata.name, number)
    queue = job.spec.queue
    labels = {**passed_on(job.metadata.labels), **metadata["labels"], **({QUEUE_LABEL: queue.name} if queue else {})}
    notes = {**passed_on(job.metadata.annotations), **_origin(job, edition)}
    spec = {
        "rayVersion": LEAST_RAY,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": head_start_params(), "template": head_template(job, name)},
        "workerGroupSpecs": [_group(job, name, group) for group in plan_placement(job.spec).groups],
    }
    # Kueue's webhook sets the same; where its integration is off, the job must wait and say so, not run outside its
    # quota.
    held = {"suspend": True} if queue else {}
    own = {**metadata, "name": name, "labels": labels, "annotations": notes}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": own, "spec": held | spec}


def _origin(job: RLHFJob, edition: str) -> dict[str, str]:
    """What of the spec decisions about these pods rest on, whatever becomes of the spec."""
    lost = str(ephemeral(job.spec)).lower()
    return {EDITION_ANNOTATION: edition, EPHEMERAL_ANNOTATION: lost}


def _group(job: RLHFJob, cluster: str, group: PodGroup) -> Raw:
    return {
        "groupName": group.name, "replicas": group.pods, "minReplicas": group.pods, "maxReplicas": group.pods,
        "rayStartParams": worker_start_params(job, group), "template": worker_template(job, cluster, group),
    }
