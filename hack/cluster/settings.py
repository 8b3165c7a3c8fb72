"""What is fixed about the embedded cluster, and what the clone and the environment decide."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# containerd and Helm of the releases that are made against this Kubernetes: most of what they are built from is shared.
KUBERNETES = "v1.36.3"
CONTAINERD = "v2.3.7"
HELM = "v4.2.4"
COREDNS = "v1.14.7"
KUBERAY = "1.7.0"
# as Helm names it once KubeRay's chart repository was added; KUBERAY_CHART may name another, or a path
KUBERAY_CHART = "kuberay/kuberay-operator"
GO = "1.26.6"
GO_AT_LEAST = (1, 26)

# Outside the private ranges, so that no route of this machine's own network is hidden (RFC 2544 test addresses).
POD_RANGE = "198.18.0.0/16"
SERVICE_RANGE = "198.19.0.0/20"
LINK_PREFIX = "198.19.128.0"
LINK_SLOTS = 8192  # /30 links in 198.19.128.0/17

LOGICAL_GPUS = 8
GPU_RESOURCE = "nvidia.com/gpu"
OPERATOR_IMAGE = "rlhf-operator:dev"
WORKER_IMAGE = "rlhf-worker:dev"
PAUSE_IMAGE = "rlhf-pause:dev"

KUBERAY_SCHEMA = Path("../shared/kuberay/ray.io_rayclusters.yaml")  # relative to the clone; used where it exists
# The directories of the clone that a container may read: installed from this tree, or named by tests and samples.
CLONE_DIRECTORIES = ("api", "operator", "worker", "tests", "manifests", "hack")


@dataclass(frozen=True)
class Settings:
    """Paths and names of one cluster. ``name`` is unique for a clone, so clones have clusters side by side."""

    clone: Path
    name: str
    state: Path
    cache: Path
    venv: Path
    kuberay_operator: Path | None
    kuberay_schema: Path | None

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def bin(self) -> Path:
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def volumes(self) -> Path:
        """What pods of the cluster see as /var/lib/rlhf, the host path of the samples."""
        return self.state / "var-lib" / "rlhf"

    @property
    def pods_cache(self) -> Path:
        """What pods of every cluster keep in PODS_CACHE: here it outlives them."""
        return self.cache / "pods"

    @property
    def cgroup(self) -> str:
        return f"rlhfjob-{self.name}"

    @property
    def link(self) -> str:
        """Name of the host's end of the veth pair; the kernel allows 15 characters."""
        return f"rlhf-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def from_environment() -> Settings:
    """Settings of the clone that holds this file, changed by RLHF_CLUSTER_NAME, RLHF_CACHE and KUBERAY_*."""
    clone = Path(__file__).resolve().parents[2]
    name = os.environ.get("RLHF_CLUSTER_NAME") or f"{clone.name}-{hashlib.sha256(str(clone).encode()).hexdigest()[:8]}"
    in_venv = sys.prefix != sys.base_prefix
    return Settings(
        clone=clone,
        name=name.lower(),
        state=clone / ".cluster",
        cache=Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhfjob").resolve(),
        venv=Path(sys.prefix) if in_venv else clone / ".venv",
        kuberay_operator=_path("KUBERAY_OPERATOR"),
        kuberay_schema=_path("KUBERAY_CRD") or _existing(clone / KUBERAY_SCHEMA),
    )


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).resolve() if value else None


def _existing(path: Path) -> Path | None:
    return path.resolve() if path.exists() else None
