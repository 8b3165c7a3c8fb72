"""The embedded cluster itself: one of its own, beside whatever cluster this clone runs, up from nothing and away again.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hack.cluster import embedded, network, settings
from hack.cluster.binaries import module_text
from hack.cluster.kube import Api, ApiError
from hack.cluster.steps import ClusterError
from tests.cluster.waiting import wait_for

RAY_CLUSTER = Path(__file__).with_name("raycluster.json")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[settings.Settings]:
    mine = replace(settings.from_environment(), name="self-test", state=tmp_path_factory.mktemp("c") / "s")
    embedded.up(mine)
    yield mine
    embedded.down(mine)
    assert leftovers(mine) == []


def leftovers(cfg: settings.Settings) -> list[str]:
    """What of a cluster can be seen from outside of it."""
    links = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout)
    found = [link["ifname"] for link in links if link["ifname"] == cfg.link]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{cfg.cgroup}")]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(cfg.state) in line]
    found += [
        str(path) for path in (cfg.state, Path("/run/containerd"), Path("/var/lib/kubelet"), Path("/var/log/pods"))
        if path.exists()
    ]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [command] if str(cfg.state) in (command := process.read_text()) and "pytest" not in command else []
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.fixture(scope="module")
def api(cfg: settings.Settings) -> Api:
    return Api.from_kubeconfig(cfg.kubeconfig)


def run_pod(api: Api, name: str, image: str, script: str, **spec: Any) -> str:
    """Run a script with bash in a pod to its end; returns its log."""
    container = {
        "name": "c", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["bash", "-c", script],
    } | spec.pop(
        "container", {}
    )
    path = "/api/v1/namespaces/default/pods"
    wait_for(lambda: api.find("/api/v1/namespaces/default/serviceaccounts/default"), 30, "the default ServiceAccount")
    api.create(
        path, {"metadata": {"name": name}, "spec": {"restartPolicy": "Never", "containers": [container], **spec}},
    )

    def ended() -> str | None:
        phase: str = api.get(f"{path}/{name}")["status"]["phase"]
        return phase if phase in ("Succeeded", "Failed") else None

    phase = wait_for(ended, 60, lambda: json.dumps(api.get(f"{path}/{name}")["status"]))
    log = api.text(f"{path}/{name}/log")
    assert phase == "Succeeded", log
    return log


# --- the machine's side -----------------------------------------------------------------------------------------


def test_second_up_returns_with_the_same_processes(cfg: settings.Settings) -> None:
    before = (cfg.state / "process").read_text()
    embedded.up(cfg)
    assert (cfg.state / "process").read_text() == before


def test_up_with_other_choices_is_refused_and_touches_nothing(cfg: settings.Settings) -> None:
    with pytest.raises(ClusterError, match="started with") as error:
        embedded.up(replace(cfg, kuberay_operator=Path("/bin/true")))
    assert "cluster-down" in error.value.remedy
    assert embedded.status(cfg)


def test_nothing_of_the_node_shows_on_this_machine(cfg: settings.Settings) -> None:
    seen = [
        line for line in leftovers(cfg) if not line.startswith(("/sys/fs/cgroup", str(cfg.state))) and "\0" not in line
    ]
    assert seen == [cfg.link]


def test_addresses_of_two_clusters_differ() -> None:
    assert network.free_link("one") != network.free_link("two")


def test_each_staging_module_is_replaced() -> None:
    upstream = ("go 1.26.0\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n\tk8s.io/cri-api => "
        "./staging/src/k8s.io/cri-api\n)\n")
    module = module_text({"k8s.io/kubernetes": settings.KUBERNETES}, upstream)
    version = "v0" + settings.KUBERNETES.removeprefix("v1")
    assert [line.strip() for line in module.splitlines() if "=>" in line] == [
        f"k8s.io/{name} => k8s.io/{name} {version}" for name in ("api", "cri-api")
    ]


# --- pods -------------------------------------------------------------------------------------------------------


def test_worker_image_runs_this_environment_read_only(api: Api, cfg: settings.Settings) -> None:
    script = (f"set -e; python -c 'import rlhf_worker, sys; print(sys.prefix)'; ! touch {cfg.clone}/api/x 2>/dev/null; "
        f"touch /tmp/y; ls {cfg.clone}")
    log = run_pod(api, "environment", settings.WORKER_IMAGE, script).split()
    assert log[0] == str(cfg.venv)
    assert ".cluster" not in log


def test_operator_image_runs_as_nobody_with_a_read_only_root(api: Api) -> None:
    secure = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    log = run_pod(
        api,
        "restricted",
        settings.OPERATOR_IMAGE,
        "id -u; python -c 'import rlhf_operator'",
        container={"securityContext": secure},
        securityContext={"runAsNonRoot": True},
    )
    assert log.split() == ["65532"]


def test_node_s_volumes_are_this_machine_s(api: Api, cfg: settings.Settings) -> None:
    volume = {"name": "v", "hostPath": {"path": "/var/lib/rlhf", "type": "DirectoryOrCreate"}}
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    run_pod(api, "volume", settings.WORKER_IMAGE, "echo saved > /v/checkpoint", container=mount, volumes=[volume])
    assert (cfg.volumes / "checkpoint").read_text() == "saved\n"


def test_a_claim_is_a_directory_of_this_machine_that_a_pod_without_rights_writes(
    api: Api, cfg: settings.Settings,
) -> None:
    path = "/api/v1/namespaces/default/persistentvolumeclaims"
    asked = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    api.create(path, {"metadata": {"name": "mine"}, "spec": asked})
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "mine"}}]
    secure = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"volumeMounts": [{"name": "v", "mountPath": "/v"}], "securityContext": secure}
    rights = {"runAsNonRoot": True, "runAsUser": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    script = "echo saved > /v/checkpoint"
    run_pod(api, "claims", settings.WORKER_IMAGE, script, container=container, volumes=volumes, securityContext=rights)
    directory = cfg.volumes / "claims" / "default-mine"
    assert (directory / "checkpoint").read_text() == "saved\n"
    api.delete("/api/v1/namespaces/default/pods/claims")
    api.delete(f"{path}/mine")
    wait_for(lambda: not directory.exists(), 60, "the volume of a deleted claim goes")


def test_pods_reach_the_api_server_by_service_and_a_name_is_refused_at_once(api: Api) -> None:
    script = """python - <<'P'
