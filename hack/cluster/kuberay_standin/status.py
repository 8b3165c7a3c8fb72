"""The status of a RayCluster, with KubeRay's own stickiness. Pure: the time is an argument."""

from __future__ import annotations

from copy import deepcopy
from decimal import Decimal
from typing import Any

from hack.cluster.kube import Object
from hack.cluster.kuberay_standin import names, quantities
from hack.cluster.kuberay_standin.pods import is_gpu
from rlhf_api.quantity import parse

# KubeRay writes the status only if one of these changed; observedGeneration and times are not among them.
_SIGNIFICANT = (
    *("state", "reason", "endpoints", "head", "conditions"),
    *(f"{kind}WorkerReplicas" for kind in ("ready", "available", "desired", "min", "max")),
)
_LARGEST = 2**31 - 1


class ReconcileFailure(Exception):
    """Pods could not be made or deleted: ``reason`` is that of the ReplicaFailure condition, "" if it has none."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def changed(old: Object, new: Object) -> bool:
    return any(old.get(key) != new.get(key) for key in _SIGNIFICANT)


def compute(
    cluster: Object, pods: list[Object], service: Object | None, failure: ReconcileFailure | None, now: str,
) -> Object:
    """The next status. ``pods`` are all pods of the cluster; ``failure`` is how the reconciliation ended."""
    old = cluster.get("status") or {}
    status = deepcopy(old)
    head = next((pod for pod in pods if pod["metadata"]["labels"][names.LABEL_TYPE] == "head"), None)
    status["observedGeneration"] = cluster["metadata"]["generation"]
    status |= _counts(cluster, pods) | _resources(cluster)
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    _replica_failure(conditions, failure, now)
    if failure is None and len(pods) == status["desiredWorkerReplicas"] + 1 and all_running(pods):
        status["state"] = "ready"
    _set(conditions, head_condition(head), now)
    _provisioned(conditions, pods, now)
    _suspension(conditions, cluster["spec"].get("suspend"), pods, now)
    if cluster["spec"].get("suspend") and not pods:
        status["state"] = "suspended"
    status["conditions"] = list(conditions.values())
    status["head"] = _head(head, service)
    status["endpoints"] = _endpoints(service) or old.get("endpoints") or {}
    status["lastUpdateTime"] = now
    if status.get("state") != old.get("state"):
        status["stateTransitionTimes"] = (old.get("stateTransitionTimes") or {}) | {status["state"]: now}
    return status


# --- conditions -------------------------------------------------------------------------------------------------


def is_true(cluster: Object, kind: str) -> bool:
    conditions = (cluster.get("status") or {}).get("conditions") or []
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


def _set(conditions: dict[str, Object], new: Object, now: str) -> None:
    old = conditions.get(new["type"])
    time = old["lastTransitionTime"] if old and old["status"] == new["status"] else now
    conditions[new["type"]] = {"message": "", **new, "lastTransitionTime": time}


def _condition(kind: str, true: bool, reason: str, message: str = "") -> Object:
    return {"type": kind, "status": "True" if true else "False", "reason": reason, "message": message}


def _replica_failure(conditions: dict[str, Object], failure: ReconcileFailure | None, now: str) -> None:
    if failure is None:
        conditions.pop(names.REPLICA_FAILURE, None)
    elif failure.reason:
        _set(conditions, _condition(names.REPLICA_FAILURE, True, failure.reason, f"{failure.reason}\n{failure}"), now)


def _provisioned(conditions: dict[str, Object], pods: list[Object], now: str) -> None:
    """True once all pods that exist are ready, however few, and from then on until a suspension."""
    if _true(conditions, names.PROVISIONED) or _true(conditions, names.SUSPENDED):
        return
    if all_running(pods):
        new = _condition(names.PROVISIONED, True, "AllPodRunningAndReadyFirstTime", "All Ray Pods are ready for the "
            "first time")
    else:
        message = "RayCluster Pods are being provisioned for first time"
        new = _condition(names.PROVISIONED, False, "RayClusterPodsProvisioning", message)
    _set(conditions, new, now)


def _suspension(conditions: dict[str, Object], suspend: bool | None, pods: list[Object], now: str) -> None:
    if _true(conditions, names.SUSPENDING):
        if not pods:
            _set(conditions, _condition(names.PROVISIONED, False, "RayClusterPodsProvisioning", "RayCluster has been "
                "suspended"), now)
            _set(conditions, _condition(names.SUSPENDING, False, names.SUSPENDING), now)
            _set(conditions, _condition(names.SUSPENDED, True, names.SUSPENDED), now)
    elif _true(conditions, names.SUSPENDED):
        if suspend is False:  # an absent field does not resume
            _set(conditions, _condition(names.SUSPENDED, False, names.SUSPENDED), now)
    else:
        _set(conditions, _condition(names.SUSPENDED, False, names.SUSPENDED), now)
        _set(conditions, _condition(names.SUSPENDING, bool(suspend), names.SUSPENDING), now)


def _true(conditions: dict[str, Object], kind: str) -> bool:
    return kind in conditions and conditions[kind]["status"] == "True"


def head_condition(head: Object | None) -> Object:
    """HeadPodReady: the pod's Ready condition, with the first waiting or ended container's reason where that says more.
    """
    if head is None:
        return _condition(names.HEAD_READY, False, "HeadPodNotFound", "Head Pod not found")
    ready = next((c for c in head["status"].get("conditions") or [] if c["type"] == "Ready"), None)
    if ready is None:
        return _condition(names.HEAD_READY, False, "Unknown")
    reason = ready.get("reason") or ("HeadPodRunningAndReady" if ready["status"] == "True" else "Unknown")
    message = ready.get("message", "")
    told = _first_not_running(head) if reason == "ContainersNotReady" else None
    if told:
        reason, message = told[0], f"{message}; {told[1]}" if message else told[1]
    return {"type": names.HEAD_READY, "status": ready["status"], "reason": reason, "message": message}


def _first_not_running(pod: Object) -> tuple[str, str] | None:
    for container in pod["status"].get("containerStatuses") or []:
        state = container.get("state") or {}
        told = state.get("waiting") or state.get("terminated")
        if told:
            return told.get("reason") or "Unknown", f"{container['name']}: {told.get('message', '')}"
    return None


# --- counts and places ------------------------------------------------------------------------------------------


def desired_replicas(group: dict[str, Any]) -> int:
    if group.get("suspend"):
        return 0
    low = group.get("minReplicas") or 0
    high = group["maxReplicas"] if group.get("maxReplicas") is not None else _LARGEST
    return int(min(max(group.get("replicas") or 0, low), high)) * _hosts(group)


def _hosts(group: dict[str, Any]) -> int:
    return max(1, int(group.get("numOfHosts") or 1))


def all_running(pods: list[Object]) -> bool:
    return bool(pods) and all(pod["status"].get("phase") == "Running" and _ready(pod) is not False for pod in pods)


def _ready(pod: Object) -> bool | None:
    return next((c["status"] == "True" for c in pod["status"].get("conditions") or [] if c["type"] == "Ready"), None)


def _counts(cluster: Object, pods: list[Object]) -> Object:
    groups = cluster["spec"].get("workerGroupSpecs") or []
    workers = [pod for pod in pods if pod["metadata"]["labels"][names.LABEL_TYPE] == "worker"]
    running = [pod for pod in workers if pod["status"].get("phase") == "Running"]
    active = [group for group in groups if not group.get("suspend")]
    return {
        "readyWorkerReplicas": sum(_ready(pod) is True for pod in running),
        "availableWorkerReplicas": len(running),
        "desiredWorkerReplicas": sum(map(desired_replicas, groups)),
        "minWorkerReplicas": sum((group.get("minReplicas") or 0) * _hosts(group) for group in active),
        "maxWorkerReplicas": min(_LARGEST, sum((group.get("maxReplicas") or 0) * _hosts(group) for group in active)),
    }


def _resources(cluster: Object) -> Object:
    """Sums over head and desired workers of what their containers request (or, failing that, are limited to)."""
    spec = cluster["spec"]
    templates = [(1, spec["headGroupSpec"])] + [
        (desired_replicas(group), group) for group in spec.get("workerGroupSpecs") or []
    ]
    sums: dict[str, Decimal] = {"cpu": Decimal(0), "memory": Decimal(0), "gpu": Decimal(0)}
    for count, group in templates:
        for container in group["template"]["spec"]["containers"]:
            resources = container.get("resources") or {}
            for name, quantity in ((resources.get("limits") or {}) | (resources.get("requests") or {})).items():
                key = "gpu" if is_gpu(name) else name
                if key in sums:
                    sums[key] += count * parse(quantity)
    total = {key: quantities.text(value) for key, value in sums.items()}
    return {"desiredCPU": total["cpu"], "desiredMemory": total["memory"], "desiredGPU": total["gpu"], "desiredTPU": "0"}


def _head(head: Object | None, service: Object | None) -> Object:
    found = {}
    if head is not None:
        found = {"podIP": head["status"].get("podIP"), "podName": head["metadata"]["name"]}
    if service is not None:
        found |= {"serviceIP": service["spec"].get("clusterIP"), "serviceName": service["metadata"]["name"]}
    return {key: value for key, value in found.items() if value}


def _endpoints(service: Object | None) -> dict[str, str]:
    ports = service["spec"]["ports"] if service else []
    return {
        port["name"]: str(port.get("nodePort") or port.get("targetPort") or port["port"]) for port in ports
        if port.get("name")
    }
