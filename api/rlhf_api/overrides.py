"""What `spec.pods` and `spec.networkPolicy` may not say, because Kubernetes would refuse the pods or the run would break by it. Each
problem names the field and the fix."""

from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from itertools import chain
from pathlib import PurePosixPath
from posixpath import normpath
from re import ASCII, fullmatch
from typing import Any

from rlhf_api import kubernetes
from rlhf_api.job import PlacementMode, PodOverrides, RLHFJobSpec
from rlhf_api.kubernetes import misfits
from rlhf_api.placement import plan_placement
from rlhf_api.resources import resource_problems

Raw = dict[str, Any]
Check = Callable[[str, PodOverrides], Iterator[str]]

HEAD = "head"
OWN_VOLUME_PREFIX = "rlhf-"
OWN_LABEL_PREFIXES = ("ray.io/", "rlhf.dev/", "kueue.x-k8s.io/")  # Kueue would take the pod for a job of its own
OWN_ENV_PREFIXES = ("RLHF_", "KUBERAY_", "RAY_AUTH_")
OWN_ENV = ("RAY_ADDRESS", "RAY_IP", "FQ_RAY_IP", "RAY_PORT", "RAY_CLUSTER_NAME", "RAY_NODE_TYPE_NAME", "RAY_CLOUD_INSTANCE_ID", "REDIS_PASSWORD")
OWN_CONTAINERS = ("ray", "driver", "wait-gcs-ready")
# Why a PodSpec field may not be set; the head's list is longer because the driver lives there.
OWN_FIELDS = {
    "containers": "Ray and the driver are the operator's: use env, volumeMounts, resources or initContainers",
    "ephemeralContainers": "they are added to pods that run: use kubectl debug",
    "restartPolicy": "the operator relies on containers that restart in place",
    "nodeName": "it goes past the scheduler, and so past its count of GPUs: use nodeSelector or affinity",
    "activeDeadlineSeconds": "the kubelet would end the pod at it without a word: use spec.runPolicy.activeDeadlineSeconds",
    "hostPID": "the job's processes would see and could signal all others of the node",
    "hostIPC": "the job's shared memory would be that of the node: pods have a /dev/shm of their own",
}
OWN_HEAD_FIELDS = {
    "shareProcessNamespace": "the driver finds Ray by it",
    "serviceAccountName": "the driver reports with its own ServiceAccount: bind your rights to <job>-driver instead",
    "serviceAccount": "the driver reports with its own ServiceAccount: bind your rights to <job>-driver instead",
    "automountServiceAccountToken": "the driver reports with it",
    "hostNetwork": "Ray's and the driver's ports would be the node's, where two jobs' heads would clash, and no NetworkPolicy guards them",
}
# Volumes that are made with the pod and go with it, or that nothing can be saved on.
MORTAL_SOURCES = ("emptyDir", "ephemeral", "configMap", "secret", "projected", "downwardAPI", "gitRepo", "image")
HEAD_MOUNTS = ("/tmp/ray", "/dev/shm", "/etc/rlhf")
LEAST_GRACE_SECONDS = 30
SHAPES = {
    "env": kubernetes.items(kubernetes.ENV_VAR), "envFrom": kubernetes.items(kubernetes.ENV_FROM), "volumes": kubernetes.items(kubernetes.VOLUME),
    "volumeMounts": kubernetes.items(kubernetes.VOLUME_MOUNT), "resources": kubernetes.RESOURCES, "labels": kubernetes.LABELS,
    "annotations": kubernetes.ANNOTATIONS, "containerSecurityContext": kubernetes.CONTAINER_SECURITY,
}  # fmt: skip


def override_problems(spec: RLHFJobSpec) -> tuple[str, ...]:
    """Shapes first: what has the wrong one is not looked at further."""
    if wrong := (*_shapes(spec), *misfits(kubernetes.items(kubernetes.NETWORK_PEER), spec.network_policy.allow_from, "spec.networkPolicy.allowFrom")):
        return wrong
    found = [problem for kind, pods in _kinds(spec) for check in CHECKS for problem in check(kind, pods)]
    whole = chain.from_iterable(check(spec) for check in (_resources, _host_network, _peers, _no_rollout_pods, _checkpoint, _claim, _final_save))
    return (*found, *whole)


