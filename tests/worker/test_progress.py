"""Reports to the API server: what is applied, what comes back, and that an outage costs nothing but reports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_api.progress import Speed
from rlhf_worker import progress
from rlhf_worker.pod import job, reports
from rlhf_worker.pod.job import OwnJob
from rlhf_worker.pod.reports import StatusReporter
from rlhf_worker.progress import in_words
from rlhf_worker.stop import Ended, Stop
from rlhf_worker.weights.sync import Proof, Synced
from tests.worker.configs import run_config
from tests.worker.waiting import until

STEP = {
    "reward/mean": 0.51234, "mismatch/abs": 0.00123, "rollout/tokens_per_second": 812.4, "train/loss": -0.1,
    "train/grad_norm": 0.5,
    "seconds/step": 2.0, "seconds/productive": 8.7,
    "seconds/generate": 1.0, "seconds/score": 0.1, "seconds/train": 0.5, "seconds/sync": 0.2,
}
SPEED = Speed(mfu="0.41", idle_trainer="0.10", idle_engines="0.20", bottleneck="train", advice="train: 60%")


Make = Callable[..., StatusReporter]
NOT_FOUND = {"kind": "Status", "reason": "NotFound", "details": {"name": "tiny", "kind": "rlhfjobs"}}


class Server:
    """Answers as the API server does: the whole object. Another job of the name is a conflict."""

    def __init__(self) -> None:
        self.applied: list[dict[str, Any]] = []
        self.requests: list[httpx.Request] = []
        self.job: dict[str, Any] | None = {"metadata": {"uid": "u-1"}, "spec": {"suspend": False}}
        self.down = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            self.down -= 1
            raise httpx.ConnectError("refused")
        self.requests.append(request)
        if self.job is None:
            return httpx.Response(404, json=NOT_FOUND)
        if request.method == "PATCH":
            body = json.loads(request.content)
            if body["metadata"]["uid"] != self.job["metadata"]["uid"]:
                return httpx.Response(409, json={"reason": "Conflict"})
            self.applied.append(body)
        return httpx.Response(200, json=self.job)

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = self.applied[-1]["status"]["progress"]
        return found


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def stop() -> Stop:
    return Stop()


@pytest.fixture
def make(server: Server, stop: Stop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A reporter that saw the job so when it started."""
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(job, "ACCOUNT", tmp_path)
    monkeypatch.setattr(reports, "LEAST_SECONDS", 0.01)
    client = httpx.Client(base_url="https://api", transport=httpx.MockTransport(server))
    config = run_config(steps=10)
    return lambda **seen: StatusReporter(config, OwnJob(config.job, client), seen, stop, "pod-1")


@pytest.fixture
def reporter(make: Make) -> StatusReporter:
    return make()


def test_a_step_is_applied_to_the_jobs_own_status(server: Server, reporter: StatusReporter) -> None:
    synced = Synced(3, 0.123, "gloo", Proof(3, 5, 2, 1e-4, 0.5))
    reporter.stepped(4, STEP | {"data/dropped_prompts": 3.0}, SPEED, eta_seconds=75, synced=synced)
    reporter.close()
    request, body = server.requests[-1], server.applied[-1]
    assert request.url.path == "/apis/rlhf.dev/v1alpha1/namespaces/default/rlhfjobs/tiny/status"
    assert dict(request.url.params) == {"fieldManager": "rlhf-driver", "force": "true"}
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["content-type"] == "application/apply-patch+yaml"
    assert body["metadata"] == {"name": "tiny", "uid": "u-1"}
    assert set(body["status"]) == {"progress"}
    told = body["status"]["progress"]
    assert told | {"step": 4, "display": "4/10", "reward": "0.512", "eta": "1m15s", "tokensPerSecond": "812"} == told
    assert told | {"mismatch": "0.0012", "productiveSeconds": 8, "droppedPrompts": 3} == told
    assert told["sync"] == {"version": 3, "seconds": "0.123", "backend": "gloo", "verifiedVersion": 3}
    assert told["speed"] == {
        "mfu": "0.41", "idleTrainer": "0.10", "idleEngines": "0.20", "bottleneck": "train", "advice": "train: 60%",
    }  # fmt: skip
    assert "reportTime" in told


