"""The Python client of RLHFJobs: `Client`, what it returns and what it raises. Jobs are built from `rlhf_api.job`."""

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
