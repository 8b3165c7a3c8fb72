"""What one kind of pod may not be given: what Kubernetes would refuse, and what would break the run or its node."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from posixpath import normpath
from re import ASCII, fullmatch
from typing import Any

from rlhf_api import kubernetes
from rlhf_api.job import PodOverrides
from rlhf_api.kubernetes import misfits

Raw = dict[str, Any]
Check = Callable[[str, PodOverrides], Iterator[str]]

HEAD = "head"
OWN_VOLUME_PREFIX = "rlhf-"
OWN_LABEL_PREFIXES = ("ray.io/", "rlhf.dev/", "kueue.x-k8s.io/")  # Kueue would take the pod for a job of its own
OWN_ENV_PREFIXES = ("RLHF_", "KUBERAY_", "RAY_AUTH_")
OWN_ENV = (
    "RAY_ADDRESS",
    "RAY_IP",
    "FQ_RAY_IP",
    "RAY_PORT",
    "RAY_CLUSTER_NAME",
    "RAY_NODE_TYPE_NAME",
    "RAY_CLOUD_INSTANCE_ID",
    "REDIS_PASSWORD",
)
OWN_CONTAINERS = ("ray", "driver", "wait-gcs-ready")
# Why a PodSpec field may not be set; the head's list is longer because the driver lives there.
OWN_FIELDS = {
    "containers": "Ray and the driver are the operator's: use env, volumeMounts, resources or initContainers",
    "ephemeralContainers": "they are added to pods that run: use kubectl debug",
    "restartPolicy": "the operator relies on containers that restart in place",
    "nodeName": "it goes past the scheduler, and so past its count of GPUs: use nodeSelector or affinity",
    "activeDeadlineSeconds": "the kubelet would end the pod at it without a word: use "
        "spec.runPolicy.activeDeadlineSeconds",
    "hostPID": "the job's processes would see and could signal all others of the node",
    "hostIPC": "the job's shared memory would be that of the node: pods have a /dev/shm of their own",
}
OWN_HEAD_FIELDS = {
    "shareProcessNamespace": "the driver finds Ray by it",
    "serviceAccountName": "the driver reports with its own ServiceAccount: bind your rights to <job>-driver instead",
    "serviceAccount": "the driver reports with its own ServiceAccount: bind your rights to <job>-driver instead",
    "automountServiceAccountToken": "the driver reports with it",
    "hostNetwork": "Ray's and the driver's ports would be the node's, where two jobs' heads would clash, and no "
        "NetworkPolicy guards them",
}
HEAD_MOUNTS = ("/tmp/ray", "/dev/shm", "/etc/rlhf")
LEAST_GRACE_SECONDS = 30
SHAPES = {
    "env": kubernetes.items(kubernetes.ENV_VAR), "envFrom": kubernetes.items(kubernetes.ENV_FROM),
    "volumes": kubernetes.items(kubernetes.VOLUME),
    "volumeMounts": kubernetes.items(kubernetes.VOLUME_MOUNT), "resources": kubernetes.RESOURCES,
    "labels": kubernetes.LABELS,
    "annotations": kubernetes.ANNOTATIONS, "containerSecurityContext": kubernetes.CONTAINER_SECURITY,
}  # fmt: skip


def pod_misfits(kind: str, pods: PodOverrides) -> Iterator[str]:
    """Values of a wrong type. What has some is not to be looked at further."""
    given = pods.model_dump(by_alias=True)
    for name, schema in SHAPES.items():
        yield from misfits(schema, given[name], f"spec.pods.{kind}.{name}")
    yield from misfits(kubernetes.POD_SPEC, rest_of(pods), f"spec.pods.{kind}")


def pod_problems(kind: str, pods: PodOverrides) -> Iterator[str]:
    """Of pods without misfits."""
    return (problem for check in CHECKS for problem in check(kind, pods))


def rest_of(pods: PodOverrides) -> Raw:
    """The fields of the PodSpec that are passed on as they are."""
    return pods.model_extra or {}


def _fields(kind: str, pods: PodOverrides) -> Iterator[str]:
    owned = {**OWN_FIELDS, **(OWN_HEAD_FIELDS if kind == HEAD else {})}
    for name in sorted(set(rest_of(pods)) & set(owned)):
        if not (name.startswith("host") and rest_of(pods)[name] is False):
            yield f"spec.pods.{kind}.{name}: remove it: {owned[name]}"
    grace = rest_of(pods).get("terminationGracePeriodSeconds", LEAST_GRACE_SECONDS)
    if grace < LEAST_GRACE_SECONDS:
        words = f"a pod that ends is given {grace} s: the driver saves in them, set {LEAST_GRACE_SECONDS} or more"
        yield f"spec.pods.{kind}.terminationGracePeriodSeconds: {words}"


def _names(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (
        f"spec.pods.{kind}.volumes: rename {v['name']}: names that begin with {OWN_VOLUME_PREFIX} are the operator's"
        for v in pods.volumes
        if v["name"].startswith(OWN_VOLUME_PREFIX)
    )
    yield from (
        f"spec.pods.{kind}.labels: remove {key}: it is the operator's"
        for key in pods.labels
        if key.startswith(OWN_LABEL_PREFIXES)
    )
    for field, keys in (
        ("labels", pods.labels),
        ("annotations", pods.annotations),
        ("nodeSelector", rest_of(pods).get("nodeSelector", {})),
    ):
        yield from (
            f"spec.pods.{kind}.{field}: rename {key!r}: keys match {kubernetes.LABEL_KEY}"
            for key in keys
            if not _is_key(key)
        )
    names = [container["name"] for container in rest_of(pods).get("initContainers", [])]
    yield from (
        f"spec.pods.{kind}.initContainers: rename {name}: another container has this name"
        for name in _repeated([*names, *OWN_CONTAINERS])
    )


def _is_key(key: str) -> bool:
    return len(key) <= 317 and fullmatch(kubernetes.LABEL_KEY, key, ASCII) is not None


def _env(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (
        f"spec.pods.{kind}.env: remove {e['name']}: the operator or KubeRay sets it"
        for e in pods.env
        if e["name"].startswith(OWN_ENV_PREFIXES) or e["name"] in OWN_ENV
    )
    for where, env in (
        ("env", pods.env),
        *(
            (f"initContainers[{i}].env", c.get("env", []))
            for i, c in enumerate(rest_of(pods).get("initContainers", []))
        ),
    ):
        yield from (
            f"spec.pods.{kind}.{where}: {e['name']} has both value and valueFrom: remove one"
            for e in env
            if e.get("value") and "valueFrom" in e
        )
        yield from (
            f"spec.pods.{kind}.{where}: valueFrom of {e['name']} needs exactly one of "
                f"{', '.join(kubernetes.ENV_SOURCES)}"
            for e in env
            if "valueFrom" in e and len(set(e["valueFrom"]) & set(kubernetes.ENV_SOURCES)) != 1
        )
    yield from (
        f"spec.pods.{kind}.envFrom[{i}]: needs exactly one of configMapRef and secretRef"
        for i, source in enumerate(pods.env_from)
        if ("configMapRef" in source) == ("secretRef" in source)
    )


def _volumes(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (
        f"spec.pods.{kind}.volumes: two are named {name}: rename one"
        for name in _repeated([v["name"] for v in pods.volumes])
    )
    for volume in pods.volumes:
        sources = [name for name in volume if name != "name"]
        if len(sources) > 1:
            yield f"spec.pods.{kind}.volumes: {volume['name']} has {' and '.join(sources)}: leave one source"
        yield from (
            f"spec.pods.{kind}.volumes: {source} of {volume['name']} must be a mapping"
            for source in sources
            if not isinstance(volume[source], dict)
        )


def _mounts(kind: str, pods: PodOverrides) -> Iterator[str]:
    lists = [
        ("volumeMounts", pods.volume_mounts),
        *(
            (f"initContainers[{i}].volumeMounts", c.get("volumeMounts", []))
            for i, c in enumerate(rest_of(pods).get("initContainers", []))
        ),
    ]
    volumes = {v["name"] for v in pods.volumes}
    for where, mounts in lists:
        yield from (
            f"spec.pods.{kind}.{where}: no volume named {m['name']!r} in spec.pods.{kind}.volumes: add it"
            for m in mounts
            if m["name"] not in volumes
        )
        yield from (
            f"spec.pods.{kind}.{where}: two are at {path}: remove one"
            for path in _repeated([str(normal(m["mountPath"])) for m in mounts])
        )
        yield from (
            f"spec.pods.{kind}.{where}: subPath {m['subPath']!r} must be a path within the volume"
            for m in mounts
            if m.get("subPath", "").startswith("/") or ".." in m.get("subPath", "").split("/")
        )
    yield from (
        f"spec.pods.{kind}.volumeMounts: remove {m['mountPath']}: {why}"
        for m in pods.volume_mounts
        if (why := _hides(kind, normal(m["mountPath"])))
    )


def _hides(kind: str, path: PurePosixPath) -> str:
    """A mount above another one does not hide it: the kubelet mounts the outer one first."""
    if path == PurePosixPath("/"):
        return "it would hide the whole image"
    return "the operator mounts it" if kind == HEAD and any(path.is_relative_to(own) for own in HEAD_MOUNTS) else ""


def _security(kind: str, pods: PodOverrides) -> Iterator[str]:
    """By what the operator sets, the pod does not run as root and no process gets more rights than it had."""
    own, pod = pods.container_security_context, rest_of(pods).get("securityContext", {})
    where = f"spec.pods.{kind}.containerSecurityContext"
    if own.get("runAsUser", pod.get("runAsUser")) == 0 and own.get("runAsNonRoot", pod.get("runAsNonRoot", True)):
        yield f"{where}: runAsUser is 0, which is root: set runAsNonRoot to false too, or another user"
    greedy = own.get("privileged") or "SYS_ADMIN" in own.get("capabilities", {}).get("add", [])
    if greedy and not own.get("allowPrivilegeEscalation"):
        yield f"{where}: privileged and SYS_ADMIN need more: set allowPrivilegeEscalation to true too"


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def normal(path: str) -> PurePosixPath:
    return PurePosixPath(normpath(f"/{path.lstrip('/')}"))


CHECKS: tuple[Check, ...] = (_fields, _names, _env, _volumes, _mounts, _security)
