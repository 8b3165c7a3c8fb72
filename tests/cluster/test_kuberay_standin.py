"""The stand-in keeps KubeRay's contract (no cluster: pure functions, and the controller on an API in memory)."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hack.cluster.kube import ApiError, Object
from hack.cluster.kuberay_standin import checks, controller, names, objects, pods, status

KEY = ("team", "demo")


def ray_cluster(**spec: Any) -> Object:
    head = {"containers": [{"name": "ray-head", "image": "i"}, {"name": "driver", "image": "i", "command": ["train"]}]}
    worker = {
        "containers": [
            {
                "name": "w", "image": "i",
                "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "2Gi"}, "requests": {"cpu": "1500m"}},
            }
        ]
    }
    group = {
        "groupName": "gpu", "replicas": 2, "minReplicas": 2, "maxReplicas": 2, "rayStartParams": {},
        "template": {"spec": worker},
    }
    meta = {"name": "demo", "namespace": "team", "uid": "u1", "generation": 1}
    base = {
        "headGroupSpec": {"rayStartParams": {"num-gpus": "0"}, "template": {"spec": head}}, "workerGroupSpecs": [group],
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": meta, "spec": {**base, **spec}}


class MemoryApi:
    """An API server's objects in a dict, by path; ``refuse`` makes creations under a path fail as a quota does."""

    def __init__(self, cluster: Object) -> None:
        self.cluster_path = "/apis/ray.io/v1/namespaces/team/rayclusters/demo"
        self.objects: dict[str, Object] = {self.cluster_path: cluster}
        self.refuse: set[str] = set()
        self.writes: list[str] = []
        self._count = 0

    def find(self, path: str) -> Object | None:
        return copy.deepcopy(self.objects.get(path))

    def get(self, path: str) -> Object:
        prefix = path.partition("?")[0] + "/"
        return {"items": [copy.deepcopy(value) for key, value in self.objects.items() if key.startswith(prefix)]}

    def create(self, path: str, body: Object) -> Object:
        kind = path.rpartition("/")[2]
        if kind in self.refuse:
            raise ApiError(403, "exceeded quota: q")
        self._count += 1
        body = copy.deepcopy(body)
        body["metadata"].setdefault("name", f"{body['metadata'].get('generateName', '')}{self._count}")
        if kind == "services":
            body["spec"]["clusterIP"] = "198.19.0.7"
        if kind == "pods":
            body |= {"status": {"phase": "Pending"}}
            body["spec"].setdefault("restartPolicy", "Always")
        if kind != "events":
            self.objects[f"{path}/{body['metadata']['name']}"] = body
        self.writes.append(f"create {kind} {body.get('reason', '')}".strip())
        return body

    def replace(self, path: str, body: Object) -> Object:
        self.writes.append("status")
        self.objects[path.removesuffix("/status")]["status"] = copy.deepcopy(body["status"])
        return body

    def delete(self, path: str) -> None:
        self.writes.append(f"delete {path.split('/')[-2]}")
        self.objects.pop(path, None)

    def pods(self, kind: str = "") -> list[Object]:
        found = [value for key, value in self.objects.items() if "/pods/" in key]
        return [pod for pod in found if not kind or pod["metadata"]["labels"][names.LABEL_TYPE] == kind]

    def run_pods(self) -> None:
        for pod in self.pods():
            pod["status"] = {
                "phase": "Running", "podIP": "198.18.0.9", "conditions": [{"type": "Ready", "status": "True"}],
            }

    def settle(self) -> None:
        for _ in range(10):
            if not controller.reconcile(self, KEY):  # type: ignore[arg-type]
                return
        raise AssertionError("the controller does not come to rest")

    def conditions(self) -> dict[str, tuple[str, str]]:
        found = self.objects[self.cluster_path]["status"]["conditions"]
        return {condition["type"]: (condition["status"], condition["reason"]) for condition in found}

    def state(self) -> str | None:
        found: str | None = self.objects[self.cluster_path]["status"].get("state")
        return found


@pytest.fixture
def api() -> MemoryApi:
    return MemoryApi(ray_cluster())


def ready(api: MemoryApi) -> MemoryApi:
    api.settle()
    api.run_pods()
    api.settle()
    return api


# --- pods -------------------------------------------------------------------------------------------------------


