"""The client against an API server over real HTTP, and each error that it tells apart."""

import asyncio
import copy
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_api.job import ObjectMeta, RLHFJob, RLHFJobSpec
from rlhf_api.parse import InvalidJob
from rlhf_api.status import RLHFJobStatus
from rlhf_client import (
    AlreadyThere,
    Client,
    Gone,
    Job,
    JobFailed,
    NoConnection,
    NotAllowed,
    NotFound,
    NotInstalled,
    OtherVersion,
    Refused,
    TimedOut,
    connect,
)
from rlhf_client.http import refusal
from rlhf_operator.kinds import JOBS
from tests.api.specs import a_job, minimal_spec
from tests.cli.conftest import RUNNING, Cluster

END = {"Succeeded": {"phase": "Succeeded"}, "Failed": {"phase": "Failed", "reason": "InvalidData", "message": "line 3"}}


def client_of(cluster: Cluster) -> Client:
    return Client(connect(cluster.kubeconfig))


async def test_a_typed_job_is_submitted_as_the_user_set_it(cluster: Cluster) -> None:
    job = RLHFJob(metadata=ObjectMeta(name="maths"), spec=RLHFJobSpec.model_validate(minimal_spec()))
    async with client_of(cluster) as client:
        made = await client.submit(job)
        assert (made.name, made.namespace, made.phase) == ("maths", "default", "")
        assert made.spec == minimal_spec(), "no default is sent, which an older CRD may lack"
        with pytest.raises(AlreadyThere, match="kubectl rlhf watch maths"):
            await client.submit(a_job("maths"))
        with pytest.raises(InvalidJob, match=r"spec.trainer.steps"):
            await client.submit(a_job("other", trainer__steps=0))
        assert [one.name for one in await client.jobs()] == ["maths"]


def test_things_have_the_names_that_the_operator_gives() -> None:
    from rlhf_client import names as ours
    from rlhf_operator import names as theirs

    assert (ours.JOB_LABEL, ours.ROLE_LABEL) == (theirs.JOB_LABEL, theirs.ROLE_LABEL)
    assert (ours.HEAD, ours.TRAINER) == (theirs.HEAD, theirs.TRAINER)
    assert (ours.DRIVER, ours.RAY) == (theirs.DRIVER_CONTAINER, theirs.RAY_CONTAINER)
    assert ours.run_config("a") == theirs.run_config_name("a")
    assert ours.claim("a") == theirs.claim_name("a")


