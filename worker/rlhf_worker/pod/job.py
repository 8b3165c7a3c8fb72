"""The run's own RLHFJob at the API server: the one channel between driver and operator.

What it says of the driver's duties is pure.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from rlhf_api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from rlhf_api.job import STALL_TIMEOUT_SECONDS
from rlhf_api.progress import DRIVER_FIELD_MANAGER, Progress
from rlhf_api.run import JobRef

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_SECONDS = 5.0
POD_UID = "RLHF_POD_UID"  # of the environment
CONFLICT, NOT_FOUND = 409, 404

Raw = Mapping[str, Any]


class OwnJob:
    """Both calls raise httpx.HTTPError, OSError for a missing token, ValueError for an answer that is no JSON."""

    def __init__(self, job: JobRef, client: httpx.Client) -> None:
        self.job = job
        self._client = client
        self._path = f"/apis/{GROUP}/{VERSION}/namespaces/{job.namespace}/{PLURAL}/{job.name}"

    def read(self) -> Raw | None:
        """None: there is no such job any more."""
        answer = self._client.get(self._path, headers=_credentials())
        return None if self._gone(answer) else _object(answer)

    def apply(self, status: Mapping[str, Any]) -> Raw | None:
        """The whole object, spec included, which another job of the same name keeps as it is."""
        metadata = {"name": self.job.name, **({"uid": self.job.uid} if self.job.uid else {})}
        answer = self._client.patch(
            f"{self._path}/status", params={"fieldManager": DRIVER_FIELD_MANAGER, "force": "true"},
            headers={**_credentials(), "Content-Type": "application/apply-patch+yaml"},
            json={"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status},
        )
        if self._gone(answer):
            return None
        if answer.status_code == CONFLICT and ended(found := self.read(), self.job):
            return found
        return _object(answer)

    def _gone(self, answer: httpx.Response) -> bool:
        """An API server that starts answers 404 to what it does not serve yet: only one that names the job means it."""
        if answer.status_code != NOT_FOUND:
            return False
        try:
            return bool(answer.json()["details"]["name"] == self.job.name)
        except (ValueError, KeyError, TypeError):
            return False


def _credentials() -> dict[str, str]:
    return {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}"}


def _object(answer: httpx.Response) -> Raw:
    if answer.is_error:
        raise httpx.HTTPStatusError(
            f"{answer.status_code}: {answer.text[:300]}", request=answer.request, response=answer
        )
    found: Raw = answer.json()
    return found


def in_cluster_client() -> httpx.Client:
    """The API server as a pod sees it. Raises OSError outside a cluster."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise OSError("KUBERNETES_SERVICE_HOST is not set: this is no pod; use `rlhf_worker local`")
    host = f"[{host}]" if ":" in host else host
    return httpx.Client(
        base_url=f"https://{host}:{port}", verify=str(ACCOUNT / "ca.crt"), timeout=REQUEST_SECONDS, trust_env=False
    )


def ended(raw: Raw | None, job: JobRef) -> str | None:
    """Why nobody waits for this run any more, if so."""
    if raw is None:
        return f"RLHFJob {job.name} is gone"
    if job.uid and (uid := raw.get("metadata", {}).get("uid", job.uid)) != job.uid:
        return f"RLHFJob {job.name} is another one now (uid {uid})"
    for kind in ("Complete", "Failed"):
        if (found := _condition(raw, kind)).get("status") == "True":
            return f"RLHFJob {job.name} is {kind} ({found.get('reason')})"
    return None


def drains(raw: Raw) -> bool:
    """Whether its pods go once the driver has saved: it is deleted, or suspended, which the operator may refuse."""
    if raw.get("metadata", {}).get("deletionTimestamp"):
        return True
    refused = _condition(raw, "Suspended").get("reason") == "WouldLoseCheckpoint"
    return bool(raw.get("spec", {}).get("suspend", False)) and not refused


def pods_ready(raw: Raw) -> bool:
    return bool(_condition(raw, "ClusterReady").get("status") == "True")


def stall_timeout(raw: Raw) -> int:
    """spec.runPolicy.stallTimeoutSeconds, in seconds."""
    return int(raw.get("spec", {}).get("runPolicy", {}).get("stallTimeoutSeconds", STALL_TIMEOUT_SECONDS))


def attempt_of(raw: Raw, pod_uid: str) -> int | None:
    """The number that the operator gave this pod; None while it has not seen it."""
    given = raw.get("status", {}).get("record", {}).get("attempt") or {}
    return int(given["number"]) if given.get("podUid") == pod_uid else None


def last_progress(raw: Raw) -> Progress:
    """What the driver before this one told last; nothing where that cannot be read."""
    try:
        return Progress.model_validate(raw.get("status", {}).get("progress") or {})
    except ValidationError:
        return Progress()


def _condition(raw: Raw, kind: str) -> Raw:
    found: Raw = next((one for one in raw.get("status", {}).get("conditions", ()) if one.get("type") == kind), {})
    return found
