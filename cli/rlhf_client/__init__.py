"""The Python client of RLHFJobs: `Client`, what it returns and what it raises. Jobs are built from `rlhf_api.job`.

Each name is imported when it is first used: a command line that only prints its help needs no HTTP.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_client.client import Client
    from rlhf_client.errors import (
        AlreadyThere,
        ClientError,
        Gone,
        JobFailed,
        NoConnection,
        NotAllowed,
        NotFound,
        NotInstalled,
        OtherVersion,
        Refused,
        TimedOut,
    )
    from rlhf_client.job import Job
    from rlhf_client.kubeconfig import Connection, connect

__all__ = [
    "AlreadyThere",
    "Client",
    "ClientError",
    "Connection",
    "Gone",
    "Job",
    "JobFailed",
    "NoConnection",
    "NotAllowed",
    "NotFound",
    "NotInstalled",
    "OtherVersion",
    "Refused",
    "TimedOut",
    "connect",
]
ELSEWHERE = {"Client": "client", "Job": "job", "Connection": "kubeconfig", "connect": "kubeconfig"}  # the rest: errors


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{ELSEWHERE.get(name, 'errors')}"), name)
