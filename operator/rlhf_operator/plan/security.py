"""What a pod may not do: the restricted Pod Security Standard, unless the user asks for more. Pure.

The user and group of images/worker.Dockerfile are written out, so that an image whose USER is root or a name runs
too. KubeRay copies the security context of Ray's container to the one that it puts before it.
"""

from typing import Any

from rlhf_api.job import PodOverrides
from rlhf_operator.merge import deep_merge

Raw = dict[str, Any]
USER = 65532


def pod_context() -> Raw:
    """fsGroup lets the user write to a claim; a claim that is his already is not walked through again."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_context(user: PodOverrides) -> Raw:
    lock = {"add": ["IPC_LOCK"]} if user.ipc_lock else {}
    ours = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], **lock}}
    return deep_merge(ours, user.container_security_context)