async def test_watching_sees_each_change_through_cuts_to_the_end(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_client.client.AGAIN_SECONDS", 0.01)
    raw = cluster.job(status=RUNNING)
    seen = []
    async with client_of(cluster) as client:
        async for job in client.watch("maths"):
            seen.append((job.phase, job.progress.step))
            if len(seen) == 1:
                cluster.job(status=RUNNING | {"progress": RUNNING["progress"] | {"step": 4}})
            elif seen[-1][1] == 4 and raw:
                raw = {}
                cluster.server.cut({"kind": "Status", "code": 410, "reason": "Expired"})
                cluster.server.answers["GET"] = [(503, {})]
                cluster.job(status=END["Succeeded"])
    assert seen[0] == ("Running", 3)
    assert ("Running", 4) in seen
    assert seen[-1] == ("Succeeded", 0)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_waiting_ends_as_the_job_does(cluster: Cluster, phase: str) -> None:
    cluster.job(status=RUNNING)
    async with client_of(cluster) as client:
        with pytest.raises(TimedOut, match="did not end within"):
            await client.wait("maths", timeout_seconds=0.2)
        waiting = asyncio.create_task(client.wait("maths"))
        cluster.job(status=END[phase])
        if phase == "Succeeded":
            assert (await waiting).phase == "Succeeded"
        else:
            with pytest.raises(JobFailed, match="maths failed: InvalidData: line 3"):
                await waiting


async def test_a_job_that_is_deleted_or_replaced_is_gone(cluster: Cluster) -> None:
    cluster.job(status=RUNNING)
    async with client_of(cluster) as client:
        waiting = asyncio.create_task(client.wait("maths"))
        await asyncio.to_thread(cluster.until_watched)
        await client.stop("maths")
        with pytest.raises(Gone, match="maths was deleted"):
            await waiting
        with pytest.raises(NotFound):
            await client.stop("maths")


async def test_suspend_and_resume_change_one_field(cluster: Cluster) -> None:
    cluster.job()
    async with client_of(cluster) as client:
        assert (await client.suspend("maths")).spec["suspend"] is True
        assert (await client.resume("maths")).spec["suspend"] is False
        with pytest.raises(NotFound, match=r"did you mean maths\?"):
            await client.suspend("math")


async def test_a_token_that_expires_is_taken_anew(cluster: Cluster, tmp_path: Path) -> None:
    """Of a plugin, at a call and in the middle of a watch."""
    (tmp_path / "token").write_text("first")
    plugin = tmp_path / "plugin"
    plugin.write_text(f'#!/bin/sh\nprintf \'{{"status": {{"token": "%s"}}}}\' "$(cat {tmp_path}/token)"\n')
    plugin.chmod(0o755)
    config = KUBECONFIG.format(server=cluster.server.url).replace("token: secret", f"exec: {{command: {plugin}}}")
    (tmp_path / "config").write_text(config.replace(", namespace: team", ""))
    cluster.job(status=RUNNING)
    async with Client(connect(str(tmp_path / "config"))) as client:
        await client.get("maths")
        (tmp_path / "token").write_text("second")
        cluster.server.answers["GET"] = [(401, {})]
        assert (await client.get("maths")).name == "maths"
        (tmp_path / "token").write_text("third")
        cluster.server.answers["GET"] = []
        watching = client.watch("maths")
        await anext(watching)
        cluster.server.answers["GET"] = [(401, {})]
        cluster.job(status=END["Succeeded"])
        assert [job.phase async for job in watching][-1] == "Succeeded"
        cluster.server.answers["GET"] = [(401, {})]
        with pytest.raises(NotAllowed):
            await client.get("maths")
        plugin.write_text(f'#!/bin/sh\necho x >> {tmp_path}/asked\nprintf \'{{"status": {{"token": "t%s"}}}}\' $$\n')
        cluster.server.answers["GET"] = [(401, {})] * 2
        with pytest.raises(NotAllowed):
            _ = [line async for line in client.logs("maths", pod="x")]
        assert (tmp_path / "asked").read_text() == "x\n", "not without end"
    assert [who for _, _, who in cluster.server.requests][:7] == ["first"] * 2 + ["second"] * 3 + ["third"] * 2


@pytest.mark.parametrize("name", ["", "..", "a/b", "a?b=c", "a b"])
async def test_a_name_that_is_no_name(cluster: Cluster, name: str) -> None:
    cluster.job()
    async with client_of(cluster) as client:
        with pytest.raises(NotFound, match="there are maths"):
            await client.get(name)


async def test_pages_are_all_read(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_client.client.PAGE", 2)
    for name in ("a", "b", "c", "d", "e"):
        cluster.job(name)
    async with client_of(cluster) as client:
        assert [job.name for job in await client.jobs()] == ["a", "b", "c", "d", "e"]


async def test_logs_are_of_the_newest_head(cluster: Cluster) -> None:
    cluster.job()
    async with client_of(cluster) as client:
        with pytest.raises(NotFound, match=r"checkpoint\.path/logs"):
            _ = [line async for line in client.logs("maths")]
        cluster.head("maths", "one\ntwo\n")
        assert [line async for line in client.logs("maths")] == ["one", "two"]


async def test_a_cluster_without_the_kind(cluster: Cluster) -> None:
    cluster.server.absent.add(JOBS.plural)
    async with client_of(cluster) as client:
        for ask in (client.jobs, lambda: client.get("maths"), lambda: client.submit(a_job())):
            with pytest.raises(NotInstalled, match="helm install rlhf-operator"):
                await ask()


@pytest.mark.parametrize(
    ("code", "text", "error", "words"),
    [
        (401, "Unauthorized", NotAllowed, "sign in again"),
        (403, '{"reason": "Forbidden", "message": "user cannot patch rlhfjobs.rlhf.dev"}', NotAllowed, "operator-edit"),
        (404, "404 page not found", NotFound, "404 page"),
        (409, '{"reason": "AlreadyExists", "message": "there"}', AlreadyThere, "there"),
        (409, '{"reason": "Conflict", "message": "changed meanwhile"}', Refused, "meanwhile"),
        (400, '{"message": "strict decoding error: unknown field \\"spec.novel\\""}', OtherVersion, "spec.novel"),
        (422, '{"reason": "Invalid", "message": "spec.x can never change"}', Refused, "never change"),
        (429, '{"message": "later"}', NoConnection, "later"),
        (503, "<html>a proxy</html>", NoConnection, "a proxy"),
        (400, "[1]", Refused, r"\[1\]"),
        (500, "", NoConnection, "500"),
    ],
)
def test_each_answer_is_the_error_of_what_to_do_next(code: int, text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        raise refusal(code, text)


@pytest.mark.parametrize("server", ["http://host:port", "http://[::1"])
def test_an_address_that_is_none(tmp_path: Path, server: str) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.format(server=server))
    with pytest.raises(NoConnection, match="cannot be used"):
        Client(connect(str(path)))


async def test_nobody_answers(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.format(server="http://127.0.0.1:9"))
    async with Client(connect(str(path))) as client:
        with pytest.raises(NoConnection, match=r"127.0.0.1:9 does not answer.*is the cluster up"):
            await client.jobs()


KUBECONFIG = """
current-context: one
clusters: [{{name: c, cluster: {{server: "{server}"}}}}]
users: [{{name: u, user: {{token: secret}}}}]
contexts:
  - {{name: one, context: {{cluster: c, user: u, namespace: team}}}}
  - {{name: lost, context: {{cluster: nowhere, user: u}}}}
"""


def test_a_kubeconfig_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.format(server="http://host:1"))
    found = connect(str(path))
    assert (found.server, found.namespace) == ("http://host:1", "team")
    assert found.headers == {"Authorization": "Bearer secret"}
    assert connect(str(path), namespace="mine").namespace == "mine"
    assert "secret" not in repr(found)


def test_kubeconfigs_are_merged_the_first_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("current-context: one\nusers: [{name: u, user: {tokenFile: token}}]\n")
    second.write_text(KUBECONFIG.format(server="http://host:1"))
    (tmp_path / "token").write_text("of-a-file\n")
    monkeypatch.setenv("KUBECONFIG", f"{first}:{second}:{tmp_path / 'absent'}")
    assert connect().headers == {"Authorization": "Bearer of-a-file"}


PLUGIN = "apiVersion: client.authentication.k8s.io/v1, command: sh, args: [-c, "


@pytest.mark.parametrize(
    ("user", "headers"),
    [
        ("{username: a, password: b}", {"Authorization": "Basic YTpi"}),
        ("{token: t, as: robot}", {"Authorization": "Bearer t", "Impersonate-User": "robot"}),
        ("{exec: {" + PLUGIN + """'echo "{\\"status\\": {\\"token\\": \\"$WHO\\"}}"'],
            env: [{name: WHO, value: x}]}}""",
            {"Authorization": "Bearer x"}),
    ],
)  # fmt: skip
def test_every_way_to_sign_in(tmp_path: Path, user: str, headers: dict[str, str]) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.format(server="http://host:1").replace("{token: secret}", user))
    assert connect(str(path)).headers == headers