def _kinds(spec: RLHFJobSpec) -> tuple[tuple[str, PodOverrides], ...]:
    return (HEAD, spec.pods.head), ("trainer", spec.pods.trainer), ("rollout", spec.pods.rollout)


def _rest(pods: PodOverrides) -> Raw:
    """The fields of the PodSpec that are passed on as they are."""
    return pods.model_extra or {}


def _shapes(spec: RLHFJobSpec) -> Iterator[str]:
    for kind, pods in _kinds(spec):
        given = pods.model_dump(by_alias=True)
        for name, schema in SHAPES.items():
            yield from misfits(schema, given[name], f"spec.pods.{kind}.{name}")
        yield from misfits(kubernetes.POD_SPEC, _rest(pods), f"spec.pods.{kind}")
    yield from misfits(kubernetes.RESOURCES, spec.pods.driver.resources, "spec.pods.driver.resources")


def _fields(kind: str, pods: PodOverrides) -> Iterator[str]:
    owned = {**OWN_FIELDS, **(OWN_HEAD_FIELDS if kind == HEAD else {})}
    for name in sorted(set(_rest(pods)) & set(owned)):
        if not (name.startswith("host") and _rest(pods)[name] is False):
            yield f"spec.pods.{kind}.{name}: remove it: {owned[name]}"
    grace = _rest(pods).get("terminationGracePeriodSeconds", LEAST_GRACE_SECONDS)
    if grace < LEAST_GRACE_SECONDS:
        yield f"spec.pods.{kind}.terminationGracePeriodSeconds: a pod that ends is given {grace} s: the driver saves in them, set {LEAST_GRACE_SECONDS} or more"


