"""What can go wrong between a user and a cluster. Typed by what the user does next; each message names it."""

from collections.abc import Sequence
from difflib import get_close_matches


class ClientError(Exception):
    """Any of these."""


class NoConnection(ClientError):
    """No kubeconfig, one that cannot be used, or an API server that does not answer."""


class NotAllowed(ClientError):
    """The API server does not know the user, or the user lacks a right."""


class NotFound(ClientError):
    """There is no such job, pod or log."""


class NotInstalled(ClientError):
    """The cluster has no RLHFJobs: the operator's CRD is missing."""


class OtherVersion(ClientError):
    """The cluster's RLHFJob and this client's are not the same: fields are unknown to one of them."""


class Refused(ClientError):
    """The API server refuses the object as it is: by the schema, a rule, or an admission policy."""


class AlreadyThere(ClientError):
    """A job of this name is there, and it is not the one that was given."""


class TimedOut(ClientError):
    """What was waited for did not come in the time given."""


class Gone(ClientError):
    """The job was deleted while it was waited for, or another one has its name now."""


class JobFailed(ClientError):
    """The job ended as Failed. `reason` is the condition's."""

    def __init__(self, name: str, reason: str, message: str) -> None:
        super().__init__(f"{name} failed: {reason}: {message}")
        self.reason, self.message = reason, message


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean X?)`, or nothing where no known word is near."""
    found = get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""
