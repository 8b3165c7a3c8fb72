"""`python -m rlhf_operator.rbac` prints the rules that the operator needs, as a YAML list. One source with `kinds.py`.

The rule on leases is needed in the operator's own namespace only, the one on CRDs only where it serves every namespace:
kopf watches them to notice KubeRay when it is installed later. """

import sys
from typing import Any

import yaml

from rlhf_operator.kinds import CRDS, LEASES, NAMESPACED

Rule = dict[str, Any]


def rules() -> list[Rule]:
    found = []
    for kind in (*NAMESPACED, CRDS, LEASES):
        found.append({"apiGroups": [kind.group], "resources": [kind.plural], "verbs": list(kind.verbs)})
        if kind.status_verbs:
            found.append(
                {"apiGroups": [kind.group], "resources": [f"{kind.plural}/status"], "verbs": list(kind.status_verbs)}
            )
    return found


if __name__ == "__main__":
    yaml.safe_dump(rules(), sys.stdout, sort_keys=False)