@pytest.mark.parametrize(
    ("text", "context", "words"),
    [
        ("- 1", None, "no mapping"),
        ("{", None, "no kubeconfig"),
        ("current-context: ''", None, "no current-context"),
        (KUBECONFIG.format(server="http://h"), "onee", r"no context 'onee' \(did you mean one\?\)"),
        (KUBECONFIG.format(server="http://h"), "lost", "no cluster 'nowhere'"),
        (KUBECONFIG.format(server="host"), "one", "no server URL"),
        (KUBECONFIG.format(server="http://h").replace("token: secret", "auth-provider: {name: gcp}"), None,
            "exec plugin"),
        (KUBECONFIG.format(server="http://h").replace("token: secret", "tokenFile: absent"), None, "tokenFile"),
        (KUBECONFIG.format(server="https://h").replace("token: secret", "client-certificate-data: '!', "
            "client-key-data: eA=="), None, "certificates cannot be used"),
        (KUBECONFIG.format(server="http://h").replace("token: secret", "exec: {command: no-such-plugin, installHint: "
            "get it}"), None, "did not run.*get it"),
        (KUBECONFIG.format(server="http://h").replace("token: secret", "exec: {command: 'false'}"), None,
            "ended with 1"),
    ],
)  # fmt: skip
def test_a_kubeconfig_that_cannot_be_used(tmp_path: Path, text: str, context: str | None, words: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(NoConnection, match=words):
        connect(str(path), context)


def test_no_kubeconfig_at_all(tmp_path: Path) -> None:
    with pytest.raises(NoConnection, match="set KUBECONFIG"):
        connect(str(tmp_path / "absent"))


def test_a_status_of_a_newer_operator_is_read_as_far_as_it_can_be() -> None:
    conditions = [{"type": "Invented", "status": "True", "reason": "New", "message": "", "lastTransitionTime": "x"},
        *RUNNING["conditions"], {"type": "Accepted"}]
    newer = RUNNING | {
        "phase": "Hibernating", "conditions": conditions, "weather": "fine", "failures": [{"class": "Rust"}],
    }
    job = Job.of({"metadata": {"name": "maths"}, "status": newer})
    assert job.phase == "Hibernating", "as the operator wrote it"
    assert job.progress.step == 3
    assert [one.type for one in job.status.conditions] == ["Accepted", "CheckpointAvailable"]
    assert set(job.not_understood) == {
        "status.phase", "status.conditions.0", "status.conditions.3", "status.failures.0",
    }


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """To everything inside."""
    members = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(one for key, child in members for one in paths(child, (*path, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(st.sampled_from(paths(RUNNING)), JSON)
def test_whatever_a_status_holds_the_rest_is_read(path: tuple[Any, ...], other: Any) -> None:
    status: Any = copy.deepcopy({"": RUNNING})
    *parents, last = ("", *path)
    reduce(lambda node, key: node[key], parents, status)[last] = other
    job = Job.of({"metadata": {"name": "maths"}, "status": status[""]})
    if path and path[0] != "progress":
        assert job.progress.step == 3
    assert isinstance(job.phase, str)
    list(job.troubles())


@pytest.mark.parametrize("status", [None, {}, [], "text", {"progress": 3}, {"conditions": {"a": 1}}])
def test_a_status_that_is_none(status: object) -> None:
    job = Job.of({"metadata": {"name": "maths"}, "status": status})
    assert job.status == RLHFJobStatus()
    assert (job.phase, job.ended) == ("", False)


def test_the_package_gives_what_it_names_and_help_imports_no_http() -> None:
    import rlhf_client

    assert all(getattr(rlhf_client, name) for name in rlhf_client.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nobody'"):
        _ = rlhf_client.Nobody
    asked = "import sys, rlhf_cli.app; print(sorted({'httpx', 'pydantic', 'rich.live'} & set(sys.modules)))"
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", asked], env=given, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
