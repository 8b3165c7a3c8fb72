"""What `spec.pods` may not say, because the run would break by it. Each problem names the field and the fix."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

from rlhf_api.job import PlacementMode, PodOverrides, RLHFJobSpec
from rlhf_api.placement import plan_placement

HEAD = "head"
OWN_VOLUME_PREFIX = "rlhf-"
OWN_LABEL_PREFIXES = ("ray.io/", "rlhf.dev/")
OWN_ENV_PREFIX = "RLHF_"
OWN_ENV = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")
# Why a PodSpec field is ours; the head's list is longer because the driver lives there.
OWN_FIELDS = {
    "containers": "Ray and the driver are the operator's: use env, volumeMounts, resources or initContainers",
    "restartPolicy": "the operator relies on containers that restart in place",
}
OWN_HEAD_FIELDS = {
    "shareProcessNamespace": "the driver finds Ray by it",
    "serviceAccountName": "the driver reports with its own ServiceAccount: bind your rights to <job>-driver instead",
    "automountServiceAccountToken": "the driver reports with it",
}
# Volumes that are made with the pod and go with it, or that nothing can be saved on.
MORTAL_SOURCES = ("emptyDir", "ephemeral", "configMap", "secret", "projected", "downwardAPI", "gitRepo", "image")
HEAD_MOUNTS = ("/tmp/ray", "/dev/shm", "/etc/rlhf")


def override_problems(spec: RLHFJobSpec) -> tuple[str, ...]:
    found = [problem for kind, pods in _kinds(spec) for check in CHECKS for problem in check(kind, pods)]
    return (*found, *_gpu(spec), *_no_rollout_pods(spec), *_checkpoint(spec))


def _kinds(spec: RLHFJobSpec) -> tuple[tuple[str, PodOverrides], ...]:
    return (HEAD, spec.pods.head), ("trainer", spec.pods.trainer), ("rollout", spec.pods.rollout)


def _fields(kind: str, pods: PodOverrides) -> Iterator[str]:
    owned = {**OWN_FIELDS, **(OWN_HEAD_FIELDS if kind == HEAD else {})}
    for name in sorted(set(pods.model_extra or {}) & set(owned)):
        yield f"spec.pods.{kind}.{name}: remove it: {owned[name]}"


def _names(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (f"spec.pods.{kind}.volumes: rename {v['name']}: names that begin with {OWN_VOLUME_PREFIX} are the operator's"
                for v in pods.volumes if str(v.get("name", "")).startswith(OWN_VOLUME_PREFIX))
    yield from (f"spec.pods.{kind}.labels: remove {key}: it is the operator's" for key in pods.labels if key.startswith(OWN_LABEL_PREFIXES))
    yield from (f"spec.pods.{kind}.env: remove {e['name']}: the operator sets it"
                for e in pods.env if str(e.get("name", "")).startswith(OWN_ENV_PREFIX) or e.get("name") in OWN_ENV)


def _mounts(kind: str, pods: PodOverrides) -> Iterator[str]:
    volumes = {v.get("name") for v in pods.volumes}
    for mount in pods.volume_mounts:
        if mount.get("name") not in volumes:
            yield f"spec.pods.{kind}.volumeMounts: no volume named {mount.get('name')!r} in spec.pods.{kind}.volumes: add it"
        if kind == HEAD and str(mount.get("mountPath")).rstrip("/") in HEAD_MOUNTS:
            yield f"spec.pods.{kind}.volumeMounts: remove {mount['mountPath']}: the operator mounts it"


def _gpu(spec: RLHFJobSpec) -> Iterator[str]:
    name = spec.placement.resource_name
    for kind, pods in _kinds(spec):
        if any(name in (pods.resources.get(side) or {}) for side in ("requests", "limits")):
            yield f"spec.pods.{kind}.resources: remove {name}: GPUs follow from the gpus of spec.trainer and other roles, and from spec.rollout"


def _no_rollout_pods(spec: RLHFJobSpec) -> Iterator[str]:
    if spec.placement.mode is PlacementMode.COLOCATED and spec.pods.rollout != PodOverrides():
        yield "spec.pods.rollout: remove it: when Colocated the engines run in the trainer's pods (spec.pods.trainer)"


def _checkpoint(spec: RLHFJobSpec) -> Iterator[str]:
    trainers, path = plan_placement(spec).groups[0].pods, spec.checkpoint.directory
    if trainers > 1 and path and not spec.checkpoint.claim and not holds_path(spec.pods.trainer.volume_mounts, path):
        yield (f"spec.pods.trainer.volumes: {trainers} trainer pods save into {path}: mount a volume there that they share, "
               "or lower spec.trainer.gpus to one pod's")


def holds_path(mounts: list[dict[str, Any]], path: str) -> bool:
    """Some mount is at the path or above it."""
    return _mount_of(mounts, path) is not None


def ephemeral(spec: RLHFJobSpec) -> bool:
    """Whether the checkpoints die with the trainer's pod: their directory is neither the claim's nor on a volume that outlives pods."""
    path, user = spec.checkpoint.directory, spec.pods.trainer
    if path is None or spec.checkpoint.claim is not None:
        return False
    mount = _mount_of(user.volume_mounts, path)
    return not any(mount and volume.get("name") == mount.get("name") and _outlives(volume) for volume in user.volumes)


def _mount_of(mounts: list[dict[str, Any]], path: str) -> dict[str, Any] | None:
    """The mount that the path lies on: of several above it, the nearest."""
    wanted = _normal(path)
    over = [mount for mount in mounts if wanted.is_relative_to(_normal(str(mount.get("mountPath", "//"))))]
    return max(over, key=lambda mount: len(_normal(str(mount["mountPath"])).parts), default=None)


def _normal(path: str) -> PurePosixPath:
    return PurePosixPath(normpath(path))


def _outlives(volume: dict[str, Any]) -> bool:
    """A volume without a source is an emptyDir."""
    return any(value is not None and source not in ("name", *MORTAL_SOURCES) for source, value in volume.items())


CHECKS = (_fields, _names, _mounts)
