"""What spec.pods may not say: field and fix, each."""

from typing import Any

import pytest

from rlhf_api.job import RLHFJob, RLHFJobSpec
from rlhf_api.overrides import ephemeral, override_problems
from rlhf_api.parse import parse_lenient
from tests.api.specs import a_job

DATA = {"volumes": [{"name": "data", "emptyDir": {}}], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}
TWO_PODS = {"trainer__gpus": 2, "rollout__engines": 2, "placement__gpusPerNode": 1}

def on_trainer(**fields: Any) -> dict[str, Any]:
    return {"pods": {"trainer": fields}}


def on_head(**fields: Any) -> dict[str, Any]:
    return {"pods": {"head": fields}}


def mounted(path: str, **more: Any) -> dict[str, Any]:
    return {"volumes": [{"name": "d"}], "volumeMounts": [{"name": "d", "mountPath": path, **more}]}


def needs(**amounts: Any) -> dict[str, Any]:
    return {"resources": {"requests": amounts}}


def init(**fields: Any) -> dict[str, Any]:
    return {"initContainers": [{"name": "i", "image": "i", **fields}]}


def peer(**fields: Any) -> dict[str, Any]:
    return {"networkPolicy": {"allowFrom": [fields]}}


# What is not the operator's to run: (changes, the beginning or a part of the one problem).
UNSAFE: list[tuple[dict[str, Any], str]] = [
    (on_trainer(containers=[]), "spec.pods.trainer.containers: remove it"),
    (on_trainer(ephemeralContainers=[]), "spec.pods.trainer.ephemeralContainers: remove it"),
    (on_head(restartPolicy="Never"), "spec.pods.head.restartPolicy: remove it"),
    (on_trainer(nodeName="n1"), "spec.pods.trainer.nodeName: remove it"),
    (on_trainer(activeDeadlineSeconds=60), "spec.pods.trainer.activeDeadlineSeconds: remove it"),
    (on_head(hostPID=True), "spec.pods.head.hostPID: remove it"),
    (on_trainer(hostIPC=True), "spec.pods.trainer.hostIPC: remove it"),
    (on_head(hostNetwork=True), "spec.pods.head.hostNetwork: remove it"),
    (on_trainer(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet"), "set spec.networkPolicy.enabled to false"),
    ({**on_trainer(hostNetwork=True), "networkPolicy__enabled": False}, "spec.pods.trainer.dnsPolicy: hostNetwork"),
    (on_head(serviceAccountName="mine"), "spec.pods.head.serviceAccountName: remove it"),
    (on_head(serviceAccount="mine"), "spec.pods.head.serviceAccount: remove it"),
    (on_head(shareProcessNamespace=False), "spec.pods.head.shareProcessNamespace: remove it"),
    (on_trainer(terminationGracePeriodSeconds=0), "spec.pods.trainer.terminationGracePeriodSeconds: a pod that ends "
        "is given 0 s"),
    (on_head(terminationGracePeriodSeconds=29), "set 30 or more"),
    (on_trainer(volumes=[{"name": "rlhf-shm"}]), "spec.pods.trainer.volumes: rename rlhf-shm"),
    (
        on_head(volumeMounts=[{"name": "data", "mountPath": "/data"}]),
        "no volume named 'data' in spec.pods.head.volumes",
    ),
    (on_head(**mounted("/tmp/ray/")), "remove /tmp/ray/"),
    (on_head(**mounted("/tmp/ray/session")), "remove /tmp/ray/session"),
    (on_head(**mounted("/etc/rlhf/run.yaml", subPath="run.yaml")), "remove /etc/rlhf/run.yaml"),
    (on_head(**mounted("/dev/../dev/shm")), "remove /dev/../dev/shm"),
    (on_trainer(**mounted("//")), "it would hide the whole image"),
    *((on_head(env=[{"name": name, "value": "x"}]), f"spec.pods.head.env: remove {name}") for name in
      (
          "RAY_ADDRESS", "FQ_RAY_IP", "RAY_IP", "RAY_PORT", "RAY_CLUSTER_NAME", "KUBERAY_GEN_RAY_START_CMD",
          "RAY_AUTH_MODE", "RLHF_JOB_NAME",
      )),
    (on_trainer(labels={"ray.io/cluster": "x"}), "spec.pods.trainer.labels: remove ray.io/cluster"),
    (on_trainer(labels={"kueue.x-k8s.io/queue-name": "x"}), "spec.pods.trainer.labels: remove "
        "kueue.x-k8s.io/queue-name"),
    (on_trainer(resources={"limits": {"nvidia.com/gpu": 1}}), "spec.pods.trainer.resources: remove nvidia.com/gpu"),
    ({"pods": {"driver": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}}, "spec.pods.driver.resources: remove "
        "nvidia.com/gpu"),
    (on_head(**init(name="driver")), "spec.pods.head.initContainers: rename driver"),
    ({"pods": {"rollout": DATA}}, "spec.pods.rollout: remove it: when Colocated"),
    (TWO_PODS, "spec.pods.trainer.volumes: 2 trainer pods save into /checkpoints"),
    ({**TWO_PODS, "pods": {"trainer": DATA}}, "spec.pods.trainer.volumes: 2 trainer pods"),
    ({"checkpoint__path": "/dev/shm/run"}, "spec.checkpoint.path: /dev/shm/run is Ray's"),
    (
        {"checkpoint__claim": {"size": "1Gi"}, **on_trainer(**mounted("/checkpoints/logs"))},
        "spec.pods.trainer.volumeMounts: remove /checkpoints/logs",
    ),
    (
        {"checkpoint": {"claim": {"size": "1Gi"}, "path": "/data/run"}, **on_trainer(**DATA)},
        "spec.pods.trainer.volumeMounts: remove /data, or",
    ),
    ({"runPolicy__finalSave": True}, "spec.runPolicy.finalSave: what is saved would go with the trainer's pod"),
]  # fmt: skip
# What Kubernetes would refuse, when the pods are made or sooner.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (on_trainer(env={"A": "1"}), ""),
    (on_trainer(env=["A=1"]), ""),
    (on_trainer(env=[{"name": ["A"]}]), "spec.pods.trainer.env[0].name: must be a text"),
    (on_trainer(env=[{"name": "A", "value": 1}]), "spec.pods.trainer.env[0].value: must be a text (put it in quotes)"),
    (on_trainer(env=[{"value": "1"}]), "spec.pods.trainer.env[0].name: is missing"),
    (on_trainer(env=[{"name": "A=B", "value": "1"}]), "spec.pods.trainer.env[0].name: must match"),
    (on_trainer(env=[{"name": "A", "valueFrom": "x"}]), "spec.pods.trainer.env[0].valueFrom: must be a mapping"),
    (
        on_trainer(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]),
        "spec.pods.trainer.env[0].valueFrom.secretKeyRef.key: is missing",
    ),
    (on_trainer(env=[{"name": "A", "valueFrom": {}}]), "valueFrom of A needs exactly one of"),
    (on_trainer(env=[{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]), "A has both value "
        "and valueFrom"),
    (on_trainer(envFrom=[{"prefix": "A"}]), "spec.pods.trainer.envFrom[0]: needs exactly one of"),
    (on_trainer(envFrom=[{"secretRef": "s"}]), "spec.pods.trainer.envFrom[0].secretRef: must be a mapping"),
    (on_trainer(volumes=[{"name": {}}]), "spec.pods.trainer.volumes[0].name: must be a text"),
    (on_trainer(volumes=[{"name": "A_b"}]), "spec.pods.trainer.volumes[0].name: must match"),
    (on_trainer(volumes=[{"name": "d", "emptyDir": {}, "nfs": {"server": "s", "path": "/"}}]), "d has emptyDir and "
        "nfs: leave one source"),
    (
        on_trainer(volumes=[{"name": "d", "persistentVolumeClaim": {"name": "c"}}]),
        "spec.pods.trainer.volumes[0].persistentVolumeClaim.claimName: is missing",
    ),
    (on_trainer(volumes=[{"name": "d", "rook": "x"}]), "rook of d must be a mapping"),
    (on_trainer(volumes=[{"name": "d"}, {"name": "d"}]), "two are named d"),
    (on_trainer(**mounted("relative")), "spec.pods.trainer.volumeMounts[0].mountPath: must match"),
    (on_trainer(**mounted("/a:b")), "spec.pods.trainer.volumeMounts[0].mountPath: must match"),
    (on_trainer(**mounted("/a", subPath="../b")), "subPath '../b' must be a path within the volume"),
    (on_trainer(**mounted("/a", readOnly="yes")), "spec.pods.trainer.volumeMounts[0].readOnly: must be true or false"),
    (
        on_trainer(
            volumes=[{"name": "d"}], volumeMounts=[{"name": "d", "mountPath": "/a"}, {"name": "d", "mountPath": "/a/"}],
        ),
        "two are at /a",
    ),
    (on_trainer(resources={"limits": "lots"}), "spec.pods.trainer.resources.limits: must be a mapping"),
    (on_trainer(resources={"limits": {"cpu": "16Gi"}}), "spec.pods.trainer.resources.limits.cpu: is 17179869184 cores"),
    (
        on_trainer(**needs(cpu="four")),
        "spec.pods.trainer.resources.requests.cpu: 'four' is not a quantity: write it as",
    ),
    (on_trainer(**needs(cpu=0.5)), "spec.pods.trainer.resources.requests.cpu: must be a quantity"),
    (on_trainer(**needs(cpu=[1])), "spec.pods.trainer.resources.requests.cpu: must be a quantity"),
    (on_trainer(**needs(cpu="-1")), "is less than nothing"),
    (on_trainer(**needs(memory="16")), "spec.pods.trainer.resources.requests.memory: is 16 bytes"),
    (on_trainer(**needs(gpu="1")), "spec.pods.trainer.resources.requests.gpu: is no resource"),
    (on_trainer(resources={"limits": {"rdma/ib": "500m"}}), "counts devices"),
    (on_trainer(resources={"requests": {"rdma/ib": "1"}}), "must equal limits.rdma/ib"),
    (
        on_trainer(resources={"requests": {"cpu": 4}, "limits": {"cpu": "2k", "memory": "1e9"}}, labels={"a": "b c"}),
        "spec.pods.trainer.labels.a: must match",
    ),
    (on_trainer(resources={"requests": {"cpu": "4"}, "limits": {"cpu": "3999m"}}), "requests.cpu: is more than "
        "limits.cpu"),
    (
        {"pods": {"driver": {"resources": {"requests": {"memory": "lots"}}}}},
        "spec.pods.driver.resources.requests.memory: 'lots' is not",
    ),
    (on_trainer(labels={"a b": "c"}), "spec.pods.trainer.labels: rename 'a b'"),
    (on_trainer(annotations={"/x": "c"}), "spec.pods.trainer.annotations: rename '/x'"),
    (on_trainer(nodeSelector={"pool": 1}), "spec.pods.trainer.nodeSelector.pool: must be a text"),
    (on_trainer(nodeSelector="gpu"), "spec.pods.trainer.nodeSelector: must be a mapping"),
    (on_trainer(tolerations={"operator": "Exists"}), "spec.pods.trainer.tolerations: must be a list"),
    (on_trainer(hostPID="true"), "spec.pods.trainer.hostPID: must be true or false"),
    (on_trainer(terminationGracePeriodSeconds="90s"), "spec.pods.trainer.terminationGracePeriodSeconds: must be a "
        "whole number"),
    (on_trainer(imagePullSecrets=["s"]), "spec.pods.trainer.imagePullSecrets[0]: must be a mapping"),
    (on_trainer(**init(image=None)), "spec.pods.trainer.initContainers[0].image: must be a text"),
    (
        on_trainer(**init(resources={"limits": {"cpu": "x"}})),
        "spec.pods.trainer.initContainers[0].resources.limits.cpu",
    ),
    (on_trainer(**init(volumeMounts=[{"name": "d", "mountPath": "/d"}])), "initContainers[0].volumeMounts: no volume "
        "named 'd'"),
    (
        on_trainer(containerSecurityContext={"runAsUser": "root"}),
        "spec.pods.trainer.containerSecurityContext.runAsUser: must be a whole number",
    ),
    (on_trainer(containerSecurityContext={"runAsUser": 0}), "set runAsNonRoot to false too"),
    (on_trainer(securityContext={"runAsUser": 0}), "set runAsNonRoot to false too"),
    (on_trainer(containerSecurityContext={"privileged": True}), "set allowPrivilegeEscalation to true too"),
    (peer(), "spec.networkPolicy.allowFrom[0]: needs podSelector"),
    (peer(podSelecto={}, namespaceSelector={}), "spec.networkPolicy.allowFrom[0].podSelecto: unknown field"),
    (peer(ipBlock={"cidr": "10.0.0.0/8"}, podSelector={}), "or ipBlock alone"),
    (peer(ipBlock={"cidr": "10.0.0.1"}), "'10.0.0.1' is no CIDR"),
    (peer(podSelector={"matchLabels": {"a": 1}}), "spec.networkPolicy.allowFrom[0].podSelector.matchLabels.a: must be "
        "a text"),
    (peer(podSelector={"matchExpressions": [{"key": "a", "operator": "In"}]}), "In and NotIn need values"),
]  # fmt: skip
GOOD: list[dict[str, Any]] = [
    {},
    {
        "pods": {
            "head": DATA, "trainer": {**DATA, "tolerations": [{"operator": "Exists"}], "serviceAccountName": "reader"},
        }
    },
    on_trainer(**mounted("/dev/shm")),
    on_head(**mounted("/tmp")),
    {"pods": {"rollout": {}}},
    {**TWO_PODS, "checkpoint__path": "/data/run", "pods": {"trainer": DATA}},
    {**TWO_PODS, "checkpoint__path": "s3://bucket/run"},
    {**TWO_PODS, "checkpoint__claim": {"size": "1Gi", "accessMode": "ReadWriteMany"}, "runPolicy__finalSave": True},
    on_trainer(
        hostPID=False, runtimeClassName="kata", schedulerName="mine", priorityClassName="high",
        aFieldOfTheFuture=[1, {}],
    ),
    {**on_trainer(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet"), "networkPolicy__enabled": False},
    on_trainer(
        resources={
            "requests": {"cpu": "2k", "memory": "1.5Gi"},
            "limits": {"cpu": "1e4", "rdma/ib": 1, "hugepages-2Mi": "4Mi"},
        }
    ),
    on_trainer(
        containerSecurityContext={
            "privileged": True, "allowPrivilegeEscalation": True, "runAsUser": 0, "runAsNonRoot": False,
        }
    ),
    on_trainer(annotations={"kueue.x-k8s.io/podset-required-topology": "rack"}, terminationGracePeriodSeconds=30),
    on_trainer(**init(command=["sh"], env=[{"name": "A"}], restartPolicy="Always")),
    peer(namespaceSelector={}, podSelector={"matchLabels": {"app": "prometheus"}}),
    peer(ipBlock={"cidr": "fd00::/8", "except": ["fd00:1::/32"]}),
]  # fmt: skip


def spec(**changes: Any) -> RLHFJobSpec:
    return RLHFJob.model_validate(a_job(**changes)).spec


@pytest.mark.parametrize(
    ("changes", "words"), [*UNSAFE, *REFUSED], ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_override_that_would_break_the_run_is_refused(changes: dict[str, Any], words: str) -> None:
    (problem,) = parse_lenient(a_job(**changes)).problems
    assert problem.startswith("spec.")
    assert words in problem


@pytest.mark.parametrize("changes", GOOD)
def test_every_other_override_is_taken(changes: dict[str, Any]) -> None:
    assert override_problems(spec(**changes)) == ()


def on(source: dict[str, Any], path: str = "/checkpoints") -> dict[str, Any]:
    mounts = [{"name": "data", "mountPath": "/"}, {"name": "saved", "mountPath": path}]
    return {
        "pods": {
            "trainer": {"volumes": [{"name": "data", "nfs": {}}, {"name": "saved", **source}], "volumeMounts": mounts}
        }
    }


CLAIM = {"persistentVolumeClaim": {"claimName": "c"}}
PLACES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"checkpoint__path": "s3://bucket/run"}, False),
    ({"checkpoint__claim": {"size": "1Gi"}}, False),
    (on(CLAIM), False),
    (on({"hostPath": {"path": "/srv"}}, "/checkpoints/"), False),
    ({**on(CLAIM), "checkpoint__path": "file:///checkpoints/run"}, False),
    ({**on(CLAIM, "/elsewhere"), "pods": {"trainer": {}}}, True),
    (
        {
            **on(CLAIM), "checkpoint__path": "/checkpoints/../other",
            "pods__trainer__volumeMounts": [{"name": "saved", "mountPath": "/checkpoints"}],
        },
        True,
    ),
    (on({}), True),
    (on({"emptyDir": {}}), True),
    (on({"ephemeral": {"volumeClaimTemplate": {}}}), True),
    (on({"configMap": {"name": "c"}}), True),
    (
        on_trainer(volumes=[{"name": "d", "nfs": {}}], volumeMounts=[{"name": "d"}, {"name": "d", "mountPath": None}]),
        True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "dies"), PLACES, ids=str)
def test_checkpoints_that_die_with_the_trainers_pod(changes: dict[str, Any], dies: bool) -> None:
    assert ephemeral(spec(**changes)) is dies
