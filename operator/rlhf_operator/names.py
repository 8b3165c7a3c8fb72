"""Names, labels and paths that the operator gives to things; the worker, the chart and the tests rely on them."""

from rlhf_api import GROUP

JOB_LABEL = f"{GROUP}/job"
ROLE_LABEL = f"{GROUP}/role"
# On a RayCluster: what of the spec it was made from (edition.py).
EDITION_ANNOTATION = f"{GROUP}/edition"
# On a RayCluster: "true" where checkpoints die with its trainer's pod.
EPHEMERAL_ANNOTATION = f"{GROUP}/ephemeral-checkpoints"
WORKLOAD_UID_LABEL = "kueue.x-k8s.io/job-uid"
RAY_GROUP_LABEL = "ray.io/group"
FINALIZER = f"{GROUP}/final-save"

# Of the operator's own pods; the chart's selector.
OPERATOR_LABELS = {"app.kubernetes.io/name": "rlhf-operator"}

HEAD = "head"
TRAINER = "trainer"
ROLLOUT = "rollout"

RAY_CONTAINER = "ray"
DRIVER_CONTAINER = "driver"


def cluster_name(job: str, number: int) -> str:
    """The job's n-th RayCluster, counted from 1. At most 40 + 1 + digits characters; KubeRay takes 53."""
    return f"{job}-{number}"


def run_config_name(job: str) -> str:
    return f"{job}-run"


def driver_account_name(job: str) -> str:
    """Of the ServiceAccount, the Role and the RoleBinding."""
    return f"{job}-driver"


def claim_name(job: str) -> str:
    """Of the PersistentVolumeClaim for the checkpoints."""
    return f"{job}-checkpoints"


def network_policy_name(job: str) -> str:
    return f"{job}-pods"
