"""Up, down and status of the embedded cluster: one node in its own network, PID and mount namespaces."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

from hack.cluster import binaries, cgroups, components, machine, network, runtime
from hack.cluster.components import Component, Link
from hack.cluster.kube import Api, ApiError
from hack.cluster.settings import GPU_RESOURCE, LOGICAL_GPUS, Settings
from hack.cluster.steps import ClusterError, Unsupported, output, say, step, wait_for


def up(cfg: Settings) -> None:
    """Start the cluster, or return at once when it is healthy. Raises ClusterError; leaves nothing running on failure.
    """
    check_machine(cfg)
    if _pid(cfg) is not None:
        _keep_running(cfg)
        return
    down(cfg)
    try:
        _start(cfg)
    except BaseException:
        _end_processes(cfg)  # the logs stay, for whoever reads the message
        cgroups.remove(cfg.cgroup)
        raise


def down(cfg: Settings) -> None:
    """End the namespaces' first process and remove what the cluster left outside them. Works on half a cluster too."""
    _end_processes(cfg)
    cgroups.remove(cfg.cgroup)
    network.remove(cfg.link)
    shutil.rmtree(cfg.state, ignore_errors=True)


def status(cfg: Settings) -> bool:
    """Print what runs; return whether the cluster is healthy."""
    pid = _pid(cfg)
    if pid is None:
        say(f"{cfg.name}: not running")
        return False
    healthy = _node_ready(cfg)
    say(f"{cfg.name}: {'ready' if healthy else 'not ready'}, process {pid}, KUBECONFIG={cfg.kubeconfig}, logs in "
        f"{cfg.logs}")
    return healthy


# --- preconditions ----------------------------------------------------------------------------------------------


def check_machine(cfg: Settings) -> None:
    """Raise Unsupported, naming everything that is missing."""
    if missing := machine.missing():
        remedy = ("use CLUSTER=kind or CLUSTER=current, or run the manifest without Kubernetes: python -m rlhf_worker "
            "local <manifest>")
        raise Unsupported(f"an embedded cluster needs {', '.join(missing)}, which this machine does not give", remedy)
    if not (cfg.venv / "bin" / "python").exists():
        raise ClusterError(f"there is no Python environment at {cfg.venv}, and the pods run from it", "make setup")


def _keep_running(cfg: Settings) -> None:
    recorded = json.loads((cfg.state / "choice.json").read_text())
    if recorded != _choice(cfg):
        words = f"the running cluster was started with {recorded}, now asked for {_choice(cfg)}"
        raise ClusterError(words, "make cluster-down first")
    with step("the cluster runs already: checking it"):
        wait_for("the node's Ready condition", lambda: _node_ready(cfg), 60, f"see {cfg.logs}, or make cluster-down "
            "and up again")


def _choice(cfg: Settings) -> dict[str, str]:
    return {
        "kuberay": str(cfg.kuberay_operator or "stand-in"), "schema": str(cfg.kuberay_schema), "python": str(cfg.venv),
    }


# --- up ---------------------------------------------------------------------------------------------------------


def _start(cfg: Settings) -> None:
    cfg.logs.mkdir(parents=True)
    debian = binaries.ensure(cfg)
    with step("configuration, namespaces and network"):
        link = network.free_link(cfg.name)
        tokens = {who.name: secrets.token_hex(24) for who in components.identities(cfg.name)}
        _write_static(cfg, link, tokens, debian)
        cgroups.make(cfg.cgroup)
        _start_supervisor(cfg, link)
    _step_api_server(cfg, link, tokens)
    with step("images"):
        _import_images(cfg)
    with step("RayCluster schema"):
        _install_kuberay_schema(cfg)
    with step(f"node {cfg.name} ready, with {LOGICAL_GPUS} logical GPUs"):
        wait_for("the node's Ready condition", lambda: _node_ready(cfg), 90, f"see {cfg.logs}/kubelet.log and "
            "containerd.log")
    say(f"ready: export KUBECONFIG={cfg.kubeconfig}")


