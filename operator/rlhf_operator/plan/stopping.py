"""What a pod does when it is told to end: it lets the driver save first. Pure.

The head's Ray outlives the driver. A worker tells the driver, who saves if he needs that worker, and goes when the
connection closes: at once where nobody listens or the head's name is unknown. SIGTERM comes after this, within the
same grace period.
"""

from typing import Any

from rlhf_api.progress import DRIVER_PORT

GRACE_SECONDS = 120
ENDING_SECONDS = 10  # left of the grace period for Ray's own end
CONNECT_SECONDS = 5  # a head whose node is gone does not even refuse
HEAD_PRE_STOP = "while grep -qs 'rlhf[_]worker' /proc/[0-9]*/cmdline; do sleep 0.2; done"


def worker_pre_stop(role: str, grace: Any) -> str:
    """The first connection says in bounded time whether there will be a second. `grace` is what the pod's spec
    holds.
    """
    seconds = grace if isinstance(grace, int) else GRACE_SECONDS
    tell = f'exec 3<>"$0" && echo "$RAY_AUTH_TOKEN {role} $RLHF_POD_NAME" >&3 && exec cat <&3 >/dev/null'
    return "\n".join((
        f'driver="/dev/tcp/$FQ_RAY_IP/{DRIVER_PORT}"',
        f"timeout {CONNECT_SECONDS} bash -c 'exec 3<>\"$0\"' \"$driver\" 2>/dev/null || exit 0",
        f"timeout {max(1, seconds - ENDING_SECONDS)} bash -c '{tell}' \"$driver\" 2>/dev/null",
        "exit 0",
    ))
