"""Labels and annotations of an RLHFJob that reach what runs for it: team, cost, a queue's priority, topology. Pure."""

from rlhf_api import GROUP

# The bookkeeping of whoever made the RLHFJob, by the domain before the slash: it would claim RayCluster and pods
# for him.
OTHERS = (GROUP, "ray.io", "kubectl.kubernetes.io", "app.kubernetes.io", "argoproj.io", "helm.sh", "fluxcd.io")
QUEUES = "kueue.x-k8s.io"


def passed_on(given: dict[str, str]) -> dict[str, str]:
    """What a RayCluster gets of either, and a pod of the annotations: Kueue reads there what topology a pod asks for.
    """
    return {key: value for key, value in given.items() if not _theirs(_domain(key))}


def pod_labels(given: dict[str, str]) -> dict[str, str]:
    """Kueue would take a pod that carries its labels for a job of its own, beside the RayCluster's."""
    return {key: value for key, value in passed_on(given).items() if _domain(key) != QUEUES}


def _theirs(domain: str) -> bool:
    return domain.startswith("kopf.") or any(domain == other or domain.endswith(f".{other}") for other in OTHERS)


def _domain(key: str) -> str:
    """Of a key without one: nothing."""
    return key.rpartition("/")[0]