def environment(container: Object) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def test_head_keeps_the_driver_untouched_and_gets_ray() -> None:
    cluster = ray_cluster()
    pod = pods.head_pod(cluster)
    ray, driver = pod["spec"]["containers"]
    assert driver == cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][1]
    assert ray["command"] == ["/bin/bash", "-c", "--"]
    assert "ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0" in ray["args"][0]
    assert "--num-gpus=0" in ray["args"][0]
    assert environment(ray)["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert {"name": "shared-mem", "mountPath": "/dev/shm"} in ray["volumeMounts"]
    assert pod["metadata"]["generateName"] == "demo-head-"
    assert pod["metadata"]["ownerReferences"][0]["uid"] == "u1"


def test_worker_takes_its_resources_from_the_container_and_finds_the_head_by_address() -> None:
    cluster = ray_cluster()
    pod = pods.worker_pod(cluster, cluster["spec"]["workerGroupSpecs"][0], "198.19.0.7")
    ray = pod["spec"]["containers"][0]
    for flag in ("--address=198.19.0.7:6379", "--num-cpus=2", "--num-gpus=2", "--memory=2147483648"):
        assert flag in ray["args"][0]
    assert environment(ray)["FQ_RAY_IP"] == "198.19.0.7"
    assert [container["name"] for container in pod["spec"]["initContainers"]] == ["wait-gcs-ready"]
    assert pod["metadata"]["labels"][names.LABEL_GROUP] == "gpu"
    assert pod["metadata"]["generateName"] == "demo-gpu-worker-"


def test_the_container_that_waits_is_as_restricted_as_ray() -> None:
    cluster = ray_cluster()
    template = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    template["containers"][0]["securityContext"] = {"allowPrivilegeEscalation": False}
    template["securityContext"] = {"runAsNonRoot": True}
    pod = pods.worker_pod(cluster, cluster["spec"]["workerGroupSpecs"][0], "a")
    assert pod["spec"]["securityContext"] == {"runAsNonRoot": True}
    assert pod["spec"]["initContainers"][0]["securityContext"] == {"allowPrivilegeEscalation": False}


def test_template_is_not_changed() -> None:
    cluster = ray_cluster()
    before = copy.deepcopy(cluster)
    pods.head_pod(cluster)
    pods.worker_pod(cluster, cluster["spec"]["workerGroupSpecs"][0], "a")
    assert cluster == before


@pytest.mark.parametrize(("mode", "expected"), [("token", True), ("disabled", False), (None, False)])
def test_token_variables_need_the_mode_to_be_written(mode: str | None, expected: bool) -> None:
    cluster = ray_cluster(authOptions={"mode": mode} if mode else {})
    ray = pods.head_pod(cluster)["spec"]["containers"][0]
    assert ("RAY_AUTH_TOKEN" in environment(ray)) is expected


def test_own_start_command_is_kept_on_request() -> None:
    cluster = ray_cluster()
    cluster["metadata"]["annotations"] = {names.OVERWRITE_COMMAND: "true"}
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["command"] = ["mine"]
    ray = pods.head_pod(cluster)["spec"]["containers"][0]
    assert ray["command"] == ["mine"]
    assert environment(ray)["KUBERAY_GEN_RAY_START_CMD"].startswith("ray start --head")


def test_template_labels_do_not_override_what_selects() -> None:
    cluster = ray_cluster()
    cluster["spec"]["headGroupSpec"]["template"]["metadata"] = {"labels": {names.LABEL_TYPE: "worker", "team": "x"}}
    labels = pods.head_pod(cluster)["metadata"]["labels"]
    assert (labels[names.LABEL_TYPE], labels["team"]) == ("head", "x")


@pytest.mark.parametrize(
    ("resource", "seen"),
    [
        ("nvidia.com/gpu", True), ("amd.com/gpu", True), ("nvidia.com/mig-1g.5gb", True),
        ("nvidia.com/gpu.shared", False), ("cpu", False)
    ],
)
def test_gpu_names_are_those_kuberay_sees(resource: str, seen: bool) -> None:
    assert pods.is_gpu(resource) is seen


def test_service_exposes_only_declared_ports_and_metrics() -> None:
    cluster = ray_cluster()
    container = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert [port["name"] for port in objects.head_service(cluster)["spec"]["ports"]] == sorted(names.PORTS)
    container["ports"] = [{"name": "dashboard", "containerPort": 8265}, {"name": "driver", "containerPort": 8266}]
    assert [
        port["name"] for port in objects.head_service(cluster)["spec"]["ports"]
    ] == ["dashboard", "driver", "metrics"]


# --- validation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headGroupSpec": {"template": {"spec": {"containers": []}}}}, "at least one container"),
        ({"enableInTreeAutoscaling": True}, "does not implement spec.enableInTreeAutoscaling"),
        ({"gcsFaultToleranceOptions": {"redisAddress": "x"}}, "does not implement spec.gcsFaultToleranceOptions"),
    ],
)
def test_invalid_spec(change: dict[str, Any], message: str) -> None:
    assert message in str(checks.invalid_spec(ray_cluster(**change)))


def test_worker_group_bounds() -> None:
    cluster = ray_cluster()
    cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 1
    assert checks.invalid_spec(cluster) == "worker group gpu has minReplicas 2 greater than maxReplicas 1"


def test_invalid_name_is_an_event_and_nothing_else(api: MemoryApi) -> None:
    api.objects[api.cluster_path]["metadata"]["name"] = "x" * 54
    assert controller.reconcile(api, KEY) is False  # type: ignore[arg-type]
    assert api.writes == ["create events InvalidRayClusterMetadata"]


# --- life -------------------------------------------------------------------------------------------------------