def test_a_sync_without_proof_keeps_the_last_proven_version(server: Server, reporter: StatusReporter) -> None:
    reporter.stepped(1, STEP, SPEED, eta_seconds=1, synced=Synced(1, 0.1, "gloo", Proof(1, 5, 0, None, 0.5)))
    reporter.stepped(2, STEP, SPEED, eta_seconds=1, synced=Synced(2, 0.1, "gloo", None))
    reporter.close()
    assert server.applied[-1]["status"]["progress"]["sync"]["verifiedVersion"] == 1


LOSES = {"type": "Suspended", "status": "False", "reason": "WouldLoseCheckpoint"}
DELETED = {"uid": "u-1", "deletionTimestamp": "2026-01-01T00:00:00Z"}
WANTED: list[tuple[dict[str, Any], bool]] = [
    ({"spec": {"suspend": True}}, True),
    ({"spec": {"suspend": False}}, False),
    ({"spec": {"suspend": True}, "status": {"conditions": [LOSES]}}, False),
    ({"metadata": DELETED}, True),
    ({"metadata": DELETED, "status": {"conditions": [LOSES]}}, True),
]


def test_who_must_drain_is_told_with_the_answer(server: Server, reporter: StatusReporter) -> None:
    assert server.job is not None and not reporter.drain
    for change, wanted in WANTED:
        server.job = {"metadata": {"uid": "u-1"}, **change}
        reporter.update(detail=str(change))
        until(lambda wanted=wanted: reporter.drain is wanted, 10)  # type: ignore[misc]
    reporter.close()


def test_an_outage_is_outlived_and_the_newest_report_arrives(server: Server, reporter: StatusReporter) -> None:
    server.down = 2
    reporter.update(detail="one")
    reporter.update(detail="two")
    until(lambda: bool(server.applied), 10)
    reporter.close()
    assert server.applied[-1]["status"]["progress"]["detail"] == "two"


LAST = {
    "podUid": "pod-0", "attempt": 3, "state": "Training", "detail": "generating", "step": 7, "totalSteps": 12,
    "display": "7/12", "reward": "0.5", "checkpoint": {"step": 6, "path": "/c/step-6", "time": "2026-01-01T00:00:00Z"},
    "degraded": "engine 0 is dead", "productiveSeconds": 70, "saveError": "no checkpoint of step 7",
    "resumedFromStep": 2, "droppedPrompts": 5, "eta": "9m00s",
    "sync": {"version": 7, "seconds": "0.1", "backend": "gloo"},
}  # fmt: skip


def test_what_is_known_stays_and_what_was_the_last_drivers_goes(server: Server, make: Make) -> None:
    reporter = make(status={"progress": LAST})
    reporter.update(detail="loading models")
    until(lambda: bool(server.applied))
    stays = ("step", "reward", "checkpoint", "productiveSeconds", "saveError", "eta", "droppedPrompts")
    kept = {name: LAST[name] for name in stays}
    assert server.told | kept == server.told
    assert server.told | {"podUid": "pod-1", "state": "Starting", "display": "7/10", "totalSteps": 10} == server.told
    assert not {"degraded", "attempt", "resumedFromStep", "sync"} & server.told.keys()
    reporter.close()


@pytest.mark.parametrize(("step", "checkpoint", "resumed"), [
    (6, LAST["checkpoint"], 6),
    (4, {"step": 4, "path": "/c/step-4"}, 4),  # the newest was damaged
    (0, None, None),  # they went with their pod
])  # fmt: skip
def test_after_the_restore_the_status_says_what_is_there(
    server: Server, make: Make, step: int, checkpoint: dict[str, Any] | None, resumed: int | None
) -> None:
    reporter = make(status={"progress": LAST})
    reporter.resumed(step, f"/c/step-{step}", ["checkpoint x is damaged"])
    reporter.close()
    assert (server.told["step"], server.told["display"]) == (step, f"{step}/10")
    assert server.told.get("resumedFromStep") == resumed
    found = server.told.get("checkpoint") or {}
    assert found | (checkpoint or {}) == found and bool(found) is bool(checkpoint)
    assert "checkpoint x is damaged" in server.told["detail"]


@pytest.mark.parametrize("left", [{"step": "many"}, {"state": "Waltzing"}, None])
def test_a_report_that_cannot_be_read_is_no_report(make: Make, left: Any) -> None:
    reporter = make(status={"progress": left})
    assert (reporter.progress.step, reporter.progress.display) == (0, "0/10")
    reporter.close()


