"""Pod templates of the head and the workers, with the user's overrides merged in. Pure.

Facts that shape them: Ray's container must come first; the driver finds Ray through the shared process namespace and /tmp/ray;
a mount at /dev/shm stops KubeRay from adding its own; KubeRay sets no token in a container it does not know, so the token
stands in every container explicitly.
"""

import json
from typing import Any

from rlhf_api.job import PodOverrides, RLHFJob
from rlhf_api.overrides import holds_path
from rlhf_api.placement import PodGroup
from rlhf_api.progress import RUN_CONFIG_PATH
from rlhf_operator.names import DRIVER_CONTAINER, HEAD, JOB_LABEL, RAY_CONTAINER, ROLE_LABEL, driver_account_name, run_config_name
from rlhf_operator.plan.merge import deep_merge, merge_named

Raw = dict[str, Any]
# How long Ray's processes and the driver wait for a lost GCS. Ray's own 60 s would be most of the time that a lost head costs.
GCS_RECONNECT_SECONDS = 10
GRACE_SECONDS = 120
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
HEAD_REQUESTS = {"cpu": "500m", "memory": "1Gi"}
DRIVER_REQUESTS = {"cpu": "100m", "memory": "512Mi"}
CPUS_PER_GPU = 4
# Ray outlives the driver's save: in the head while the driver runs, in a worker while the head's GCS answers.
HEAD_PRE_STOP = "while grep -qs 'rlhf[_]worker' /proc/[0-9]*/cmdline; do sleep 0.2; done"
WORKER_PRE_STOP = 'while (exec 3<>"/dev/tcp/$FQ_RAY_IP/$RAY_PORT") 2>/dev/null; do sleep 0.5; done'


def head_template(job: RLHFJob, cluster: str) -> Raw:
    user = job.spec.pods.head
    shared = [_mount("rlhf-ray", "/tmp/ray"), _mount("rlhf-shm", "/dev/shm")]
    ray = _ray_container(job, cluster, user, HEAD_PRE_STOP) | {
        "ports": [{"name": name, "containerPort": port} for name, port in HEAD_PORTS.items()],
        "resources": deep_merge({"requests": HEAD_REQUESTS}, user.resources),
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
    ray = _ray_container(job, cluster, user, WORKER_PRE_STOP) | {
        "resources": deep_merge(user.resources, {"requests": gpus, "limits": gpus}),
        "volumeMounts": merge_named(mounts, user.volume_mounts, "mountPath"),
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
    """KubeRay pastes the value of `resources` into a shell command: the quotes are part of it."""
    resources = json.dumps({group.ray_resource: group.gpus_per_pod})
    return {"num-gpus": str(group.gpus_per_pod), "num-cpus": str(_cpus(overrides_of(job, group), group)), "resources": f"'{resources}'"}


def _template(job: RLHFJob, role: str, user: PodOverrides, spec: Raw) -> Raw:
    """Unknown override fields go into the PodSpec; what stands there already as a mapping is merged, else replaced."""
    labels = {**user.labels, JOB_LABEL: job.metadata.name, ROLE_LABEL: role}
    metadata = {"labels": labels, **({"annotations": user.annotations} if user.annotations else {})}
    return {"metadata": metadata, "spec": deep_merge(spec, user.model_extra or {})}


def _ray_container(job: RLHFJob, cluster: str, user: PodOverrides, pre_stop: str) -> Raw:
    ours = [*_token(cluster), *_reconnect()]
    return _container(job, RAY_CONTAINER, ours, user) | {"lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", pre_stop]}}}}


def _driver(job: RLHFJob, cluster: str, user: PodOverrides, shared: list[Raw]) -> Raw:
    meta = job.metadata
    ours = [
        _env("RLHF_JOB_NAME", meta.name), _env("RLHF_JOB_NAMESPACE", meta.namespace), _env("PYTHONUNBUFFERED", "1"),
        *_token(cluster), *_reconnect(),
    ]
    mounts = [*shared, _mount("rlhf-run", str(RUN_CONFIG_PATH).rpartition("/")[0]) | {"readOnly": True}]
    return _container(job, DRIVER_CONTAINER, ours, user) | {
        "command": ["python", "-m", "rlhf_worker", "run", RUN_CONFIG_PATH],
        "resources": {"requests": DRIVER_REQUESTS},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": merge_named(mounts, user.volume_mounts, "mountPath"),
    }


def _container(job: RLHFJob, name: str, ours: list[Raw], user: PodOverrides) -> Raw:
    base = {"name": name, "image": job.spec.image, "imagePullPolicy": job.spec.image_pull_policy, "env": merge_named(ours, user.env, "name")}
    return base | ({"envFrom": user.env_from} if user.env_from else {})


def _head_volumes(job: RLHFJob) -> list[Raw]:
    return [
        {"name": "rlhf-ray", "emptyDir": {}},
        {"name": "rlhf-shm", "emptyDir": {"medium": "Memory"}},
        {"name": "rlhf-run", "configMap": {"name": run_config_name(job.metadata.name)}},
    ]


def _checkpoint_volume(job: RLHFJob, group: PodGroup, user: PodOverrides) -> tuple[list[Raw], list[Raw]]:
    """Where the user mounts nothing at checkpoint.path the one trainer pod saves into itself."""
    path = job.spec.checkpoint.directory
    if path is None or group.name != "trainer" or holds_path(user.volume_mounts, path):
        return [], []
    return [{"name": "rlhf-checkpoints", "emptyDir": {}}], [_mount("rlhf-checkpoints", path)]


def _cpus(user: PodOverrides, group: PodGroup) -> int:
    """Ray's logical CPUs: what the pod is given, in whole cores, else a number for the actors that ask for one."""
    asked = (user.resources.get("limits") or {}).get("cpu") or (user.resources.get("requests") or {}).get("cpu")
    if asked is None:
        return CPUS_PER_GPU * group.gpus_per_pod
    text = str(asked)
    return max(1, int(float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)))


def _token(cluster: str) -> list[Raw]:
    """KubeRay keeps the token in a Secret that has the RayCluster's name."""
    secret = {"secretKeyRef": {"name": cluster, "key": "auth_token"}}
    return [_env("RAY_AUTH_MODE", "token"), {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]


def _reconnect() -> list[Raw]:
    return [_env("RAY_gcs_rpc_server_reconnect_timeout_s", str(GCS_RECONNECT_SECONDS))]


def _env(name: str, value: str) -> Raw:
    return {"name": name, "value": value}


def _mount(name: str, path: str) -> Raw:
    return {"name": name, "mountPath": path}
