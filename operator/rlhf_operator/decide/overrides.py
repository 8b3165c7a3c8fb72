"""What `spec.pods` may not say, because the run would break by it. Each problem names the field and the fix."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from rlhf_api.job import PlacementMode, PodOverrides, RLHFJobSpec
from rlhf_api.placement import plan_placement
from rlhf_operator.names import HEAD, ROLLOUT, TRAINER

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
HEAD_MOUNTS = ("/tmp/ray", "/dev/shm", "/etc/rlhf")


def override_problems(spec: RLHFJobSpec) -> tuple[str, ...]:
    kinds = ((HEAD, spec.pods.head), (TRAINER, spec.pods.trainer), (ROLLOUT, spec.pods.rollout))
    found = [problem for kind, pods in kinds for check in CHECKS for problem in check(kind, pods)]
    return (*found, *_gpu(spec), *_no_rollout_pods(spec), *_checkpoint(spec))


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
    for kind, pods in ((HEAD, spec.pods.head), (TRAINER, spec.pods.trainer), (ROLLOUT, spec.pods.rollout)):
        if any(name in (pods.resources.get(side) or {}) for side in ("requests", "limits")):
            yield f"spec.pods.{kind}.resources: remove {name}: GPUs follow from the gpus of spec.trainer and other roles, and from spec.rollout"


def _no_rollout_pods(spec: RLHFJobSpec) -> Iterator[str]:
    if spec.placement.mode is PlacementMode.COLOCATED and spec.pods.rollout != PodOverrides():
        yield "spec.pods.rollout: remove it: when Colocated the engines run in the trainer's pods (spec.pods.trainer)"


def _checkpoint(spec: RLHFJobSpec) -> Iterator[str]:
    trainers, path = plan_placement(spec).groups[0].pods, spec.checkpoint.directory
    if trainers > 1 and path and not holds_path(spec.pods.trainer.volume_mounts, path):
        yield (f"spec.pods.trainer.volumes: {trainers} trainer pods save into {path}: mount a volume there that they share, "
               "or lower spec.trainer.gpus to one pod's")


def holds_path(mounts: list[dict[str, Any]], path: str) -> bool:
    """Some mount is at the path or above it."""
    wanted = PurePosixPath(path)
    return any(wanted.is_relative_to(str(mount.get("mountPath", "//"))) for mount in mounts)


CHECKS = (_fields, _names, _mounts)
