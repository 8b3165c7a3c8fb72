"""The process around the decisions: flags, kopf's part, the connection's errors, the lock, the memory."""

import asyncio
import copy
import operator
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from rlhf_api.status import Phase, RLHFJobStatus
from rlhf_operator import client
from rlhf_operator.client import ApiError, Connection, KindMissing, KubernetesApi, path, read_object, refused
from rlhf_operator.handlers import registry
from rlhf_operator.kinds import JOBS, PODS, RAYCLUSTERS, Kind
from rlhf_operator.leader import ACT_SECONDS, ANSWER_SECONDS, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, _tried
from rlhf_operator.metrics import StoreCollector, WatchAges, told
from rlhf_operator.settings import Backoffs, kopf_settings, parse
from rlhf_operator.store import WATCHED, Store
from tests.control.world import running

ROOT = Path(__file__).parents[2]
STATUS = '{"kind": "Status", "reason": "NotFound", "message": "rayclusters.ray.io \\"x\\" not found", "code": 404}'


def test_the_project_folder_is_no_package_so_that_the_standard_library_stays_importable() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert operator.itemgetter(0)([1]) == 1


def test_flags() -> None:
    assert parse([]).namespace is None
    assert parse(["--namespace", "a"]).lease_namespace == "a"
    assert parse(["--namespace", "a", "--lease-namespace", "b"]).lease_namespace == "b"
    assert parse(["--no-leader-election"]).lease_namespace is None