def _write_static(cfg: Settings, link: Link, tokens: dict[str, str], debian: Path) -> None:
    """Every file that the parts read at start."""
    state, path, libraries = cfg.state, _search_path(cfg, debian), _library_path(debian)
    for name in ("credentials", "pki", "cni", "kubelet", "var-lib", "var-log"):
        (state / name).mkdir(exist_ok=True)
    (state / "credentials").chmod(0o700)
    for shared in (cfg.volumes, cfg.pods_cache):
        shared.mkdir(parents=True, exist_ok=True)
        shared.chmod(0o1777)  # pods of any user keep their files there, as on a shared disk
    _write_private(state / "credentials" / "tokens.csv", components.token_file(tokens, cfg.name))
    runc = shutil.which("runc", path=path)
    if runc is None:
        raise ClusterError("runc is not among the unpacked packages", f"remove {debian} and run it again")
    default = json.loads(output(["ctr", "oci", "spec"], "see the message of ctr", env=dict(os.environ, PATH=path)))
    binds = runtime.read_only_binds(cfg)
    files = {
        "audit-policy.json": components.audit_policy(),
        "kubelet.json": json.dumps(components.kubelet_config(cfg, link), indent=1),
        "kube-proxy.json": json.dumps(components.kube_proxy_config(cfg), indent=1),
        "containerd.toml": components.containerd_config(cfg, runc, str(_plugins(debian))),
        "cni/10-pods.conflist": json.dumps(components.network_config(), indent=1),
        "base-spec.json": json.dumps(runtime.base_spec(default, binds, cfg.pods_cache), indent=1),
        "Corefile": components.corefile(cfg, link),
        "resolv.conf": "",
        "choice.json": json.dumps(_choice(cfg)),
        "plan.json": json.dumps(
            {
                "node": link.node,
                "host": link.host,
                "path": path,
                "library_path": libraries,
                "components": [part.plain() for part in _components(cfg, link)],
            },
            indent=1,
        ),
    }
    for name, text in files.items():
        (state / name).write_text(text)


def _components(cfg: Settings, link: Link) -> list[Component]:
    python = str(cfg.venv / "bin" / "python")
    parts = [*components.node(cfg, link), *components.control_plane(cfg, link)]
    parts += [*components.keepers(cfg, link, python), *components.kuberay(cfg, link, python)]
    # Their kubeconfigs name the API server's certificate, which it makes at its first start.
    return [replace(part, needs=_credential(cfg, part)) for part in parts]


def _credential(cfg: Settings, part: Component) -> str | None:
    return str(cfg.state / "credentials" / "complete") if part.after and part.after[1] == 6443 else None


