"""What `spec.pods` and `spec.networkPolicy` may not say, because Kubernetes would refuse the pods or the run would
break by it. Each problem names the field and the fix.
"""

from collections.abc import Iterator
from ipaddress import ip_network
from itertools import chain
from typing import Any

from rlhf_api import kubernetes
from rlhf_api.job import PlacementMode, PodOverrides, PodsSpec, RLHFJobSpec
from rlhf_api.kubernetes import misfits
from rlhf_api.placement import plan_placement
from rlhf_api.pods import HEAD, HEAD_MOUNTS, normal, pod_misfits, pod_problems, rest_of
from rlhf_api.resources import resource_problems

Raw = dict[str, Any]
# Volumes that are made with the pod and go with it, or that nothing can be saved on.
MORTAL_SOURCES = ("emptyDir", "ephemeral", "configMap", "secret", "projected", "downwardAPI", "gitRepo", "image")


def override_problems(spec: RLHFJobSpec) -> tuple[str, ...]:
    """Shapes first: what has the wrong one is not looked at further."""
    peers = kubernetes.items(kubernetes.NETWORK_PEER)
    strange = misfits(peers, spec.network_policy.allow_from, "spec.networkPolicy.allowFrom")
    if wrong := (*pods_misfits(spec.pods), *strange):
        return wrong
    found = pods_problems(spec.pods)
    whole = chain.from_iterable(
        check(spec) for check in (_resources, _host_network, _peers, _no_rollout_pods, _checkpoint, _claim, _final_save)
    )
    return (*found, *whole)


def pods_misfits(pods: PodsSpec) -> tuple[str, ...]:
    """Values of a wrong type, in each kind of pod."""
    found = [misfit for kind, own in _kinds(pods) for misfit in pod_misfits(kind, own)]
    return (*found, *misfits(kubernetes.RESOURCES, pods.driver.resources, "spec.pods.driver.resources"))


def pods_problems(pods: PodsSpec) -> tuple[str, ...]:
    """Of each kind of pod by itself. Of pods without misfits."""
    return tuple(problem for kind, own in _kinds(pods) for problem in pod_problems(kind, own))


def _kinds(pods: PodsSpec) -> tuple[tuple[str, PodOverrides], ...]:
    return (HEAD, pods.head), ("trainer", pods.trainer), ("rollout", pods.rollout)


def _resources(spec: RLHFJobSpec) -> Iterator[str]:
    gpu = spec.placement.resource_name
    for kind, given in (
        *((kind, pods.resources) for kind, pods in _kinds(spec.pods)),
        ("driver", spec.pods.driver.resources),
    ):
        if any(gpu in given.get(side, {}) for side in ("requests", "limits")):
            words = "GPUs follow from the gpus of spec.trainer and other roles, and from spec.rollout"
            yield f"spec.pods.{kind}.resources: remove {gpu}: {words}"
        yield from resource_problems(given, f"spec.pods.{kind}.resources")
    for kind, pods in _kinds(spec.pods):
        for index, container in enumerate(rest_of(pods).get("initContainers", [])):
            yield from resource_problems(
                container.get("resources", {}), f"spec.pods.{kind}.initContainers[{index}].resources"
            )


def _host_network(spec: RLHFJobSpec) -> Iterator[str]:
    """Some networks of RDMA need it. Then two pods with Ray's ports cannot share a node, and a NetworkPolicy does not
    see them.
    """
    for kind, pods in _kinds(spec.pods):
        if kind == HEAD or not rest_of(pods).get("hostNetwork"):
            continue
        if spec.network_policy.enabled:
            yield (
                f"spec.pods.{kind}.hostNetwork: no NetworkPolicy guards the node's own ports: "
                "set spec.networkPolicy.enabled to false to say so, or remove it"
            )
        if rest_of(pods).get("dnsPolicy") != "ClusterFirstWithHostNet":
            words = "hostNetwork asks the node's DNS, which does not know the head: set ClusterFirstWithHostNet"
            yield f"spec.pods.{kind}.dnsPolicy: {words}"


