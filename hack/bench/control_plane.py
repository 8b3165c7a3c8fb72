"""A control plane without a node: the embedded cluster's etcd, API server and controller manager, and no kubelet.

It has network, PID and mount namespaces of its own: ports are free, /run is a tmpfs, and all ends with the benchmark.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from hack.bench.usage import Usage, usage
from hack.cluster import binaries, components, settings
from hack.cluster.components import Component, Identity, Link
from hack.cluster.kube import Api, ApiError, Object
from hack.cluster.steps import ClusterError, output, say, wait_for

ADDRESS = "198.19.128.1"  # of the loopback device: an API server may not advertise 127.0.0.1
STANDIN_SCHEMA = Path(components.__file__).parent / "kuberay_standin" / "raycluster.json"
INSIDE = "RLHF_BENCH_INSIDE"
ACCOUNTS = ("system:serviceaccounts", "system:authenticated")
ADMIN = Identity("admin", "benchmark", ("system:masters",))
# As ServiceAccounts, so that the API server's fairness treats both operators as it does in a cluster.
OPERATOR = Identity("rlhf-operator", "system:serviceaccount:rlhf-system:rlhf-operator", ACCOUNTS)
KUBERAY = Identity("kuberay-operator", "system:serviceaccount:kuberay:kuberay-operator", ACCOUNTS)
DRIVERS = Identity("drivers", "system:serviceaccount:default:drivers", ACCOUNTS)
CONTROLLER_MANAGER = Identity("kube-controller-manager", "system:kube-controller-manager")
IDENTITIES = (ADMIN, OPERATOR, KUBERAY, DRIVERS, CONTROLLER_MANAGER)


def isolated(module: str, arguments: Sequence[str]) -> int | None:
    """Run the module again in namespaces of its own and return its exit status; None: this is that run."""
    if os.environ.get(INSIDE):
        output(["mount", "-t", "tmpfs", "-o", "mode=755", "rlhf-bench", "/run"], "run it as root")
        output(["ip", "link", "set", "lo", "up"], "run it as root")
        output(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], "run it as root")
        return None
    namespaces = ["--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child=KILL"]
    again = ["unshare", *namespaces, sys.executable, "-m", module, *arguments]
    return subprocess.run(again, env={**os.environ, INSIDE: "1"}, check=False).returncode


@dataclass(frozen=True)
class Process:
    """A part that runs, with its log."""

    name: str
    handle: subprocess.Popen[bytes]
    log: Path

    def usage(self) -> Usage:
        """Raises ClusterError for one that has ended."""
        self.check()
        return usage(self.handle.pid)

    def check(self) -> None:
        """The same."""
        if self.handle.poll() is not None:
            remedy = "see its last words; an operator ends when it loses its lease, on a machine that is too busy"
            raise ClusterError(f"{self.name} ended with {self.handle.returncode}", remedy)

    def words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


@dataclass
class ControlPlane:
    """A context manager: fresh at its start, gone with its state at its end. Raises ClusterError. What fails inside
    is told with the last words of the operators, and of a part that ended."""

    cfg: settings.Settings = field(default_factory=lambda: _settings())
    processes: list[Process] = field(default_factory=list)
    operators: list[Process] = field(default_factory=list)

    def __enter__(self) -> ControlPlane:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ClusterError | ApiError):
            for part in self.processes:
                if part in self.operators or part.handle.poll() is not None:
                    say(f"the end of {part.log.name}:\n{part.words()}")
        self._end()

    @property
    def audit_log(self) -> Path:
        return self.cfg.state / "audit.log"

    @property
    def api(self) -> Api:
        return Api.from_kubeconfig(self.kubeconfig(ADMIN))

    @property
    def api_server(self) -> Process:
        return next(part for part in self.processes if part.name == "kube-apiserver")

    def kubeconfig(self, who: Identity) -> Path:
        return self.cfg.state / "credentials" / who.name

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Process:
        log = self.cfg.logs / f"{name}.log"
        with log.open("ab") as handle:
            parts = [str(part) for part in command]
            environ = {**self._environment(), **(environment or {})}
            popen = subprocess.Popen(
                parts, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, env=environ, cwd="/"
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def end(self, process: Process, number: int) -> None:
        """By this signal, and on purpose."""
        self.processes.remove(process)
        process.handle.send_signal(number)
        process.handle.wait()

    async def attend(self) -> None:
        """For ever. Raises ClusterError when a part ends: nobody starts it again, and all would wait in vain."""
        while True:
            for process in self.processes:
                process.check()
            await asyncio.sleep(1.0)

    def operator(self, tree: Path, name: str = "rlhf-operator", port: int = 0, *, lease: bool = True) -> Process:
        """The operator of a source tree. `port` is that of its health, 0 any. Without a lease, as KubeRay's runs here,
        it cannot lose it on a machine that others keep busy."""
        command: list[str | Path] = [sys.executable, "-m", "rlhf_operator", "--kubeconfig", self.kubeconfig(OPERATOR)]
        path = f"{tree / 'api'}:{tree / 'operator'}"
        election = ["--lease-namespace", "default"] if lease else ["--no-leader-election"]
        flags = ["--health-port", str(port), *election]
        return self._start_operator(name, [*command, *flags], {"PYTHONPATH": path})

    def kuberay(self, program: Path) -> Process:
        """The real KubeRay operator as it comes: one worker a kind, 100 requests a second."""
        flags = [
            "--enable-leader-election=false",
            "--metrics-addr=127.0.0.1:9090",
            "--health-probe-bind-address=127.0.0.1:9091",
        ]
        return self._start_operator("kuberay", [program, "--kubeconfig", self.kubeconfig(KUBERAY), *flags])

    def standin(self) -> Process:
        command = [sys.executable, "-m", "hack.cluster.kuberay_standin", "--kubeconfig", str(self.kubeconfig(KUBERAY))]
        return self._start_operator("kuberay-standin", command, {"PYTHONPATH": str(self.cfg.clone)})

    def _start_operator(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> Process:
        self.operators.append(self.start(name, command, environment))
        return self.operators[-1]

    def install_all(self, tree: Path, kuberay_crds: Path | None = None) -> None:
        """KubeRay's CRDs, or RayCluster's alone, and the tree's own."""
        self.install(kuberay_crds or self.cfg.kuberay_schema or STANDIN_SCHEMA)
        self.install_tree(tree)

    def install(self, schema: Path) -> None:
        """A CRD, or a directory of them, made or brought up to this state. Returns when the API server serves it."""
        kubectl = shutil.which("kubectl", path=self._environment()["PATH"]) or "kubectl"
        crds = [f"--kubeconfig={self.kubeconfig(ADMIN)}", "--filename", str(schema)]
        output([kubectl, "apply", "--server-side", "--force-conflicts", *crds], "see the message of kubectl")
        established = [kubectl, "wait", "--for=condition=Established", "--timeout=5s", *crds]
        wait_for(f"the CRD of {schema}", lambda: _succeeds(established), 60, f"see {self.cfg.logs}")

    def install_tree(self, tree: Path) -> None:
        """RLHFJob's CRD as this source tree prints it: what is generated may be older than the tree."""
        schema = self.cfg.state / "rlhfjobs.yaml"
        command = [sys.executable, "-c", "from rlhf_api.crd import crd_yaml; print(crd_yaml())"]
        schema.write_text(output(command, "see the message", env={**os.environ, "PYTHONPATH": str(tree / "api")}))
        self.install(schema)

    def _environment(self) -> dict[str, str]:
        debian = next(self.cfg.cache.glob("debian-*"))
        libraries = ":".join(map(str, (debian / "usr" / "lib").glob("*-linux-gnu*")))
        path = f"{self.cfg.bin}:{debian / 'usr/bin'}:{os.environ.get('PATH', '')}"
        return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": libraries}

    def _start(self) -> None:
        self.cfg.logs.mkdir(parents=True)
        binaries.ensure(self.cfg)
        tokens = {who.name: secrets.token_hex(24) for who in IDENTITIES}
        _write_files(self.cfg.state, tokens)
        parts = {part.name: part for part in components.control_plane(self.cfg, Link(host=ADDRESS, node=ADDRESS))}
        self._start_part(parts["etcd"])
        self._start_part(parts["kube-apiserver"], "--audit-log-maxsize=4000")
        self._connect(tokens)
        self._start_part(parts["kube-controller-manager"])
        _admit_operators(self.api)
        wait_for("the namespace default", self._namespace_ready, 60, f"see {self.cfg.logs}")

    def _start_part(self, part: Component, *more: str) -> None:
        self.start(part.name, [*part.command, *more], part.environment)

    def _connect(self, tokens: Mapping[str, str]) -> None:
        certificate = self.cfg.state / "pki" / "apiserver.crt"
        see = f"see {self.cfg.logs}/kube-apiserver.log"
        wait_for(
            "the API server's certificate", lambda: certificate.exists() and b"END" in certificate.read_bytes(), 60, see
        )
        ca = base64.b64encode(certificate.read_bytes()).decode()
        for name, token in tokens.items():
            self.kubeconfig(Identity(name, "")).write_text(components.kubeconfig(f"https://{ADDRESS}:6443", ca, token))
        wait_for("the API server", lambda: self.api.ready(), 90, see)

    def _namespace_ready(self) -> bool:
        """Pods need its ServiceAccount, which the controller manager makes."""
        return self.api.find("/api/v1/namespaces/default/serviceaccounts/default") is not None

    def _end(self) -> None:
        for process in reversed(self.processes):
            if process.handle.poll() is None:
                process.handle.kill()
                process.handle.wait()
        self.processes.clear()
        shutil.rmtree("/run/etcd", ignore_errors=True)
        shutil.rmtree(self.cfg.state, ignore_errors=True)


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _settings() -> settings.Settings:
    return replace(settings.from_environment(), state=Path(tempfile.mkdtemp(prefix="rlhf-bench-")))


def _write_files(state: Path, tokens: Mapping[str, str]) -> None:
    for name in ("credentials", "pki"):
        (state / name).mkdir(mode=0o700)
    groups = {who.name: ",".join(who.groups) for who in IDENTITIES}
    lines = (f'{tokens[who.name]},{who.user},{who.name},"{groups[who.name]}"\n' for who in IDENTITIES)
    (state / "credentials" / "tokens.csv").write_text("".join(lines))
    (state / "audit-policy.json").write_text(json.dumps(_audit_policy()))


def _audit_policy() -> Object:
    """Every request of the two operators, once: a watch when it begins, the others when they end."""
    ours = {"level": "Metadata", "users": [OPERATOR.user, KUBERAY.user]}
    rules = [
        {**ours, "verbs": ["watch"], "omitStages": ["RequestReceived", "ResponseComplete"]},
        {**ours, "omitStages": ["RequestReceived", "ResponseStarted"]},
        {"level": "None"},
    ]
    return {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}


def _admit_operators(api: Api) -> None:
    subjects = [
        {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": who.user}
        for who in (OPERATOR, KUBERAY, DRIVERS)
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    body = {"metadata": {"name": "benchmark"}, "subjects": subjects, "roleRef": role}
    api.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", body)
