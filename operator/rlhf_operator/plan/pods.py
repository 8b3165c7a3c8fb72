"""Pod templates of the head and the workers, with the user's overrides merged in. Pure.

Facts that shape them: Ray's container must come first; the driver finds Ray through the shared process namespace
and /tmp/ray; a mount at /dev/shm stops KubeRay from adding its own; KubeRay sets no token in a container it does
not know, so the token stands in every container explicitly; the container that KubeRay puts before Ray's has its
security context and environment, and resources of its own.
"""

import json
from typing import Any

from rlhf_api.job import PodOverrides, RLHFJob
from rlhf_api.overrides import holds_path
from rlhf_api.placement import PodGroup
from rlhf_api.progress import DRIVER_PORT, RUN_CONFIG_PATH
from rlhf_api.quantity import parse
from rlhf_operator.merge import deep_merge, merge_named
from rlhf_operator.names import (
    DRIVER_CONTAINER,
    HEAD,
    JOB_LABEL,
    RAY_CONTAINER,
    ROLE_LABEL,
    TRAINER,
    claim_name,
    driver_account_name,
    run_config_name,
)
from rlhf_operator.plan.labels import passed_on, pod_labels
from rlhf_operator.plan.security import container_context, pod_context
from rlhf_operator.plan.stopping import GRACE_SECONDS, HEAD_PRE_STOP, worker_pre_stop

Raw = dict[str, Any]
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "driver": DRIVER_PORT}
HEAD_REQUESTS = {"cpu": "500m", "memory": "1Gi"}
DRIVER_REQUESTS = {"cpu": "100m", "memory": "512Mi"}
CPUS_PER_GPU = 4
METRICS_PORT = "run-metrics"
# A GCS keeps nothing: when it died, every raylet has to start anew with the next one. Ray finds that out when none
# answered for gcs_rpc_server_reconnect_timeout_s; or, when the next one is up by then, by asking it: once in 60 s,
# unless told otherwise.
GCS_SETTINGS = {"gcs_rpc_server_reconnect_timeout_s": 15, "raylet_liveness_self_check_interval_ms": 1000}


def head_template(job: RLHFJob, cluster: str) -> Raw:
    user = job.spec.pods.head
    shared = [_mount("rlhf-ray", "/tmp/ray"), _mount("rlhf-shm", "/dev/shm")]
    ray = _ray_container(job, cluster, user, HEAD_PRE_STOP) | {
        "ports": [{"name": name, "containerPort": port} for name, port in HEAD_PORTS.items()],
        "resources": _resources(HEAD_REQUESTS, user.resources),
        "volumeMounts": merge_named(shared, user.volume_mounts, "mountPath"),
    }
    spec = {
        "restartPolicy": "OnFailure",
        "shareProcessNamespace": True,
        "serviceAccountName": driver_account_name(job.metadata.name),
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [ray, _driver(job, cluster, user, shared)],
        "volumes": merge_named(_head_volumes(job), user.volumes, "name"),
    }
    return _template(job, HEAD, user, spec)


def worker_template(job: RLHFJob, cluster: str, group: PodGroup) -> Raw:
    user = overrides_of(job, group)
    gpus = {job.spec.placement.resource_name: str(group.gpus_per_pod)}
    volumes, mounts = _checkpoint_volume(job, group, user)
    grace = (user.model_extra or {}).get("terminationGracePeriodSeconds", GRACE_SECONDS)
    ray = _ray_container(job, cluster, user, worker_pre_stop(group.name, grace)) | {
        "resources": deep_merge(user.resources, {"requests": gpus, "limits": gpus}),
        "volumeMounts": merge_named(mounts, user.volume_mounts, "mountPath"), **_metrics_port(job, group),
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [ray],
        "volumes": merge_named(volumes, user.volumes, "name"),
    }
    return _template(job, group.name, user, spec)


def overrides_of(job: RLHFJob, group: PodGroup) -> PodOverrides:
    return job.spec.pods.trainer if group.name == "trainer" else job.spec.pods.rollout


def head_start_params() -> dict[str, str]:
    """No GPU and no CPU of Ray's: nothing is placed on the head unless it asks for nothing."""
    return {"num-gpus": "0", "num-cpus": "0", "dashboard-host": "0.0.0.0"}


def worker_start_params(job: RLHFJob, group: PodGroup) -> dict[str, str]:
    """KubeRay pastes the value of `resources` into a shell command: the quotes are part of it. Where the pod's CPUs
    are not told, Ray gets a number for the actors that ask for one.
    """
    cores = _cores(overrides_of(job, group).resources) or CPUS_PER_GPU * group.gpus_per_pod
    resources = json.dumps({group.ray_resource: group.gpus_per_pod})
    return {"num-gpus": str(group.gpus_per_pod), "num-cpus": str(cores), "resources": f"'{resources}'"}


