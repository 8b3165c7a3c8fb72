"""CLUSTER=current: the cluster of your own kubeconfig. It is looked at and never changed."""

from __future__ import annotations

from hack.cluster.settings import Settings
from hack.cluster.steps import ClusterError, output, say, step


def up(cfg: Settings) -> None:
    """Check that the cluster answers and serves RayClusters. Raises ClusterError."""
    with step("your cluster"):
        output(["kubectl", "version"], "check `kubectl version`: KUBECONFIG and the current context choose the cluster")
    with step("KubeRay"):
        remedy = ("install KubeRay: "
            "https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/kuberay-operator-installation.html")
        if (
            "v1"
            not in output(
                ["kubectl", "get", "crd", "rayclusters.ray.io", "--output=jsonpath={.spec.versions[*].name}"], remedy,
            ).split()
        ):
            raise ClusterError("this cluster's KubeRay has no RayCluster v1", remedy)


def down(cfg: Settings) -> None:
    say("CLUSTER=current: nothing was made here, so nothing is removed")


def status(cfg: Settings) -> bool:
    try:
        up(cfg)
    except ClusterError as error:
        say(error.cause)
        return False
    return True
