"""Reports to the API server: what is applied, what comes back, and that an outage costs nothing but reports."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_worker import progress
from rlhf_worker.progress import StatusReporter, in_words
from rlhf_worker.weights.sync import Proof, Synced
from tests.worker.configs import run_config
from tests.worker.waiting import until

STEP = {
    "reward/mean": 0.51234, "mismatch/abs": 0.00123, "rollout/tokens_per_second": 812.4, "train/loss": -0.1, "train/grad_norm": 0.5,
    "seconds/step": 2.0, "seconds/generate": 1.0, "seconds/score": 0.1, "seconds/train": 0.5, "seconds/sync": 0.2,
}


class Server:
    """Answers as the API server does: the whole object, spec included."""

    def __init__(self) -> None:
        self.applied: list[dict[str, Any]] = []
        self.requests: list[httpx.Request] = []
        self.suspend = False
        self.down = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            self.down -= 1
            raise httpx.ConnectError("refused")
        self.requests.append(request)
        self.applied.append(json.loads(request.content))
        return httpx.Response(200, json={"spec": {"suspend": self.suspend}})


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def reporter(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StatusReporter:
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(progress, "ACCOUNT", tmp_path)
    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.01)
    client = httpx.Client(base_url="https://api", transport=httpx.MockTransport(server))
    return StatusReporter(run_config(steps=10), client)


def test_a_step_is_applied_to_the_jobs_own_status(server: Server, reporter: StatusReporter) -> None:
    synced = Synced(3, 0.123, "gloo", Proof(3, 5, 2, 1e-4, 0.5))
    reporter.stepped(4, STEP, eta_seconds=75, synced=synced)
    reporter.close()
    request, body = server.requests[-1], server.applied[-1]
    assert request.url.path == "/apis/rlhf.dev/v1alpha1/namespaces/default/rlhfjobs/tiny/status"
    assert dict(request.url.params) == {"fieldManager": "rlhf-driver", "force": "true"}
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["content-type"] == "application/apply-patch+yaml"
    assert body["metadata"] == {"name": "tiny", "uid": "u-1"}
    assert set(body["status"]) == {"progress"}
    told = body["status"]["progress"]
    assert told | {"step": 4, "display": "4/10", "reward": "0.512", "eta": "1m15s", "tokensPerSecond": "812", "mismatch": "0.0012"} == told
    assert told["sync"] == {"version": 3, "seconds": "0.123", "backend": "gloo", "verifiedVersion": 3}
    assert "reportTime" in told


def test_a_sync_without_proof_keeps_the_last_proven_version(server: Server, reporter: StatusReporter) -> None:
    reporter.stepped(1, STEP, eta_seconds=1, synced=Synced(1, 0.1, "gloo", Proof(1, 5, 0, None, 0.5)))
    reporter.stepped(2, STEP, eta_seconds=1, synced=Synced(2, 0.1, "gloo", None))
    reporter.close()
    assert server.applied[-1]["status"]["progress"]["sync"]["verifiedVersion"] == 1


def test_suspend_comes_back_with_the_answer(server: Server, reporter: StatusReporter) -> None:
    assert not reporter.suspended
    server.suspend = True
    reporter.update(detail="generating")
    until(lambda: reporter.suspended, 10)
    server.suspend = False
    reporter.update(detail="saved")
    until(lambda: not reporter.suspended, 10)
    reporter.close()


def test_an_outage_is_outlived_and_the_newest_report_arrives(server: Server, reporter: StatusReporter) -> None:
    server.down = 2
    reporter.update(detail="one")
    reporter.update(detail="two")
    until(lambda: bool(server.applied), 10)
    reporter.close()
    assert server.applied[-1]["status"]["progress"]["detail"] == "two"


def test_close_gives_up_on_a_server_that_is_gone(server: Server, reporter: StatusReporter) -> None:
    server.down = 10**9
    reporter.update(state="Done")
    reporter.close()
    assert not server.applied


@pytest.mark.parametrize(("seconds", "words"), [(5, "5s"), (75, "1m15s"), (5400, "1h30m"), (-1, "0s")])
def test_durations_in_words(seconds: int, words: str) -> None:
    assert in_words(seconds) == words
