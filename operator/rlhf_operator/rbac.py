"""`python -m rlhf_operator.rbac` prints the rules that the operator needs, as YAML. One source with `kinds.py`.

    (no flag)      rules of the ClusterRole for --all-namespaces
    --namespaced   rules of the Role for --namespace
    --lease        rules of the Role in the operator's own namespace, for the election
"""

import sys
from collections.abc import Iterable
from typing import Any

import yaml

from rlhf_operator.kinds import CRDS, LEASES, NAMESPACED, Kind

Rule = dict[str, Any]


def operator_rules() -> list[Rule]:
    """What acting on jobs needs, in every namespace served."""
    return _rules(NAMESPACED)


def cluster_rules() -> list[Rule]:
    """With the CRDs, which kopf watches to notice KubeRay when it comes later."""
    return _rules((*NAMESPACED, CRDS))


def lease_rules() -> list[Rule]:
    return _rules((LEASES,))


def _rules(kinds: Iterable[Kind]) -> list[Rule]:
    rules = []
    for kind in kinds:
        rules.append({"apiGroups": [kind.group], "resources": [kind.plural], "verbs": list(kind.verbs)})
        if kind.status_verbs:
            rules.append({"apiGroups": [kind.group], "resources": [f"{kind.plural}/status"], "verbs": list(kind.status_verbs)})
    return rules


CHOICES = {"": cluster_rules, "--namespaced": operator_rules, "--lease": lease_rules}

if __name__ == "__main__":
    asked = " ".join(sys.argv[1:])
    if asked not in CHOICES:
        sys.exit(f"usage: python -m rlhf_operator.rbac [{'|'.join(filter(None, CHOICES))}]")
    yaml.safe_dump({"rules": CHOICES[asked]()}, sys.stdout, sort_keys=False)