def _names(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (f"spec.pods.{kind}.volumes: rename {v['name']}: names that begin with {OWN_VOLUME_PREFIX} are the operator's"
                for v in pods.volumes if v["name"].startswith(OWN_VOLUME_PREFIX))
    yield from (f"spec.pods.{kind}.labels: remove {key}: it is the operator's" for key in pods.labels if key.startswith(OWN_LABEL_PREFIXES))
    for field, keys in (("labels", pods.labels), ("annotations", pods.annotations), ("nodeSelector", _rest(pods).get("nodeSelector", {}))):
        yield from (f"spec.pods.{kind}.{field}: rename {key!r}: keys match {kubernetes.LABEL_KEY}" for key in keys if not _is_key(key))
    names = [container["name"] for container in _rest(pods).get("initContainers", [])]
    yield from (f"spec.pods.{kind}.initContainers: rename {name}: another container has this name" for name in _repeated([*names, *OWN_CONTAINERS]))


def _is_key(key: str) -> bool:
    return len(key) <= 317 and fullmatch(kubernetes.LABEL_KEY, key, ASCII) is not None


def _env(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (f"spec.pods.{kind}.env: remove {e['name']}: the operator or KubeRay sets it"
                for e in pods.env if e["name"].startswith(OWN_ENV_PREFIXES) or e["name"] in OWN_ENV)
    for where, env in (("env", pods.env), *((f"initContainers[{i}].env", c.get("env", [])) for i, c in enumerate(_rest(pods).get("initContainers", [])))):
        yield from (f"spec.pods.{kind}.{where}: {e['name']} has both value and valueFrom: remove one" for e in env if e.get("value") and "valueFrom" in e)
        yield from (f"spec.pods.{kind}.{where}: valueFrom of {e['name']} needs exactly one of {', '.join(kubernetes.ENV_SOURCES)}"
                    for e in env if "valueFrom" in e and len(set(e["valueFrom"]) & set(kubernetes.ENV_SOURCES)) != 1)
    yield from (f"spec.pods.{kind}.envFrom[{i}]: needs exactly one of configMapRef and secretRef"
                for i, source in enumerate(pods.env_from) if ("configMapRef" in source) == ("secretRef" in source))


def _volumes(kind: str, pods: PodOverrides) -> Iterator[str]:
    yield from (f"spec.pods.{kind}.volumes: two are named {name}: rename one" for name in _repeated([v["name"] for v in pods.volumes]))
    for volume in pods.volumes:
        sources = [name for name in volume if name != "name"]
        if len(sources) > 1:
            yield f"spec.pods.{kind}.volumes: {volume['name']} has {' and '.join(sources)}: leave one source"
        yield from (f"spec.pods.{kind}.volumes: {source} of {volume['name']} must be a mapping" for source in sources if not isinstance(volume[source], dict))


def _mounts(kind: str, pods: PodOverrides) -> Iterator[str]:
    lists = [("volumeMounts", pods.volume_mounts), *((f"initContainers[{i}].volumeMounts", c.get("volumeMounts", [])) for i, c in enumerate(_rest(pods).get("initContainers", [])))]
    volumes = {v["name"] for v in pods.volumes}
    for where, mounts in lists:
        yield from (f"spec.pods.{kind}.{where}: no volume named {m['name']!r} in spec.pods.{kind}.volumes: add it" for m in mounts if m["name"] not in volumes)
        yield from (f"spec.pods.{kind}.{where}: two are at {path}: remove one" for path in _repeated([str(_normal(m["mountPath"])) for m in mounts]))
        yield from (f"spec.pods.{kind}.{where}: subPath {m['subPath']!r} must be a path within the volume"
                    for m in mounts if m.get("subPath", "").startswith("/") or ".." in m.get("subPath", "").split("/"))
    yield from (f"spec.pods.{kind}.volumeMounts: remove {m['mountPath']}: {why}" for m in pods.volume_mounts if (why := _hides(kind, _normal(m["mountPath"]))))


def _hides(kind: str, path: PurePosixPath) -> str:
    """A mount above another one does not hide it: the kubelet mounts the outer one first."""
    if path == PurePosixPath("/"):
        return "it would hide the whole image"
    return "the operator mounts it" if kind == HEAD and any(path.is_relative_to(own) for own in HEAD_MOUNTS) else ""


def _security(kind: str, pods: PodOverrides) -> Iterator[str]:
    """By what the operator sets, the pod does not run as root and no process gets more rights than it had."""
    own, pod = pods.container_security_context, _rest(pods).get("securityContext", {})
    where = f"spec.pods.{kind}.containerSecurityContext"
    if own.get("runAsUser", pod.get("runAsUser")) == 0 and own.get("runAsNonRoot", pod.get("runAsNonRoot", True)):
        yield f"{where}: runAsUser is 0, which is root: set runAsNonRoot to false too, or another user"
    greedy = own.get("privileged") or "SYS_ADMIN" in own.get("capabilities", {}).get("add", [])
    if greedy and not own.get("allowPrivilegeEscalation"):
        yield f"{where}: privileged and SYS_ADMIN need more: set allowPrivilegeEscalation to true too"


def _resources(spec: RLHFJobSpec) -> Iterator[str]:
    gpu = spec.placement.resource_name
    for kind, given in (*((kind, pods.resources) for kind, pods in _kinds(spec)), ("driver", spec.pods.driver.resources)):
        if any(gpu in given.get(side, {}) for side in ("requests", "limits")):
            yield f"spec.pods.{kind}.resources: remove {gpu}: GPUs follow from the gpus of spec.trainer and other roles, and from spec.rollout"
        yield from resource_problems(given, f"spec.pods.{kind}.resources")
    for kind, pods in _kinds(spec):
        for index, container in enumerate(_rest(pods).get("initContainers", [])):
            yield from resource_problems(container.get("resources", {}), f"spec.pods.{kind}.initContainers[{index}].resources")


def _host_network(spec: RLHFJobSpec) -> Iterator[str]:
    """Some networks of RDMA need it. Then two pods with Ray's ports cannot share a node, and a NetworkPolicy does not see them."""
    for kind, pods in _kinds(spec):
        if kind == HEAD or not _rest(pods).get("hostNetwork"):
            continue
        if spec.network_policy.enabled:
            yield f"spec.pods.{kind}.hostNetwork: no NetworkPolicy guards the node's own ports: set spec.networkPolicy.enabled to false to say so, or remove it"
        if _rest(pods).get("dnsPolicy") != "ClusterFirstWithHostNet":
            yield f"spec.pods.{kind}.dnsPolicy: hostNetwork asks the node's DNS, which does not know the head: set ClusterFirstWithHostNet"


def _peers(spec: RLHFJobSpec) -> Iterator[str]:
    for index, peer in enumerate(spec.network_policy.allow_from):
        where, block = f"spec.networkPolicy.allowFrom[{index}]", peer.get("ipBlock")
        if not peer or (block is not None and len(peer) > 1):
            yield f"{where}: needs podSelector, namespaceSelector or both, or ipBlock alone"
        if block is not None:
            yield from (f"{where}.ipBlock: {cidr!r} is no CIDR such as 10.0.0.0/8" for cidr in (block["cidr"], *block.get("except", [])) if not _is_cidr(cidr))
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
        yield (f"spec.pods.trainer.volumes: {trainers} trainer pods save into {path}: mount a volume there that they share, "
               "or lower spec.trainer.gpus to one pod's")
    if path and any(_normal(path).is_relative_to(own) for own in HEAD_MOUNTS):
        yield f"spec.checkpoint.path: {path} is Ray's or the operator's: name another directory"


def _claim(spec: RLHFJobSpec) -> Iterator[str]:
    path = spec.checkpoint.directory
    for mount in spec.pods.trainer.volume_mounts if spec.checkpoint.claim and path else ():
        ours, theirs = _normal(path or ""), _normal(mount["mountPath"])
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            yield f"spec.pods.trainer.volumeMounts: remove {mount['mountPath']}, or spec.checkpoint.claim, which is mounted at {path}"


def _final_save(spec: RLHFJobSpec) -> Iterator[str]:
    if spec.run_policy.final_save and ephemeral(spec):
        yield ("spec.runPolicy.finalSave: what is saved would go with the trainer's pod: make checkpoint.path a claim's (spec.checkpoint.claim), "
               "a lasting volume's or a URL, or set finalSave to false")


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def holds_path(mounts: list[Raw], path: str) -> bool:
    """Some mount is at the path or above it."""
    return _mount_of(mounts, path) is not None


def ephemeral(spec: RLHFJobSpec) -> bool:
    """Whether the checkpoints die with the trainer's pod: their directory is neither the claim's nor on a volume that outlives pods."""
    path, user = spec.checkpoint.directory, spec.pods.trainer
    if path is None or spec.checkpoint.claim is not None:
        return False
    mount = _mount_of(user.volume_mounts, path)
    return not any(mount and volume.get("name") == mount.get("name") and _outlives(volume) for volume in user.volumes)


def _mount_of(mounts: list[Raw], path: str) -> Raw | None:
    """The mount that the path lies on: of several above it, the nearest."""
    wanted = _normal(path)
    over = [mount for mount in mounts if wanted.is_relative_to(_normal(str(mount.get("mountPath", "//"))))]
    return max(over, key=lambda mount: len(_normal(str(mount["mountPath"])).parts), default=None)


def _normal(path: str) -> PurePosixPath:
    return PurePosixPath(normpath(f"/{path.lstrip('/')}"))


def _outlives(volume: Raw) -> bool:
    """A volume without a source is an emptyDir."""
    return any(value is not None and source not in ("name", *MORTAL_SOURCES) for source, value in volume.items())


CHECKS: tuple[Check, ...] = (_fields, _names, _env, _volumes, _mounts, _security)