@pytest.mark.parametrize("wrong", [["--namespace", "a", "--all-namespaces"], ["--health-port", "x"], ["--nope"]])
def test_wrong_flags_end_with_a_message(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_pods_own_namespace_holds_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAMESPACE", "rlhf-system")
    assert parse(["--all-namespaces"]).lease_namespace == "rlhf-system"


def test_kopf_only_watches() -> None:
    """Handlers of any other kind would put a finalizer or an annotation on the jobs."""
    found = handlers_of(Store(), [])
    assert len(list(found._watching.get_all_handlers())) == len(WATCHED)
    for kind in (found._changing, found._spawning, found._indexing, found._webhooks):
        assert list(kind.get_all_handlers()) == []


def test_every_event_goes_into_the_store() -> None:
    """Those of a running job, through kopf's handlers, into a store that wakes it; and out of it again."""
    world = running()
    woken: list[tuple[str, str]] = []
    suspected: list[Kind] = []
    store = Store(woken.append)
    by_id = {handler.id: handler.fn for handler in handlers_of(store, suspected)._watching.get_all_handlers()}

    def told(kind: Kind, raw: dict[str, Any], event: str | None = None) -> None:
        asyncio.run(by_id[kind.plural](event={"type": event, "object": raw}))

    world.api.commit()
    for kind in WATCHED:
        for raw in world.api.of(kind):
            told(kind, raw)
    assert set(woken) == {("default", "sample")}
    assert {name: n for name, n in store.sizes().items() if n} == {"rlhfjobs": 1, "rayclusters": 1, "pods": 2}
    assert suspected == []
    for pod in world.pods():
        told(PODS, pod)
        told(PODS, pod, "DELETED")
    assert set(suspected) == {PODS}, "kopf lists again what is held: its watch was broken"
    assert store.sizes()["pods"] == 0


def test_kopf_is_left_with_the_name_of_what_the_store_has_read() -> None:
    """It holds the last object of each worker that waits for the next."""
    world, store = running(), Store()
    [handler] = [h for h in handlers_of(store, [])._watching.get_all_handlers() if h.id == "rlhfjobs"]
    raw = copy.deepcopy(world.job_raw)
    asyncio.run(handler.fn(event={"type": "MODIFIED", "object": raw}))
    assert raw.keys() & {"spec", "status"} == set() and "managedFields" not in raw["metadata"]
    assert raw["metadata"]["uid"] == world.job_raw["metadata"]["uid"]
    held = store.raw(("default", "sample"))
    assert held is not None and held["spec"] == world.job_raw["spec"] and held["status"] == world.job_raw["status"]


def handlers_of(store: Store, suspected: list[Kind]) -> Any:
    return registry(store, Connection(), suspected.append, WatchAges())


def test_the_api_server_filters_pods_and_clusters() -> None:
    settings = kopf_settings("team-a")
    assert sorted(settings.watching.label_selectors.values()) == ["rlhf.dev/job", "rlhf.dev/job"]
    assert list(settings.watching.field_selectors.values()) == ["type=Warning"]
    assert settings.posting.enabled is False
    assert settings.scanning.disabled, "a Role cannot list CRDs"
    assert not kopf_settings(None).scanning.disabled, "KubeRay may be installed later"


def test_a_missing_kind_is_told_from_a_missing_object() -> None:
    assert isinstance(refused(RAYCLUSTERS, 404, b"404 page not found\n"), KindMissing)
    error = refused(RAYCLUSTERS, 404, STATUS.encode())
    assert not isinstance(error, KindMissing)
    assert (error.status, error.reason) == (404, "NotFound")


def test_an_answer_that_is_no_status_keeps_its_words() -> None:
    error = refused(RAYCLUSTERS, 502, b"<html>proxy</html>")
    assert (error.status, error.message) == (502, "<html>proxy</html>")


@pytest.mark.parametrize("answer", [b"<html>", b'{"items": [', b"[" * 50_000, b"null", b"\xff"])
def test_an_answer_that_cannot_be_read_is_a_failed_try(answer: bytes) -> None:
    with pytest.raises(ApiError, match="Unreadable"):
        read_object(answer)


def test_paths() -> None:
    assert path(PODS, None, None) == "/api/v1/pods"
    assert path(RAYCLUSTERS, "a", "b") == "/apis/ray.io/v1/namespaces/a/rayclusters/b"


def test_the_backoff_of_watches_has_no_end() -> None:
    pauses = iter(Backoffs())
    assert isinstance(kopf_settings(None).networking.error_backoffs, Backoffs)
    assert all(0 < next(pauses) <= 5 for _ in range(1000))


def test_one_try_without_an_answer_does_not_cost_the_lease() -> None:
    """From a renewal: the pause, two calls that nobody answers, the pause; then there is time for another try."""
    assert min(ACT_SECONDS, RETRY_SECONDS + RENEW_SECONDS) - 1 >= 2 * RETRY_SECONDS + 2 * ANSWER_SECONDS
    assert ACT_SECONDS < LEASE_SECONDS


async def test_a_network_error_is_a_failed_try_for_the_lease_and_not_its_end() -> None:
    async def refused() -> tuple[bool, str]:
        raise ConnectionRefusedError("no API server")

    assert await _tried(refused(), lambda error: (False, error.reason)) == (False, "no API server")


def test_the_imports_fit_the_operators_memory() -> None:
    """All of it but the objects of the jobs; the promise is 120 MiB with one job."""
    script = ("import rlhf_operator.__main__, re; print(re.search(r'VmRSS:\\s+(\\d+)', "
        "open('/proc/self/status').read())[1])")
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(out) / 1024 < 100


def test_the_documented_metrics_are_those_that_there_are() -> None:
    text = (ROOT / "docs/telemetry.md").read_text()
    documented = set(re.findall(r"`(rlhf_operator_\w+)`", text))
    families = (REGISTRY.collect(), StoreCollector(Store(), WatchAges()).collect())
    there = {family.name + ("_total" if family.type == "counter" else "") for found in families for family in found}
    assert documented == {name for name in there if name.startswith("rlhf_operator_")}


def test_jobs_are_counted_by_phase_and_by_reason() -> None:
    """Also those of a phase that a later operator wrote; a phase without a job is told as 0."""
    store = Store()
    for uid, status in enumerate([{"phase": "Running", "reason": "StepAdvancing"}, {"phase": "Paused"}, {}]):
        meta = {"name": f"j{uid}", "namespace": "ns", "uid": str(uid), "resourceVersion": "1"}
        store.put(JOBS, {"metadata": meta, "spec": {}, "status": status})
    families = {family.name: family for family in StoreCollector(store, WatchAges()).collect()}
    phases = {one.labels["phase"]: one.value for one in families["rlhf_operator_jobs"].samples}
    assert phases == {phase.value: 0 for phase in Phase} | {"Running": 1, "Paused": 1, "Pending": 1}
    reasons = {tuple(one.labels.values()): one.value for one in families["rlhf_operator_jobs_by_reason"].samples}
    assert reasons == {("Running", "StepAdvancing"): 1, ("Paused", ""): 1, ("Pending", ""): 1}


def test_a_failure_is_timed_once_from_its_end_to_its_status() -> None:
    ended = (datetime.now(UTC) - timedelta(seconds=40)).strftime("%Y-%m-%dT%H:%M:%SZ")
    failure = {"class": "App", "reason": "Error", "message": "exit code 70", "time": ended}
    before, after = (RLHFJobStatus.model_validate({"failures": given}) for given in ([], [failure]))
    names = ("rlhf_operator_job_detect_seconds_sum", "rlhf_operator_job_detect_seconds_count")
    was = [REGISTRY.get_sample_value(name) or 0.0 for name in names]
    worded = RLHFJobStatus.model_validate({"failures": [failure | {"words": "its last words"}]})
    told(before, after)
    told(after, worded)
    took, count = ((REGISTRY.get_sample_value(name) or 0.0) - old for name, old in zip(names, was, strict=True))
    assert count == 1 and 40 <= took < 100


def test_what_a_status_tells_for_the_first_time_is_counted() -> None:
    waits = {"clusterCreatedAt": "2026-01-01T12:00:00Z", "awaitedSince": "2026-01-01T12:01:00Z"}
    before = RLHFJobStatus.model_validate({"record": waits})
    record = {
        "clusterCreatedAt": "2026-01-01T12:00:00Z", "admittedAt": "2026-01-01T12:01:00Z",
        "readyAt": "2026-01-01T12:03:00Z",
    }
    after = RLHFJobStatus.model_validate({"restarts": {"total": 2, "app": 2}, "record": {**record, "result": "Failed"}})
    names = {
        "rlhf_operator_job_queue_seconds_sum": 60.0, "rlhf_operator_job_provisioning_seconds_sum": 120.0,
        "rlhf_operator_job_restarts_total": 2.0, "rlhf_operator_jobs_ended_total": 1.0,
    }
    labels = {
        "rlhf_operator_job_restarts_total": {"class": "app"}, "rlhf_operator_jobs_ended_total": {"result": "Failed"},
    }
    was = {name: REGISTRY.get_sample_value(name, labels.get(name, {})) or 0.0 for name in names}
    told(before, after)
    told(after, after)
    assert {name: (REGISTRY.get_sample_value(name, labels.get(name, {})) or 0.0) - was[name] for name in names} == names


async def test_a_status_of_which_the_crd_lacks_fields_is_written_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names one at a time. After some minutes they are tried again: the CRD may have been upgraded."""
    lacking, sent = {".status.goodput", ".status.failures[0].words"}, list[Any]()

    async def call(*_: Any, body: dict[str, Any], **__: Any) -> Any:
        sent.append(body["status"])
        there = {
            ".status.goodput": "goodput" in body["status"],
            ".status.failures[0].words": "words" in body["status"]["failures"][0],
        }
        for field in sorted(lacking):
            if there[field]:
                raise ApiError(500, "", f"failed to create typed patch object: {field}: field not declared in schema")
        return {"status": body["status"]}

    monkeypatch.setattr(KubernetesApi, "_call", call)
    api = KubernetesApi(Connection(), None)
    body = {
        "metadata": {"name": "a"},
        "status": {"phase": "Running", "goodput": "0.9", "failures": [{"words": "x", "step": 3}]},
    }
    kept = {"phase": "Running", "failures": [{"step": 3}]}
    assert (await api.apply(JOBS, "default", body, status=True))["status"] == kept
    assert len(sent) == 3
    assert (await api.apply(JOBS, "default", body, status=True))["status"] == kept
    assert len(sent) == 4, "it is remembered"
    lacking.clear()
    monkeypatch.setattr(client, "UNDECLARED_SECONDS", 0.0)
    assert (await api.apply(JOBS, "default", body, status=True))["status"] == body["status"]