def _peers(spec: RLHFJobSpec) -> Iterator[str]:
    for index, peer in enumerate(spec.network_policy.allow_from):
        where, block = f"spec.networkPolicy.allowFrom[{index}]", peer.get("ipBlock")
        if not peer or (block is not None and len(peer) > 1):
            yield f"{where}: needs podSelector, namespaceSelector or both, or ipBlock alone"
        if block is not None:
            yield from (
                f"{where}.ipBlock: {cidr!r} is no CIDR such as 10.0.0.0/8"
                for cidr in (block["cidr"], *block.get("except", []))
                if not _is_cidr(cidr)
            )
        for name in ("podSelector", "namespaceSelector"):
            for expression in peer.get(name, {}).get("matchExpressions", []):
                if (expression["operator"] in ("In", "NotIn")) != bool(expression.get("values")):
                    yield f"{where}.{name}: In and NotIn need values, Exists and DoesNotExist have none"


def _is_cidr(text: str) -> bool:
    try:
        return "/" in text and ip_network(text, strict=False) is not None
    except ValueError:
        return False


def _no_rollout_pods(spec: RLHFJobSpec) -> Iterator[str]:
    if spec.placement.mode is PlacementMode.COLOCATED and spec.pods.rollout != PodOverrides():
        yield "spec.pods.rollout: remove it: when Colocated the engines run in the trainer's pods (spec.pods.trainer)"


def _checkpoint(spec: RLHFJobSpec) -> Iterator[str]:
    trainers, path = plan_placement(spec).groups[0].pods, spec.checkpoint.directory
    if trainers > 1 and path and not spec.checkpoint.claim and not holds_path(spec.pods.trainer.volume_mounts, path):
        yield (
            f"spec.pods.trainer.volumes: {trainers} trainer pods save into {path}: mount a volume there that "
                "they share, "
            "or lower spec.trainer.gpus to one pod's"
        )
    if path and any(normal(path).is_relative_to(own) for own in HEAD_MOUNTS):
        yield f"spec.checkpoint.path: {path} is Ray's or the operator's: name another directory"


def _claim(spec: RLHFJobSpec) -> Iterator[str]:
    path = spec.checkpoint.directory
    for mount in spec.pods.trainer.volume_mounts if spec.checkpoint.claim and path else ():
        ours, theirs = normal(path or ""), normal(mount["mountPath"])
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            ours_is = f"spec.checkpoint.claim, which is mounted at {path}"
            yield f"spec.pods.trainer.volumeMounts: remove {mount['mountPath']}, or {ours_is}"


def _final_save(spec: RLHFJobSpec) -> Iterator[str]:
    if spec.run_policy.final_save and ephemeral(spec):
        yield (
            "spec.runPolicy.finalSave: what is saved would go with the trainer's pod: make checkpoint.path a "
                "claim's (spec.checkpoint.claim), "
            "a lasting volume's or a URL, or set finalSave to false"
        )


def holds_path(mounts: list[Raw], path: str) -> bool:
    """Some mount is at the path or above it."""
    return _mount_of(mounts, path) is not None


def ephemeral(spec: RLHFJobSpec) -> bool:
    """Whether the checkpoints die with the trainer's pod: their directory is neither the claim's nor on a volume that
    outlives pods.
    """
    path, user = spec.checkpoint.directory, spec.pods.trainer
    if path is None or spec.checkpoint.claim is not None:
        return False
    mount = _mount_of(user.volume_mounts, path)
    return not any(mount and volume.get("name") == mount.get("name") and _outlives(volume) for volume in user.volumes)


def _mount_of(mounts: list[Raw], path: str) -> Raw | None:
    """The mount that the path lies on: of several above it, the nearest."""
    wanted = normal(path)
    whole = [mount for mount in mounts if isinstance(mount.get("mountPath"), str)]
    over = [mount for mount in whole if wanted.is_relative_to(normal(mount["mountPath"]))]
    return max(over, key=lambda mount: len(normal(mount["mountPath"]).parts), default=None)


def _outlives(volume: Raw) -> bool:
    """A volume without a source is an emptyDir."""
    return any(value is not None and source not in ("name", *MORTAL_SOURCES) for source, value in volume.items())