def condition(kind: str) -> dict[str, Any]:
    return {"metadata": {"uid": "u-1"}, "status": {"conditions": [{"type": kind, "status": "True", "reason": "R"}]}}


@pytest.mark.parametrize(("found", "why"), [
    (None, "RLHFJob tiny is gone"),
    ({"metadata": {"uid": "u-2"}}, r"another one now \(uid u-2\)"),
    (condition("Complete"), r"Complete \(R\)"),
    (condition("Failed"), r"Failed \(R\)"),
])  # fmt: skip
def test_a_job_that_has_ended_ends_the_driver_whatever_it_does(
    server: Server, make: Make, stop: Stop, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | None, why: str
) -> None:
    """And a driver that does not end by itself, hard."""
    ends: list[str] = []
    monkeypatch.setattr(reports, "END_SECONDS", 0.01)
    monkeypatch.setattr(reports, "_end_hard", ends.append)
    reporter = make()
    stop.interrupt()
    server.job = found
    reporter.update(detail="training")
    until(lambda: bool(ends))
    with pytest.raises(Ended, match=why):
        stop.interrupt()
    reporter.update(detail="still there")
    reporter.close()
    assert len(ends) == 1


def test_an_api_server_that_does_not_serve_the_kind_yet_says_nothing_of_the_job(
    server: Server, reporter: StatusReporter, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = httpx.MockTransport(lambda request: httpx.Response(404, text="404 page not found\n"))
    monkeypatch.setattr(reporter._own, "_client", httpx.Client(base_url="https://api", transport=starting))
    reporter.update(detail="training")
    reporter.close()
    stop.check()


def test_an_answer_that_is_no_job_costs_a_report_and_not_the_reporter(
    server: Server, reporter: StatusReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[7], "a proxy's page", {"status": {"conditions": [7]}}])
    monkeypatch.setattr(reporter._own, "apply", lambda body, apply=reporter._own.apply: next(answers, 0) or apply(body))
    reporter.update(detail="training")
    until(lambda: bool(server.applied), 10)
    assert server.told["detail"] == "training"
    reporter.close()


def test_a_hung_step_is_not_active_and_what_has_a_deadline_of_its_own_is(
    server: Server, reporter: StatusReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(f"t{n}" for n in range(10_000))
    monkeypatch.setattr(progress, "now", lambda: next(clock))
    monkeypatch.setattr(reports, "HEARTBEAT_SECONDS", 0.01)
    until_told(server, 3, reporter)
    assert len({one["status"]["progress"]["activityTime"] for one in server.applied}) == 1
    with reporter.bounded():
        until_told(server, 3, reporter)
        assert len({one["status"]["progress"]["activityTime"] for one in server.applied[-3:]}) == 3
    reporter.close()


def until_told(server: Server, count: int, reporter: StatusReporter) -> None:
    """Heartbeats alone."""
    before = len(server.applied)
    reporter._news.set()
    until(lambda: len(server.applied) >= before + count)


def test_texts_that_the_api_server_would_refuse_are_made_to_fit(server: Server, reporter: StatusReporter) -> None:
    reporter.update(detail="d" * 5000, degraded="half a pair: \ud800" + "e" * 5000)
    reporter.close()
    assert (len(server.told["detail"]), len(server.told["degraded"])) == (1024, 1024)
    assert server.told["degraded"].startswith("half a pair: \\ud800e")


def test_pods_that_go_are_amiss_until_the_engines_are_well_again(server: Server, reporter: StatusReporter) -> None:
    for pod in ("a", "b", "a"):
        reporter.leaving(pod)
    assert reporter.progress.degraded == "pod b is being deleted; pod a is being deleted"
    reporter.engines("engine 1 is dead")
    assert reporter.progress.degraded == "engine 1 is dead; pod b is being deleted; pod a is being deleted"
    reporter.engines(None)
    assert reporter.progress.degraded is None
    reporter.close()


def test_close_gives_up_on_a_server_that_is_gone(server: Server, reporter: StatusReporter) -> None:
    server.down = 10**9
    reporter.update(state="Done")
    reporter.close()
    assert not server.applied


@pytest.mark.parametrize(("seconds", "words"), [(5, "5s"), (75, "1m15s"), (5400, "1h30m"), (-1, "0s")])
def test_durations_in_words(seconds: int, words: str) -> None:
    assert in_words(seconds) == words
