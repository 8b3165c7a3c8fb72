"""The head and worker pods of a RayCluster. Pure; templates are copied, never changed."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from typing import Any

from hack.cluster.kube import Object
from hack.cluster.kuberay_standin import names
from rlhf_api.quantity import parse, whole

_PROBES = {
    "livenessProbe": {"initialDelaySeconds": 30, "periodSeconds": 5, "successThreshold": 1, "failureThreshold": 120},
    "readinessProbe": {"initialDelaySeconds": 10, "periodSeconds": 5, "successThreshold": 1, "failureThreshold": 10},
}
# `ray start` flags that take "true" or "false" as a value; every other boolean is a switch.
_VALUED_BOOLEANS = ("log-color", "include-dashboard", "include-log-monitor")


def head_pod(cluster: Object) -> Object:
    group = cluster["spec"]["headGroupSpec"]
    params = dict(group.get("rayStartParams") or {})
    params.setdefault("dashboard-host", "0.0.0.0")
    return _pod(cluster, group, "head", names.HEAD_GROUP, params, address="127.0.0.1")


def worker_pod(cluster: Object, group: dict[str, Any], head_address: str) -> Object:
    """``head_address`` is the IP of the head service."""
    params = dict(group.get("rayStartParams") or {})
    params.setdefault("address", f"{head_address}:{head_port(cluster)}")
    pod = _pod(cluster, group, "worker", group["groupName"], params, address=head_address)
    spec = pod["spec"]
    spec["initContainers"] = [*(spec.get("initContainers") or []), _wait_for_head(cluster, group, head_address)]
    for container in spec["initContainers"]:
        container["env"] = [*(container.get("env") or []), *_head_address_variables(head_address)]
    return pod


def head_port(cluster: Object) -> str:
    return str((cluster["spec"]["headGroupSpec"].get("rayStartParams") or {}).get("port", names.PORTS["gcs-server"]))


def owner(cluster: Object) -> Object:
    meta = cluster["metadata"]
    reference = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": meta["name"], "uid": meta["uid"]}
    return reference | {"controller": True, "blockOwnerDeletion": True}


def _pod(
    cluster: Object, group: dict[str, Any], kind: str, group_name: str, params: dict[str, str], address: str,
) -> Object:
    template = deepcopy(group["template"])
    meta, spec = template.get("metadata") or {}, template["spec"]
    ray = spec["containers"][0]
    _complete_params(params, group, ray.get("resources") or {})
    command = f"ray start {'--head ' if kind == 'head' else ''}{_flags(params)}"
    annotations = dict(meta.get("annotations") or {})
    if (cluster["metadata"].get("annotations") or {}).get(names.OVERWRITE_COMMAND, "").lower() == "true":
        annotations[names.OVERWRITE_COMMAND] = "true"
    _set_command(ray, command, overwrite=annotations.get(names.OVERWRITE_COMMAND, "").lower() == "true")
    _set_environment(cluster, ray, kind, command, address)
    if not any(port.get("name") == "metrics" for port in ray.get("ports") or []):
        ray["ports"] = [*(ray.get("ports") or []), {"name": "metrics", "containerPort": names.PORTS["metrics"]}]
    if "plasma-directory" not in params:
        _add_shared_memory(spec, ray)
    _set_probes(ray, kind, params)
    prefix = f"{cluster['metadata']['name']}-{'head' if kind == 'head' else f'{group_name}-worker'}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{prefix[:49]}-",
            "namespace": cluster["metadata"]["namespace"],
            "labels": labels(cluster, kind, group_name, (meta.get("labels") or {}) | (group.get("labels") or {})),
            "annotations": annotations,
            "ownerReferences": [owner(cluster)],
        },
        "spec": spec,
    }


def labels(cluster: Object, kind: str, group_name: str, own: dict[str, str]) -> dict[str, str]:
    """KubeRay's labels; the template may override all but the three that select."""
    name = cluster["metadata"]["name"]
    fixed = {names.LABEL_CLUSTER: name, names.LABEL_TYPE: kind, names.LABEL_GROUP: group_name}
    defaults = {
        names.LABEL_NODE: "yes",
        names.LABEL_IDENTIFIER: f"{name}-{kind}"[-63:],
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return defaults | own | fixed


# --- ray start --------------------------------------------------------------------------------------------------


def _complete_params(params: dict[str, str], group: dict[str, Any], resources: dict[str, Any]) -> None:
    params.setdefault("metrics-export-port", str(names.PORTS["metrics"]))
    params.setdefault("dashboard-agent-listen-port", names.AGENT_PORT)
    params["block"] = "true"
    _declared_resources(params, group.get("resources") or {})
    if group.get("labels"):
        params["labels"] = ",".join(f"{key}={value}" for key, value in sorted(group["labels"].items()))
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    cpu = limits.get("cpu") or requests.get("cpu")
    if cpu and parse(cpu):
        params.setdefault("num-cpus", str(whole(cpu)))
    if limits.get("memory"):
        params.setdefault("memory", str(whole(limits["memory"])))
    for key in sorted(limits):
        if is_gpu(key) and parse(limits[key]):
            params.setdefault("num-gpus", str(whole(limits[key])))


def _declared_resources(params: dict[str, str], declared: dict[str, str]) -> None:
    """The group's own ``resources`` field, which replaces what would be derived from the container."""
    custom = {}
    for key, value in declared.items():
        if key.lower() in ("cpu", "memory"):
            params["num-cpus" if key.lower() == "cpu" else "memory"] = str(whole(value))
        elif is_gpu(key.lower()):
            params["num-gpus"] = str(whole(value))
        else:
            custom[key] = float(parse(value))
    if custom:
        params["resources"] = f"'{json.dumps(custom)}'"


def is_gpu(resource: str) -> bool:
    """Names that KubeRay takes for GPUs: ``*gpu`` and whole MIG profiles. Others (``nvidia.com/gpu.shared``) it does
    not see.
    """
    return resource.endswith("gpu") or re.search(r"nvidia\.com/mig-\d+g\.\d+gb$", resource) is not None


def _flags(params: dict[str, str]) -> str:
    flags = []
    for key in sorted(params):
        switch = str(params[key]).lower() in ("true", "false") and key not in _VALUED_BOOLEANS
        if not switch:
            flags.append(f"--{key}={params[key]}")
        elif str(params[key]).lower() == "true":
            flags.append(f"--{key}")
    return " ".join(flags)


def _set_command(ray: Object, command: str, overwrite: bool) -> None:
    own = " ".join([*(ray.get("command") or []), *(ray.get("args") or [])])
    if overwrite or "ray start" in own:
        return
    generated = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {command}"
    ray["command"] = ["/bin/bash", "-c", "--"]
    ray["args"] = [f"{own} && {generated}" if own else generated]


# --- what else the Ray container gets ---------------------------------------------------------------------------


def _set_environment(cluster: Object, ray: Object, kind: str, command: str, address: str) -> None:
    env: list[Object] = list(ray.get("env") or [])
    given = {variable["name"] for variable in env}
    if kind == "worker":
        env += _head_address_variables(address)
    env += [
        _from_field("RAY_CLUSTER_NAME", f"metadata.labels['{names.LABEL_CLUSTER}']"),
        _from_field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        _from_field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _from_field("RAY_NODE_TYPE_NAME", f"metadata.labels['{names.LABEL_GROUP}']"),
        {"name": "KUBERAY_GEN_RAY_START_CMD", "value": command},
    ]
    defaults = {
        "RAY_PORT": head_port(cluster),
        "RAY_ADDRESS": f"{address}:{head_port(cluster)}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    env += [{"name": name, "value": value} for name, value in defaults.items() if name not in given]
    ray["env"] = env + [variable for variable in token_variables(cluster) if variable["name"] not in given]


def _head_address_variables(address: str) -> list[Object]:
    return [{"name": "FQ_RAY_IP", "value": address}, {"name": "RAY_IP", "value": address}]


def _from_field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def token_variables(cluster: Object) -> list[Object]:
    """Ray's token authentication, if ``authOptions.mode`` is ``token``; an empty mode makes the Secret and no
    variables.
    """
    options = cluster["spec"].get("authOptions") or {}
    if options.get("mode") != "token":
        return []
    secret = options.get("secretName") or cluster["metadata"]["name"]
    reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference}]