import os, socket, time
service = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
socket.create_connection(service, timeout=10)
start = time.monotonic()
try:
    socket.getaddrinfo("no-such-name", 80)
except socket.gaierror:
    print("refused" if time.monotonic() - start < 4 else "timed out")
P"""
    assert run_pod(api, "network", settings.WORKER_IMAGE, script).strip() == "refused"


def test_gpus_are_counted_and_survive_the_kubelet(api: Api, cfg: settings.Settings) -> None:
    kubelet = next(
        int(
            path.parent.name
        ) for path in Path("/proc").glob("[0-9]*/cmdline") if f"--config={cfg.state}/kubelet.json" in text(path)
    )
    subprocess.run(["kill", str(kubelet)], check=True)
    wait_for(lambda: "kubelet ended" in (cfg.logs / "supervisor.log").read_text(), 20, "the supervisor's word on the "
        "kubelet")
    wait_for(lambda: embedded.status(cfg), 60, "the node with its GPUs")
    limits = {"resources": {"limits": {"nvidia.com/gpu": settings.LOGICAL_GPUS}}}
    run_pod(api, "gpus", settings.WORKER_IMAGE, "true", container=limits)
    pod = {
        "name": "c", "image": settings.WORKER_IMAGE,
        "resources": {"limits": {"nvidia.com/gpu": settings.LOGICAL_GPUS + 1}},
    }
    path = "/api/v1/namespaces/default/pods"
    api.create(path, {"metadata": {"name": "too-many"}, "spec": {"containers": [pod]}})
    wait_for(lambda: unschedulable(api.get(f"{path}/too-many")), 30, "the scheduler's refusal of nine GPUs")
    api.delete(f"{path}/too-many")


def text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def unschedulable(pod: dict[str, Any]) -> bool:
    return any(condition.get("reason") == "Unschedulable" for condition in pod["status"].get("conditions", []))


def test_wrong_token_is_refused(api: Api) -> None:
    with pytest.raises(ApiError) as error:
        replace(api, token="guessed").get("/api/v1/nodes")
    assert error.value.code == 401


# --- Ray --------------------------------------------------------------------------------------------------------


def test_ray_cluster_comes_up_and_its_driver_reaches_the_gpu(api: Api) -> None:
    path = "/apis/ray.io/v1/namespaces/default/rayclusters"
    api.create(path, json.loads(RAY_CLUSTER.read_text()))
    wait_for(
        lambda: api.get(f"{path}/demo").get("status", {}).get("state") == "ready",
        180,
        lambda: json.dumps(api.get(f"{path}/demo")["status"]),
    )
    head = api.get(f"{path}/demo")["status"]["head"]["podName"]

    def log() -> str:
        return str(api.text(f"/api/v1/namespaces/default/pods/{head}/log?container=driver"))

    wait_for(lambda: "placed on demo-gpu-worker" in log(), 120, log)
    api.delete(f"{path}/demo")
    gone = "/api/v1/namespaces/default/pods?labelSelector=ray.io%2Fcluster%3Ddemo"
    wait_for(lambda: not api.get(gone)["items"], 60, "the end of the pods")
