"""What the driver tells of the run: to `status.progress` of its own RLHFJob, or to the terminal.

Reports are sent by a thread of their own: an API server that is away costs a report and never a step.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from rlhf_api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from rlhf_api.progress import DRIVER_FIELD_MANAGER, HEARTBEAT_SECONDS, Progress, Saved, Sync
from rlhf_api.run import JobRef, RunConfig
from rlhf_worker.weights.sync import Synced

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
LEAST_SECONDS = 1.0  # between two reports, however short the steps are
REQUEST_SECONDS = 5.0
LAST_REPORT_SECONDS = 15.0


def now() -> str:
    """RFC 3339, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def in_words(seconds: int) -> str:
    """75 -> 1m15s, 5400 -> 1h30m"""
    minutes, rest = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def step_fields(step: int, total: int, values: Mapping[str, float], eta_seconds: int) -> dict[str, Any]:
    """Of a finished step: numbers for people, with few digits."""
    fields: dict[str, Any] = {
        "step": step, "display": f"{step}/{total}", "step_time": now(), "reward": f"{values['reward/mean']:.3f}",
        "mismatch": f"{values['mismatch/abs']:.2g}" if "mismatch/abs" in values else None, "tokens_per_second": f"{values['rollout/tokens_per_second']:.0f}",
        "eta_seconds": eta_seconds, "eta": in_words(eta_seconds),
    }
    return fields | ({"kl": f"{values['train/kl']:.2g}"} if "train/kl" in values else {})


def sync_fields(synced: Synced, before: Sync | None) -> dict[str, Any]:
    proven = synced.version if synced.proof else before.verified_version if before else None
    return {"sync": Sync(version=synced.version, seconds=f"{synced.seconds:.3f}", backend=synced.backend, verified_version=proven)}


class Reporter:
    """The run's progress, with a line on the terminal for each step and checkpoint."""

    def __init__(self, config: RunConfig) -> None:
        self.progress = Progress(total_steps=config.trainer.steps, display=f"0/{config.trainer.steps}")
        self.suspended = False
        self._lock = threading.Lock()  # the engines' thread tells what is amiss

    def update(self, synced: Synced | None = None, **fields: Any) -> None:
        with self._lock:
            fields |= sync_fields(synced, self.progress.sync) if synced else {}
            self.progress = self.progress.model_copy(update=fields)

    def stepped(self, step: int, values: Mapping[str, float], *, eta_seconds: int, synced: Synced) -> None:
        self.update(synced, **step_fields(step, self.progress.total_steps, values, eta_seconds))
        print(line(self.progress, values), flush=True)

    def saved(self, step: int, path: str) -> None:
        self.update(checkpoint=Saved(step=step, path=path, time=now()), save_error=None)
        print(f"saved step {step} to {path}", flush=True)


class StatusReporter(Reporter):
    """Server-side apply of the whole progress, at each step end and every HEARTBEAT_SECONDS, at most once in LEAST_SECONDS."""

    def __init__(self, config: RunConfig, client: httpx.Client) -> None:
        super().__init__(config)
        self._job = config.job
        self._client = client
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
        self._thread.start()

    def update(self, synced: Synced | None = None, **fields: Any) -> None:
        super().update(synced, **fields)
        self._news.set()

    def close(self) -> None:
        """Deliver the last report, or give up after LAST_REPORT_SECONDS."""
        self._closing.set()
        self._news.set()
        self._thread.join(LAST_REPORT_SECONDS)

    def _work(self) -> None:
        failures = 0
        while True:
            self._news.wait(HEARTBEAT_SECONDS)
            closing = self._closing.is_set()
            self._news.clear()
            failures = 0 if self._send() else failures + 1
            if closing and (not failures or failures > 2):
                return
            if failures:
                self._news.set()
            self._closing.wait(LEAST_SECONDS * min(10, 2**failures)) if not closing else time.sleep(LEAST_SECONDS)

    def _send(self) -> bool:
        body = {"progress": {**self.progress.to_dict(), "reportTime": now()}}
        try:
            answer = apply_status(self._client, self._job, body)
        except (httpx.HTTPError, OSError, ValueError) as error:
            print(f"progress could not be reported: {error}", file=sys.stderr, flush=True)
            return False
        self.suspended = bool(answer.get("spec", {}).get("suspend", False))
        return True


def apply_status(client: httpx.Client, job: JobRef, status: dict[str, Any]) -> dict[str, Any]:
    """Returns the whole object. Raises httpx.HTTPError, OSError for a missing token, ValueError for an answer that is no JSON."""
    answer = client.patch(
        f"/apis/{GROUP}/{VERSION}/namespaces/{job.namespace}/{PLURAL}/{job.name}/status",
        params={"fieldManager": DRIVER_FIELD_MANAGER, "force": "true"},
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}", "Content-Type": "application/apply-patch+yaml"},
        json={"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": job.name, **({"uid": job.uid} if job.uid else {})}, "status": status},
    )
    if answer.is_error:
        raise httpx.HTTPStatusError(f"{answer.status_code}: {answer.text[:300]}", request=answer.request, response=answer)
    found: dict[str, Any] = answer.json()
    return found


def in_cluster_client() -> httpx.Client:
    """The API server as a pod sees it. Raises OSError outside a cluster."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise OSError("KUBERNETES_SERVICE_HOST is not set: this is no pod; use `rlhf_worker local`")
    host = f"[{host}]" if ":" in host else host
    return httpx.Client(base_url=f"https://{host}:{port}", verify=str(ACCOUNT / "ca.crt"), timeout=REQUEST_SECONDS, trust_env=False)


def line(progress: Progress, values: Mapping[str, float]) -> str:
    """One step in one line."""
    phases = " ".join(f"{name} {values[f'seconds/{name}']:.2f}" for name in ("generate", "score", "train", "sync"))
    version = progress.sync.version if progress.sync else 0
    learned = "  ".join(f"{name} {values[key]:.3g}" for name, key in (("loss", "train/loss"), ("grad", "train/grad_norm"), ("critic", "critic/loss")) if key in values)
    return (
        f"step {progress.display}  reward {progress.reward}  {progress.tokens_per_second} tok/s  version {version}  "
        f"mismatch {progress.mismatch}  {learned}  "
        f"{values['seconds/step']:.2f} s ({phases})  eta {progress.eta}"
    )


class ConsoleReporter(Reporter):
    """The same reports as lines on the terminal alone. Nothing can suspend a run by hand."""

    def update(self, synced: Synced | None = None, **fields: Any) -> None:
        super().update(synced, **fields)
        if fields.get("state") or fields.get("detail"):
            print(f"{self.progress.state}: {self.progress.detail}", flush=True)
        if synced and synced.proof:
            print(proven(synced), flush=True)


def proven(synced: Synced) -> str:
    """The proof of a sync in one line."""
    proof = synced.proof
    assert proof is not None
    probe = f", probe within {proof.probe:.2g}" if proof.probe is not None else ""
    return f"weights version {synced.version} delivered by {synced.backend}: {proof.equal} checksums equal, {proof.indirect} packed or loaded{probe}, in {proof.seconds:.2f} s"