def _add_shared_memory(spec: Object, ray: Object) -> None:
    """/dev/shm of the container's memory size for the object store, unless the template mounts something there."""
    mounts = ray.get("volumeMounts") or []
    if any(mount["mountPath"] == "/dev/shm" for mount in mounts):
        return
    if not any(volume["name"] == "shared-mem" for volume in spec.get("volumes") or []):
        resources = ray.get("resources") or {}
        size = (resources.get("limits") or {}).get("memory") or (resources.get("requests") or {}).get("memory")
        directory = {"medium": "Memory"} | ({"sizeLimit": size} if size else {})
        spec["volumes"] = [*(spec.get("volumes") or []), {"name": "shared-mem", "emptyDir": directory}]
    ray["volumeMounts"] = [*mounts, {"name": "shared-mem", "mountPath": "/dev/shm"}]


def _set_probes(ray: Object, kind: str, params: dict[str, str]) -> None:
    """The dashboard agent's health page, which Ray has since 2.53 and which covers raylet and GCS."""
    action = {"path": "/api/healthz", "port": int(params["dashboard-agent-listen-port"])}
    for probe, timing in _PROBES.items():
        ray.setdefault(probe, {"httpGet": action, "timeoutSeconds": 5 if kind == "head" else 2, **timing})


def _wait_for_head(cluster: Object, group: dict[str, Any], address: str) -> Object:
    """The init container that holds a worker back until the head's GCS answers."""
    ray = deepcopy(group["template"]["spec"]["containers"][0])
    target = f"{address}:{head_port(cluster)}"
    # KubeRay runs `ray health-check` here, which costs seconds of this container's 0.2 CPU to say what the open port
    # says.
    script = (f'trap "exit 143" TERM; until (exec 3<>"/dev/tcp/{target.replace(":", "/")}") 2>/dev/null; do sleep 0.5; '
        'done')
    quantity = {"cpu": "200m", "memory": "256Mi"}
    container = {
        "name": "wait-gcs-ready",
        "image": ray["image"],
        "command": ["/bin/bash", "-c", "--"],
        "args": [script],
        "env": [*(ray.get("env") or []), *token_variables(cluster)],
        "volumeMounts": ray.get("volumeMounts") or [],
        "resources": {"limits": quantity, "requests": quantity},
    }
    return container | {key: ray[key] for key in ("imagePullPolicy", "securityContext") if key in ray}
