"""Every planned pod meets the restricted Pod Security Standard, and what makes one break it is the user's own word.

https://kubernetes.io/docs/concepts/security/pod-security-standards: the controls of Baseline and Restricted for Linux
pods. """

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.api.specs import a_job
from tests.control.test_plan import SAMPLES, SEPARATED, containers, made_pods, planned

Raw = dict[str, Any]
VOLUMES = {
    "name",
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip
SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
HOOKS = ("livenessProbe", "readinessProbe", "startupProbe")


def at(node: Any, path: str) -> Any:
    """What lies at a dotted path, None for what is not there."""
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def own_or_pods(pod: Raw, container: Raw, field: str) -> Any:
    own = at(container, f"securityContext.{field}")
    return at(pod, f"spec.securityContext.{field}") if own is None else own


def hook_hosts(container: Raw) -> list[str]:
    probes = [container.get(hook) for hook in HOOKS] + [
        at(container, f"lifecycle.{when}") for when in ("preStop", "postStart")
    ]
    return [host for probe in probes for action in ("httpGet", "tcpSocket") if (host := at(probe, f"{action}.host"))]


# Control -> whether the pod meets it.
OF_PODS: dict[str, Callable[[Raw], bool]] = {
    "Host Namespaces": lambda pod: not any(at(pod, f"spec.{field}") for field in ("hostNetwork", "hostPID", "hostIPC")),
    "Volume Types": lambda pod: all(set(volume) <= VOLUMES for volume in pod["spec"].get("volumes", [])),
    "SELinux": lambda pod: selinux(at(pod, "spec.securityContext.seLinuxOptions")),
    "Sysctls": lambda pod: {one["name"] for one in at(pod, "spec.securityContext.sysctls") or []} <= SYSCTLS,
}
# Control -> whether the pod's container meets it.
OF_CONTAINERS: dict[str, Callable[[Raw, Raw], bool]] = {
    "Privileged Containers": lambda pod, c: not at(c, "securityContext.privileged"),
    "Capabilities": lambda pod, c: capabilities(at(c, "securityContext.capabilities") or {}),
    "Host Ports": lambda pod, c: not any(port.get("hostPort") for port in c.get("ports", [])),
    "Host Probes": lambda pod, c: not hook_hosts(c),
    "AppArmor": lambda pod, c: own_or_pods(pod, c, "appArmorProfile.type") in (None, "RuntimeDefault", "Localhost"),
    "SELinux": lambda pod, c: selinux(at(c, "securityContext.seLinuxOptions")),
    "/proc Mount Type": lambda pod, c: at(c, "securityContext.procMount") in (None, "Default"),
    "Seccomp": lambda pod, c: own_or_pods(pod, c, "seccompProfile.type") in ("RuntimeDefault", "Localhost"),
    "Privilege Escalation": lambda pod, c: at(c, "securityContext.allowPrivilegeEscalation") is False,
    "Running as Non-root": lambda pod, c: own_or_pods(pod, c, "runAsNonRoot") is True,
    "Running as Non-root user": lambda pod, c: own_or_pods(pod, c, "runAsUser") != 0,
}


def capabilities(given: Raw) -> bool:
    return "ALL" in given.get("drop", []) and set(given.get("add", [])) <= {"NET_BIND_SERVICE"}


def selinux(options: Raw | None) -> bool:
    return at(options, "type") in SELINUX and not at(options, "user") and not at(options, "role")


def broken(cluster: Raw) -> Iterator[tuple[str, str]]:
    """Control, and where it is broken."""
    for pod in made_pods(cluster):
        yield from ((control, pod["metadata"]["generateName"]) for control, met in OF_PODS.items() if not met(pod))
        for container in containers(pod):
            yield from (
                (control, container["name"]) for control, met in OF_CONTAINERS.items() if not met(pod, container)
            )


def controls(raw: Raw) -> set[str]:
    return {control for control, _ in broken(planned(raw)["RayCluster"])}


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.stem for sample in SAMPLES])
def test_a_samples_pods_are_restricted_but_for_the_nodes_files_that_it_mounts(sample: Path) -> None:
    (raw,) = [d for d in yaml.safe_load_all(sample.read_text()) if d]
    mounts_node = any("hostPath" in volume for pod in raw["spec"]["pods"].values() for volume in pod.get("volumes", []))
    assert controls(raw) == ({"Volume Types"} if mounts_node else set())


@pytest.mark.parametrize(
    "changes", [{}, SEPARATED, {"checkpoint__claim": {"size": "1Gi"}}, {"checkpoint__path": "s3://bucket/run"}]
)
def test_every_pod_is_restricted(changes: Raw) -> None:
    assert list(broken(planned(a_job(**changes))["RayCluster"])) == []


def test_kuberays_own_container_is_among_them() -> None:
    names = {container["name"] for pod in made_pods(planned(a_job())["RayCluster"]) for container in containers(pod)}
    assert names == {"ray", "driver", "wait-gcs-ready"}


@pytest.mark.parametrize(
    ("user", "broken_controls"),
    [
        ({"ipcLock": True}, {"Capabilities"}),
        ({"containerSecurityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}, {"Capabilities"}),
        ({"containerSecurityContext": {"capabilities": {"drop": []}}}, {"Capabilities"}),
        ({"containerSecurityContext": {"capabilities": {"add": ["NET_BIND_SERVICE"]}}}, set()),
        ({"containerSecurityContext": {"privileged": True}}, {"Privileged Containers"}),
        ({"containerSecurityContext": {"allowPrivilegeEscalation": True}}, {"Privilege Escalation"}),
        (
            {"containerSecurityContext": {"runAsUser": 0, "runAsNonRoot": False}},
            {"Running as Non-root", "Running as Non-root user"},
        ),
        ({"containerSecurityContext": {"procMount": "Unmasked"}}, {"/proc Mount Type"}),
        ({"containerSecurityContext": {"readOnlyRootFilesystem": True}}, set()),
        ({"securityContext": {"runAsUser": 0}}, {"Running as Non-root user"}),
        ({"securityContext": {"runAsUser": 1000, "fsGroup": 1000}}, set()),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, {"Seccomp"}),
        ({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, {"Sysctls"}),
        ({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}, {"AppArmor"}),
        ({"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}, {"SELinux"}),
        ({"securityContext": None}, {"Seccomp", "Running as Non-root"}),
        ({"hostNetwork": True}, {"Host Namespaces"}),
        ({"volumes": [{"name": "node", "hostPath": {"path": "/"}}]}, {"Volume Types"}),
    ],
)
def test_what_the_user_asks_for_decides(user: Raw, broken_controls: set[str]) -> None:
    for kind in ("head", "trainer"):
        assert controls(a_job(pods={kind: user})) == broken_controls, kind


def test_the_users_context_is_added_to_ours() -> None:
    user = {"securityContext": {"fsGroup": 1000}, "containerSecurityContext": {"runAsUser": 1000}, "ipcLock": True}
    head, _ = made_pods(planned(a_job(pods={"head": user}))["RayCluster"])
    assert head["spec"]["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    for container in containers(head):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
            "runAsUser": 1000,
        }  # fmt: skip