def _template(job: RLHFJob, role: str, user: PodOverrides, spec: Raw) -> Raw:
    """Unknown override fields go into the PodSpec; what stands there already as a mapping is merged, else replaced."""
    meta = job.metadata
    labels = {**pod_labels(meta.labels), **user.labels, JOB_LABEL: meta.name, ROLE_LABEL: role}
    annotations = {**passed_on(meta.annotations), **user.annotations}
    metadata = {"labels": labels, **({"annotations": annotations} if annotations else {})}
    restricted = {"securityContext": pod_context(), **spec}
    return {"metadata": metadata, "spec": deep_merge(restricted, user.model_extra or {})}


def _ray_container(job: RLHFJob, cluster: str, user: PodOverrides, pre_stop: str) -> Raw:
    ours = [_from_field("RLHF_POD_NAME", "metadata.name"), *_token(cluster), *_gcs()]
    hook = {"preStop": {"exec": {"command": ["bash", "-c", pre_stop]}}}
    return _container(job, RAY_CONTAINER, ours, user) | {"lifecycle": hook}


def _driver(job: RLHFJob, cluster: str, user: PodOverrides, shared: list[Raw]) -> Raw:
    meta = job.metadata
    ours = [
        _env("RLHF_JOB_NAME", meta.name), _env("RLHF_JOB_NAMESPACE", meta.namespace),
        _from_field("RLHF_POD_UID", "metadata.uid"), _env("PYTHONUNBUFFERED", "1"), *_token(cluster), *_gcs(),
    ]
    mounts = [*shared, _mount("rlhf-run", str(RUN_CONFIG_PATH).rpartition("/")[0]) | {"readOnly": True}]
    return _container(job, DRIVER_CONTAINER, ours, user) | {
        "command": ["python", "-m", "rlhf_worker", "run", RUN_CONFIG_PATH],
        "resources": _resources(DRIVER_REQUESTS, job.spec.pods.driver.resources),
        "volumeMounts": merge_named(mounts, user.volume_mounts, "mountPath"),
    }


def _container(job: RLHFJob, name: str, ours: list[Raw], user: PodOverrides) -> Raw:
    base = {
        "name": name,
        "image": job.spec.image,
        "imagePullPolicy": job.spec.image_pull_policy,
        "securityContext": container_context(user),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": merge_named(ours, user.env, "name"),
    }
    return base | ({"envFrom": user.env_from} if user.env_from else {})


def _resources(requests: dict[str, str], user: Raw) -> Raw:
    """Where the user limits what he does not request, Kubernetes requests the limit."""
    unset = {name: amount for name, amount in requests.items() if name not in user.get("limits", {})}
    return deep_merge({"requests": unset}, user)


def _head_volumes(job: RLHFJob) -> list[Raw]:
    return [
        {"name": "rlhf-ray", "emptyDir": {}},
        {"name": "rlhf-shm", "emptyDir": {"medium": "Memory"}},
        {"name": "rlhf-run", "configMap": {"name": run_config_name(job.metadata.name)}},
    ]


def _checkpoint_volume(job: RLHFJob, group: PodGroup, user: PodOverrides) -> tuple[list[Raw], list[Raw]]:
    """The claim's; or, where the user mounts nothing at checkpoint.path, the one trainer pod saves into itself."""
    path, claim = job.spec.checkpoint.directory, job.spec.checkpoint.claim
    if path is None or group.name != TRAINER or (claim is None and holds_path(user.volume_mounts, path)):
        return [], []
    source = {"persistentVolumeClaim": {"claimName": claim_name(job.metadata.name)}} if claim else {"emptyDir": {}}
    return [{"name": "rlhf-checkpoints", **source}], [_mount("rlhf-checkpoints", path)]


def _metrics_port(job: RLHFJob, group: PodGroup) -> Raw:
    """Named, so that a PodMonitor finds it. The feed serves it, in the first of the trainer's pods."""
    port = job.spec.telemetry.prometheus_port
    return {"ports": [{"name": METRICS_PORT, "containerPort": port}]} if port and group.name == TRAINER else {}


def _cores(resources: Raw) -> int | None:
    """The limit, else the request, in whole cores: at least one."""
    asked = resources.get("limits", {}).get("cpu") or resources.get("requests", {}).get("cpu")
    return None if asked is None else max(1, int(parse(asked)))


def _token(cluster: str) -> list[Raw]:
    """KubeRay keeps the token in a Secret that has the RayCluster's name."""
    secret = {"secretKeyRef": {"name": cluster, "key": "auth_token"}}
    return [_env("RAY_AUTH_MODE", "token"), {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]


def _gcs() -> list[Raw]:
    return [_env(f"RAY_{name}", str(value)) for name, value in GCS_SETTINGS.items()]


def _env(name: str, value: str) -> Raw:
    return {"name": name, "value": value}


def _from_field(name: str, path: str) -> Raw:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _mount(name: str, path: str) -> Raw:
    return {"name": name, "mountPath": path}
