"""Who reaches the job's pods. Pure.

What leaves them is not restricted: models, data, rewards and checkpoints may lie anywhere.
"""

from typing import Any

from rlhf_api.job import RLHFJob
from rlhf_operator.names import JOB_LABEL, OPERATOR_LABELS, ROLE_LABEL, network_policy_name

Raw = dict[str, Any]
NOBODY = "none"  # a role that no pod has


def network_policy(job: RLHFJob, metadata: Raw, home: str) -> Raw:
    """Turned off it selects no pod: what was enforced is so no more, and what others' policies close stays closed."""
    asked, own = job.spec.network_policy, {JOB_LABEL: job.metadata.name}
    selected = own if asked.enabled else {ROLE_LABEL: NOBODY}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {**metadata, "name": network_policy_name(job.metadata.name)},
        "spec": {
            "podSelector": {"matchLabels": selected},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": own}}, _operator(home), *asked.allow_from]}],
        },
    }


def _operator(home: str) -> Raw:
    return {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": home}},
        "podSelector": {"matchLabels": OPERATOR_LABELS},
    }
