"""What the driver may do: read its own job and write that job's status. Nothing else."""

from typing import Any

from rlhf_api import GROUP, PLURAL
from rlhf_api.job import RLHFJob
from rlhf_operator.names import driver_account_name

Raw = dict[str, Any]
RBAC = "rbac.authorization.k8s.io"


def access(job: RLHFJob, metadata: Raw) -> tuple[Raw, Raw, Raw]:
    """ServiceAccount, Role, RoleBinding. `metadata` has the labels and the owner."""
    named = {**metadata, "name": driver_account_name(job.metadata.name)}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named}
    role = {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": named, "rules": _rules(job)}
    binding = {
        "apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": named,
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": named["name"]},
        "subjects": [{"kind": "ServiceAccount", "name": named["name"], "namespace": job.metadata.namespace}],
    }
    return account, role, binding


def _rules(job: RLHFJob) -> list[Raw]:
    name = [job.metadata.name]
    return [
        {"apiGroups": [GROUP], "resources": [PLURAL], "resourceNames": name, "verbs": ["get"]},
        {"apiGroups": [GROUP], "resources": [f"{PLURAL}/status"], "resourceNames": name, "verbs": ["patch"]},
    ]