def test_ready_when_every_pod_is(api: MemoryApi) -> None:
    api.settle()
    assert (len(api.pods("head")), len(api.pods("worker"))) == (1, 2)
    assert api.state() is None
    api.run_pods()
    api.settle()
    assert api.state() == "ready"
    assert api.conditions()[names.PROVISIONED] == ("True", "AllPodRunningAndReadyFirstTime")
    assert api.objects[api.cluster_path]["status"]["head"]["serviceIP"] == "198.19.0.7"


def test_no_write_while_nothing_changes(api: MemoryApi) -> None:
    ready(api).writes.clear()
    api.objects[api.cluster_path]["metadata"]["generation"] = 2  # observedGeneration alone is not worth a write
    api.settle()
    assert api.writes == []


def test_ready_never_reverts(api: MemoryApi) -> None:
    ready(api)
    for pod in api.pods("worker"):
        pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    api.settle()
    assert api.state() == "ready"
    assert api.conditions()[names.PROVISIONED][0] == "True"
    assert api.objects[api.cluster_path]["status"]["readyWorkerReplicas"] == 0


def test_provisioned_does_not_count_pods(api: MemoryApi) -> None:
    api.settle()
    for path in [path for path in api.objects if "-worker-" in path]:
        del api.objects[path]
    api.refuse = {"pods"}
    api.run_pods()
    controller.reconcile(api, KEY)  # type: ignore[arg-type]
    assert api.conditions()[names.PROVISIONED][0] == "True"
    assert api.conditions()[names.REPLICA_FAILURE] == ("True", "FailedCreateWorkerPod")
    api.refuse = set()
    api.settle()
    assert names.REPLICA_FAILURE not in api.conditions()


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_ended_pods_are_recreated(api: MemoryApi, phase: str) -> None:
    ready(api)
    victim = api.pods("worker")[0]
    victim["status"]["phase"] = phase
    api.settle()
    assert len(api.pods("worker")) == 2
    assert victim["metadata"]["name"] not in [pod["metadata"]["name"] for pod in api.pods()]


@pytest.mark.parametrize(("policy", "deleted"), [("Never", True), ("OnFailure", False)])
def test_ended_ray_container_restarts_in_place_where_it_may(api: MemoryApi, policy: str, deleted: bool) -> None:
    ready(api)
    head = api.pods("head")[0]
    head["spec"]["restartPolicy"] = policy
    head["status"]["containerStatuses"] = [{"name": "ray-head", "state": {"terminated": {"reason": "OOMKilled"}}}]
    api.settle()
    assert (api.pods("head")[0]["metadata"]["name"] != head["metadata"]["name"]) is deleted


def test_lost_head_stays_away_with_the_annotation(api: MemoryApi) -> None:
    ready(api)
    api.objects[api.cluster_path]["metadata"]["annotations"] = {names.NO_HEAD_RESTART: "true"}
    for path in [path for path in api.objects if "/pods/" in path]:
        del api.objects[path]
    api.settle()
    assert api.pods() == []
    assert api.conditions()[names.HEAD_READY] == ("False", "HeadPodNotFound")


def test_suspension_and_resumption(api: MemoryApi) -> None:
    spec = ready(api).objects[api.cluster_path]["spec"]
    spec["suspend"] = True
    api.settle()
    assert (api.pods(), api.state()) == ([], "suspended")
    assert api.conditions()[names.SUSPENDED][0] == "True"
    assert api.conditions()[names.PROVISIONED][0] == "False"
    del spec["suspend"]  # does not resume
    api.settle()
    assert api.pods() == []
    spec["suspend"] = False
    api.settle()
    assert len(api.pods()) == 3
    assert api.state() == "suspended"  # until it is ready
    api.run_pods()
    api.settle()
    assert api.state() == "ready"


def test_template_edits_are_ignored_and_replicas_are_not(api: MemoryApi) -> None:
    group = ready(api).objects[api.cluster_path]["spec"]["workerGroupSpecs"][0]
    group["template"]["spec"]["containers"][0]["image"] = "other"
    group |= {"replicas": 3, "maxReplicas": 3}
    api.settle()
    assert sorted(pod["spec"]["containers"][0]["image"] for pod in api.pods("worker")) == ["i", "i", "other"]
    group |= {"replicas": 1, "minReplicas": 1}
    api.settle()
    assert len(api.pods("worker")) == 1


def test_another_manager_s_cluster_is_left_alone(api: MemoryApi) -> None:
    api.objects[api.cluster_path]["spec"]["managedBy"] = "kueue.x-k8s.io/multikueue"
    assert controller.reconcile(api, KEY) is False  # type: ignore[arg-type]
    assert api.writes == []


def test_head_condition_names_the_container_that_does_not_run() -> None:
    waiting = {"name": "driver", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    unready = {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "unready: [driver]"}
    condition = status.head_condition({"status": {"conditions": [unready], "containerStatuses": [waiting]}})
    assert (condition["reason"], condition["message"]) == ("ImagePullBackOff", "unready: [driver]; driver: no such "
        "image")
