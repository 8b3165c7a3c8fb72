"""What makes a RayCluster invalid: the message of the Event, which is all that KubeRay says about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hack.cluster.kube import Object
from hack.cluster.kuberay_standin.names import MAX_NAME

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_NOT_HERE = (
    "gcsFaultToleranceOptions",
    "tlsOptions",
    "networkPolicy",
    "historyServerOptions",
    "enableInTreeAutoscaling",
    "upgradeStrategy",
)


def invalid_metadata(cluster: Object) -> str | None:
    name = cluster["metadata"]["name"]
    if len(name) > MAX_NAME:
        return f"RayCluster name should be no more than {MAX_NAME} characters"
    if not _DNS_1035.fullmatch(name):
        return f"RayCluster name should be a valid DNS1035 label: {name!r}"
    return None


def invalid_spec(cluster: Object) -> str | None:
    """The first thing that is wrong with the spec, or None."""
    return next(_spec_errors(cluster["spec"]), None)


def _spec_errors(spec: dict[str, Any]) -> Iterator[str]:
    head = spec.get("headGroupSpec") or {}
    if not _containers(head):
        yield "headGroupSpec should have at least one container"
    yield from _group_errors("Head", head)
    for group in spec.get("workerGroupSpecs") or []:
        yield from _worker_errors(group)
    for name in _NOT_HERE:
        if spec.get(name):
            yield f"this is a stand-in for KubeRay, and it does not implement spec.{name}"


def _worker_errors(group: dict[str, Any]) -> Iterator[str]:
    name, low, high = group.get("groupName"), group.get("minReplicas"), group.get("maxReplicas")
    if not _containers(group):
        yield "workerGroupSpec should have at least one container"
    if low is None or high is None:
        yield f"worker group {name} must set both minReplicas and maxReplicas when autoscaling is disabled"
        return
    if low < 0:
        yield f"worker group {name} has negative minReplicas {low}"
    if high < 0:
        yield f"worker group {name} has negative maxReplicas {high}"
    if low > high:
        yield f"worker group {name} has minReplicas {low} greater than maxReplicas {high}"
    yield from _group_errors(str(name), group)


def _group_errors(name: str, group: dict[str, Any]) -> Iterator[str]:
    params = group.get("rayStartParams") or {}
    if group.get("resources") and any(params.get(key) for key in _RESOURCES):
        words = "resource fields should not be set in both rayStartParams and Resources for"
        yield f"{words} {name} group; please use only one"
    if "labels" in params:
        words = "please use the top-level Labels field instead"
        yield f"rayStartParams['labels'] is not supported for {name} group; {words}"


def _containers(group: dict[str, Any]) -> list[Any]:
    return list(((group.get("template") or {}).get("spec") or {}).get("containers") or [])
