"""CLUSTER=kind: a kind cluster in Docker with KubeRay's Helm chart and both images built from this tree."""

from __future__ import annotations

import json
import os
import shutil

from hack.cluster.settings import (
    GPU_RESOURCE,
    KUBERAY,
    KUBERAY_CHART,
    LOGICAL_GPUS,
    OPERATOR_IMAGE,
    WORKER_IMAGE,
    Settings,
)
from hack.cluster.steps import ClusterError, output, say, step

_DOCKERFILES = {OPERATOR_IMAGE: "images/operator.Dockerfile", WORKER_IMAGE: "images/worker.Dockerfile"}


def up(cfg: Settings) -> None:
    """Make what is missing; every step can be repeated. Raises ClusterError."""
    _need("docker", "kind", "helm", "kubectl")
    output(["docker", "info"], "start Docker, or use CLUSTER=embedded")
    cfg.state.mkdir(exist_ok=True)
    with step(f"kind cluster {cfg.name}"):
        _make_cluster(cfg)
    with step("logical GPUs"):
        _declare_gpus(cfg)
    for image, dockerfile in _DOCKERFILES.items():
        with step(f"image {image}"):
            output(
                ["docker", "build", "--tag", image, "--file", str(cfg.clone / dockerfile), str(cfg.clone)],
                "see the message of docker build",
            )
            output(["kind", "load", "docker-image", image, "--name", cfg.name], "see the message of kind load")
    with step(f"KubeRay {KUBERAY}"):
        _install_kuberay(cfg)
    say(f"ready: export KUBECONFIG={cfg.kubeconfig}")


def down(cfg: Settings) -> None:
    """Delete the cluster of this clone, if it exists, and its kubeconfig."""
    _need("kind")
    with step(f"deleting kind cluster {cfg.name}"):
        output(["kind", "delete", "cluster", "--name", cfg.name], "see the message of kind")
        shutil.rmtree(cfg.state, ignore_errors=True)


def status(cfg: Settings) -> bool:
    _need("kind")
    running = _exists(cfg)
    say(f"kind cluster {cfg.name}: {'running' if running else 'not running'}, KUBECONFIG={cfg.kubeconfig}")
    return running


def _need(*programs: str) -> None:
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        raise ClusterError(f"CLUSTER=kind needs {', '.join(missing)}", "install them, or use CLUSTER=embedded, which "
            "needs none of them")


def _exists(cfg: Settings) -> bool:
    return cfg.name in output(["kind", "get", "clusters"], "see the message of kind").split()


def _make_cluster(cfg: Settings) -> None:
    if _exists(cfg):
        output([
            "kind", "export", "kubeconfig", "--name", cfg.name, "--kubeconfig", str(cfg.kubeconfig)
        ], "see the message of "
            "kind")
        return
    cfg.volumes.mkdir(parents=True, exist_ok=True)
    mounts = [{"hostPath": str(cfg.volumes), "containerPath": "/var/lib/rlhf"}]
    nodes = [{"role": "control-plane", "extraMounts": mounts}]
    config = cfg.state / "kind.json"
    config.write_text(json.dumps({"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": nodes}))
    make = [
        "kind", "create", "cluster", "--name", cfg.name, "--kubeconfig", str(cfg.kubeconfig), "--config", str(config)
    ]
    output([*make, "--wait", "180s"], "see the message of kind")


def _declare_gpus(cfg: Settings) -> None:
    """The kubelet keeps what it does not know of, until the node's container restarts: then run this again."""
    quantity = f'{{"{GPU_RESOURCE}": "{LOGICAL_GPUS}"}}'
    patch = f'{{"status": {{"capacity": {quantity}, "allocatable": {quantity}}}}}'
    node = f"{cfg.name}-control-plane"
    _kubectl(cfg, "patch", "node", node, "--subresource=status", "--type=merge", f"--patch={patch}")


def _install_kuberay(cfg: Settings) -> None:
    name = os.environ.get("KUBERAY_CHART", KUBERAY_CHART)
    chart = ["helm", "upgrade", "--install", "kuberay-operator", name, "--version", KUBERAY]
    where = ["--namespace", "kuberay-system", "--create-namespace", "--wait", "--timeout", "5m"]
    remedy = "add KubeRay's chart repository to Helm under the name kuberay, or set KUBERAY_CHART to a chart"
    output([*chart, *where], remedy, env=dict(os.environ, KUBECONFIG=str(cfg.kubeconfig)))


def _kubectl(cfg: Settings, *arguments: str) -> str:
    return output(["kubectl", f"--kubeconfig={cfg.kubeconfig}", *arguments], "see the message of kubectl")