def _search_path(cfg: Settings, debian: Path) -> str:
    unpacked = [debian / name for name in ("usr/bin", "usr/sbin", "sbin", "bin")]
    return ":".join([*map(str, (cfg.bin, *unpacked)), os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")])


def _library_path(debian: Path) -> str:
    return ":".join(str(path) for path in sorted((debian / "usr" / "lib").glob("*-linux-gnu*")))


def _plugins(debian: Path) -> Path:
    for path in (debian / "usr/lib/cni", Path("/opt/cni/bin"), Path("/usr/lib/cni")):
        if (path / "ptp").exists():
            return path
    raise ClusterError("the container network plugins are missing", f"remove {debian} and run it again")


def _start_supervisor(cfg: Settings, link: Link) -> None:
    """Start process 1 of the namespaces and give it its end of the veth pair."""
    command = [*machine.UNSHARE, str(cfg.venv / "bin" / "python"), "-m", "hack.cluster.supervisor", str(cfg.state)]
    with (cfg.logs / "supervisor.log").open("ab") as log:
        outer = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cfg.clone, start_new_session=True,
            env=_plain_environment(cfg)
        )
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    wait_for(
        "the namespaces' first process", lambda: outer.poll() is not None or bool(_text(children).strip()), 20,
        f"see {cfg.logs}",
    )
    if outer.poll() is not None:
        raise ClusterError(
            f"unshare exited {outer.returncode}: {_text(cfg.logs / 'supervisor.log')}", "see the message",
        )
    pid = int(_text(children).split()[0])
    (cfg.state / "process").write_text(f"{pid} {_started(pid)}")
    network.connect(cfg.link, link, pid)


def _plain_environment(cfg: Settings) -> dict[str, str]:
    """What the parts inherit: no proxy, no Python or Kubernetes variables of the shell that ran `up`."""
    return {"PATH": os.environ.get("PATH", ""), "HOME": "/root", "LANG": "C.UTF-8", "PYTHONPATH": str(cfg.clone)}


def _step_api_server(cfg: Settings, link: Link, tokens: dict[str, str]) -> None:
    with step("API server"):
        certificate = cfg.state / "pki" / "apiserver.crt"
        see = f"see {cfg.logs}/kube-apiserver.log and etcd.log"
        wait_for("the API server's certificate", lambda: certificate.exists() and "END" in _text(certificate), 60, see)
        ca = base64.b64encode(certificate.read_bytes()).decode()
        for name, token in tokens.items():
            text = components.kubeconfig(components.api_server_url(link), ca, token)
            _write_private(cfg.kubeconfig if name == "admin" else cfg.state / "credentials" / name, text)
        (cfg.state / "credentials" / "complete").touch()
        wait_for("the API server", Api.from_kubeconfig(cfg.kubeconfig).ready, 90, see)


def _import_images(cfg: Settings) -> None:
    inside = ["nsenter", "--target", str(_pid(cfg)), "--mount", "--pid", "--net"]
    ctr = [*inside, str(cfg.bin / "ctr"), "--address", components.CONTAINERD_SOCKET, "--namespace", "k8s.io"]
    see = f"see {cfg.logs}/containerd.log"
    wait_for(
        "containerd", lambda: subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode == 0, 30,
        see,
    )
    archive = cfg.state / "image.tar"
    for image in runtime.images(cfg):
        archive.write_bytes(runtime.archive(image))
        output([*ctr, "images", "import", "--local", "--snapshotter", "native", str(archive)], see)
    archive.unlink()


def _install_kuberay_schema(cfg: Settings) -> None:
    """The RayCluster CRD: KubeRay's own where it is to be had, else the stand-in's small one."""
    schema = cfg.kuberay_schema or Path(__file__).parent / "kuberay_standin" / "raycluster.json"
    say(f"    from {schema}")
    kubectl = shutil.which("kubectl", path=f"{cfg.bin}:{os.environ.get('PATH', '')}") or "kubectl"
    apply = [kubectl, f"--kubeconfig={cfg.kubeconfig}", "apply", "--server-side", "--filename", str(schema)]
    output(apply, "see the message of kubectl")


def _node_ready(cfg: Settings) -> bool:
    try:
        node = Api.from_kubeconfig(cfg.kubeconfig).get(f"/api/v1/nodes/{cfg.name}")
    except (ApiError, OSError):
        return False
    ready = any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in node["status"]["conditions"]
    )
    return ready and node["status"]["allocatable"].get(GPU_RESOURCE) == str(LOGICAL_GPUS)


# --- down -------------------------------------------------------------------------------------------------------


def _pid(cfg: Settings) -> int | None:
    """The namespaces' first process, if it lives and is not another process that got the same number."""
    recorded = _text(cfg.state / "process").split()
    if len(recorded) == 2 and _started(int(recorded[0])) == recorded[1]:
        return int(recorded[0])
    return None


def _started(pid: int) -> str:
    """Start time of a process in clock ticks (field 22 of /proc/<pid>/stat), or "" if it is gone or a zombie."""
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return "" if not fields or fields[0] == "Z" else fields[19]


def _end_processes(cfg: Settings) -> None:
    pid = _pid(cfg)
    if pid is None:
        return
    os.kill(pid, signal.SIGKILL)
    wait_for(f"the end of process {pid}", lambda: _pid(cfg) is None, 30, f"look at it: ps -p {pid}")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
