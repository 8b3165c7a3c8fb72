"""The whole process against a real HTTP server: it serves, survives the API server's bad days, and hands over to
another."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_operator import handlers, leader, refresh, settings
from rlhf_operator.__main__ import Operator
from rlhf_operator.client import ApiError, Connection, KubernetesApi
from rlhf_operator.clock import stamp
from rlhf_operator.kinds import CONFIG_MAPS, CRDS, EVENTS, JOBS, LEASES, PODS, RAYCLUSTERS
from rlhf_operator.leader import Leadership
from rlhf_operator.names import JOB_LABEL
from rlhf_operator.reconcile import utc_now
from rlhf_operator.settings import Settings
from tests.api.specs import a_job
from tests.control.api_server import ApiServer

SOON = 60.0


async def until(so: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not so():
        assert time.monotonic() < deadline, "it never came to be so"
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same protocol with shorter waits."""
    monkeypatch.setattr(handlers, "RESTART_SECONDS", 0.3)
    monkeypatch.setattr(refresh, "SUSPECT_SECONDS", 0.2)
    monkeypatch.setattr(refresh, "ABSENT_SECONDS", 0.3)
    monkeypatch.setattr(refresh, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(refresh, "TICK_SECONDS", 0.1)
    monkeypatch.setattr(settings.Backoffs, "__iter__", lambda self: iter([0.1] * 10_000))
    monkeypatch.setattr(leader, "LEASE_SECONDS", 4)
    monkeypatch.setattr(leader, "RENEW_SECONDS", 2)
    monkeypatch.setattr(leader, "RETRY_SECONDS", 1)
    monkeypatch.setattr(leader, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(leader, "ACT_SECONDS", 3.0)
    monkeypatch.setattr(leader, "LATE_SECONDS", 2.0)


@asynccontextmanager
async def operator(
    server: ApiServer, folder: Path, name: str = "one", lease: str | None = None
) -> AsyncIterator[Operator]:
    connection = Connection(server.kubeconfig(folder, name))
    api = await KubernetesApi.connect(connection)
    levels = sys.getrecursionlimit()
    made = Operator(Settings(None, connection.kubeconfig, 0, lease, False), connection, api)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        made.stopped.set()
        await asyncio.wait_for(task, 15)
        await api.close()
        sys.setrecursionlimit(levels)


def led(operator: Operator) -> Leadership:
    assert operator.leadership is not None
    return operator.leadership


def phase(server: ApiServer, name: str = "sample") -> str:
    raw = server.objects[("rlhfjobs", "default", name)]
    return str((raw.get("status") or {}).get("phase"))


def accepted(server: ApiServer, name: str) -> dict[str, str]:
    conditions = (server.objects[("rlhfjobs", "default", name)].get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == "Accepted"), {"status": "Unknown"})


def job(name: str = "sample") -> dict[str, Any]:
    raw = a_job(name=name)
    raw["metadata"]["generation"] = 1
    return raw


async def test_a_job_is_served(tmp_path: Path) -> None:
    async with ApiServer(absent={"workloads", "localqueues"}).running() as server, operator(server, tmp_path) as it:
        await until(lambda: it.store.ready)
        server.put(JOBS, job())
        await until(lambda: server.of(RAYCLUSTERS) and phase(server) == "Provisioning")
        server.put(
            PODS, {"metadata": {"name": "head", "labels": {JOB_LABEL: "sample"}}, "status": {"phase": "Pending"}}
        )
        await until(lambda: it.store.sizes()["pods"] == 1)


async def test_a_finished_job_goes_at_its_time_though_the_operator_was_replaced(tmp_path: Path) -> None:
    """The resync passes it over: its clock starts with the process."""
    done = job()
    done["spec"]["runPolicy"] = {"ttlSecondsAfterFinished": 2}
    true = {"status": "True", "reason": "X", "message": "x", "lastTransitionTime": stamp(utc_now())}
    done["status"] = {
        "phase": "Succeeded",
        "conditions": [{"type": kind, **true} for kind in ("Complete", "ResourcesReleased")],
        "record": {"clusters": 1, "result": "Complete", "resultReason": "JobSucceeded", "finishedAt": stamp(utc_now())},
    }
    async with ApiServer(absent={"workloads", "localqueues"}).running() as server:
        server.put(JOBS, done)
        async with operator(server, tmp_path) as it:
            await until(lambda: it.store.ready)
            assert server.of(JOBS) and it.store.job_keys(at_rest=False) == []
            await until(lambda: not server.of(JOBS))


async def test_a_spec_that_nests_as_deep_as_the_api_server_takes_harms_nobody_else(tmp_path: Path) -> None:
    """By a watch and by a list. It is refused by its field."""
    deep = job("deep")
    without_end: dict[str, Any] = {}
    for _ in range(9_990):
        without_end = {"a": without_end}
    deep["spec"]["pods"] = {"trainer": {"affinity": without_end}}
    async with ApiServer(absent={"workloads", "localqueues"}).running() as server:
        async with operator(server, tmp_path) as it:
            await until(lambda: server.watches["rlhfjobs"])
            server.put(JOBS, deep)
            server.put(JOBS, job())
            await until(lambda: phase(server) == "Provisioning" and accepted(server, "deep")["status"] == "False")
            assert "spec.pods.trainer: " in accepted(server, "deep")["message"]
            assert "nested too deeply" in accepted(server, "deep")["message"]
            assert it.informer.alive and not server.watches["rlhfjobs"] > 1
        async with operator(server, tmp_path) as it:
            server.put(JOBS, job("other"))
            await until(lambda: phase(server, "other") == "Provisioning")
            assert it.store.sizes()["rlhfjobs"] == 3


async def test_only_labelled_pods_and_warnings_are_asked_for(tmp_path: Path) -> None:
    async with ApiServer().running() as server, operator(server, tmp_path) as it:
        server.put(PODS, {"metadata": {"name": "other"}})
        server.put(PODS, {"metadata": {"name": "head", "uid": "head", "labels": {JOB_LABEL: "sample"}}})
        await until(lambda: it.store.sizes()["pods"] == 1)
        for kind in ("Normal", "Warning"):
            about = {"involvedObject": {"uid": "head"}, "type": kind, "reason": "FailedMount", "message": kind}
            server.put(EVENTS, {"metadata": {"name": kind.lower()}, **about})
        await until(lambda: it.store.complaints.of("head"))


@pytest.mark.parametrize(
    "error",
    [
        {"kind": "Status", "code": 410, "reason": "Expired"},
        {"kind": "Status", "code": 500, "reason": "InternalError"},
        None,
    ],
    ids=["410", "500", "closed"],
)
async def test_what_went_while_a_watch_was_broken_is_found(tmp_path: Path, error: dict[str, object] | None) -> None:
    """kopf lists anew and tells of what there is; that something is gone is told by our own list."""
    async with ApiServer().running() as server, operator(server, tmp_path) as it:
        for name in ("gone", "stays"):
            server.put(PODS, {"metadata": {"name": name, "labels": {JOB_LABEL: "sample"}}})
        await until(lambda: it.store.sizes()["pods"] == 2 and server.watches["pods"])
        server.remove(PODS, "gone", told=False)
        server.put(PODS, {"metadata": {"name": "new", "labels": {JOB_LABEL: "sample"}}})
        server.compacted = server.version
        server.cut(error)
        await until(lambda: {held.name[1] for held in it.store.pods.by_uid.values()} == {"stays", "new"})


async def test_an_api_server_that_is_away_ends_nothing(tmp_path: Path) -> None:
    async with ApiServer().running() as server, operator(server, tmp_path) as it:
        server.put(JOBS, job())
        await until(lambda: server.of(RAYCLUSTERS))
        server.down = True
        server.cut()
        await asyncio.sleep(1.5)
        server.down = False
        server.put(JOBS, job("other"))
        await until(lambda: len(server.of(RAYCLUSTERS)) == 2)
        assert it.informer.alive


async def test_a_silent_watch_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = settings.kopf_settings

    def impatient(namespace: str | None) -> object:
        made = usual(namespace)
        made.watching.inactivity_timeout = 0.5
        return made

    monkeypatch.setattr(handlers, "kopf_settings", impatient)
    async with ApiServer(silent=True).running() as server, operator(server, tmp_path) as it:
        await until(lambda: it.store.ready and server.watches["rlhfjobs"])
        before = server.watches["rlhfjobs"]
        server.put(JOBS, job())
        await until(lambda: server.watches["rlhfjobs"] > before)
        server.silent = False
        await until(lambda: server.of(RAYCLUSTERS))


async def test_kuberay_may_come_later(tmp_path: Path) -> None:
    async with ApiServer(absent={"rayclusters"}).running() as server, operator(server, tmp_path) as it:
        await until(lambda: it.store.ready)
        server.put(JOBS, job())
        await until(lambda: phase(server) == "Pending" and not it.store.installed(RAYCLUSTERS))
        server.absent.clear()
        server.put(CRDS, {"metadata": {"name": "rayclusters.ray.io"}, "spec": {"group": "ray.io"}})
        await until(lambda: server.of(RAYCLUSTERS) and server.watches["rayclusters"])


async def test_too_many_requests_are_left_alone_for_as_long_as_asked(tmp_path: Path) -> None:
    async with ApiServer().running() as server:
        api = await KubernetesApi.connect(Connection(server.kubeconfig(tmp_path, "one")))
        server.answers["POST"] = [(429, {"Retry-After": "7"})]
        with pytest.raises(ApiError) as error:
            await api.create(CONFIG_MAPS, "default", {"metadata": {"name": "a"}})
        assert (error.value.status, error.value.retry_after) == (429, 7.0)
        await api.close()


async def test_a_standby_takes_over_at_once_when_the_leader_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not wait for the lease to run out, which it would not do here."""
    monkeypatch.setattr(leader, "LEASE_SECONDS", 600)
    async with ApiServer().running() as server, operator(server, tmp_path, "first", "default") as first:
        await until(lambda: first.leading)
        async with operator(server, tmp_path, "second", "default") as second:
            await until(lambda: second.store.ready)
            server.put(JOBS, job())
            await until(lambda: server.of(RAYCLUSTERS))
            assert server.writes("second") == 0 and not second.leading
            await until(lambda: second.store.sizes()["rlhfjobs"] == 1)
            first.stopped.set()
            await until(lambda: second.leading)
            written = server.writes("first")
            server.put(JOBS, job("other"))
            await until(lambda: len(server.of(RAYCLUSTERS)) == 2)
            assert server.writes("first") == written and server.writes("second") > 0


async def test_a_leader_that_cannot_renew_stops_before_another_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ApiServer().running() as server, operator(server, tmp_path, "first", "default") as first:
        await until(lambda: first.leading)

        async def lost(*_: object) -> tuple[bool, object]:
            await asyncio.sleep(0.1)
            return False, ApiError(0, "Unreachable", "")

        async with operator(server, tmp_path, "second", "default") as second:
            await until(lambda: second.store.ready)
            (lease,) = server.of(LEASES)
            for name in ("get", "update"):
                monkeypatch.setattr(led(first).lock, name, lost)
            await until(lambda: not led(first).holds())
            assert lease["spec"]["holderIdentity"] == led(first).lock.identity
            assert not second.leading
            with pytest.raises(ApiError, match="NotLeader"):
                await first.api.create(CONFIG_MAPS, "default", {"metadata": {"name": "late"}})
            await until(lambda: second.leading)


async def test_a_standby_outlives_an_api_server_that_is_away(tmp_path: Path) -> None:
    async with ApiServer().running() as server, operator(server, tmp_path, "first", "default") as first:
        await until(lambda: first.leading)
        async with operator(server, tmp_path, "second", "default") as second:
            await until(lambda: second.store.ready)
            server.down = True
            server.cut()
            await until(lambda: led(first).lost.is_set())
            await asyncio.sleep(1.0)
            server.down = False
            await until(lambda: second.leading)


async def test_no_pass_begins_while_a_renewal_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal waits behind nothing of ours, and the jobs behind it."""
    monkeypatch.setattr(leader, "LATE_SECONDS", -1.0)
    async with (
        ApiServer(absent={"workloads", "localqueues"}).running() as server,
        operator(server, tmp_path, "one", "default") as it,
    ):
        await until(lambda: it.leading)
        server.put(JOBS, job())
        await until(lambda: it.store.sizes()["rlhfjobs"])
        renewed = led(it).lock.renewed
        await until(lambda: led(it).lock.renewed > renewed)
        assert not server.of(RAYCLUSTERS)
        monkeypatch.setattr(leader, "LATE_SECONDS", 2.0)
        await until(lambda: server.of(RAYCLUSTERS))
