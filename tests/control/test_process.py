"""The process around the decisions: flags, kopf's part, the connection's errors, the lock, the memory."""

import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.client.exceptions import ApiException

from rlhf_operator.client import Connection, KindMissing, _translated
from rlhf_operator.handlers import registry
from rlhf_operator.kinds import RAYCLUSTERS
from rlhf_operator.leader import _tried
from rlhf_operator.settings import kopf_settings, parse

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
    found: Any = registry(lambda key: None, Connection())
    assert len(list(found._watching.get_all_handlers())) == 3
    for kind in (found._changing, found._spawning, found._indexing, found._webhooks):
        assert list(kind.get_all_handlers()) == []


async def test_every_event_wakes_its_job() -> None:
    woken: list[tuple[str, str]] = []
    found: Any = registry(woken.append, Connection())
    for handler in found._watching.get_all_handlers():
        await handler.fn(namespace="ns", name="a", labels={"rlhf.dev/job": "a"})
    assert woken == [("ns", "a")] * 3


def test_the_api_server_filters_pods_and_clusters() -> None:
    settings = kopf_settings("team-a")
    assert sorted(settings.watching.label_selectors.values()) == ["rlhf.dev/job", "rlhf.dev/job"]
    assert settings.posting.enabled is False
    assert settings.scanning.disabled, "a Role cannot list CRDs"
    assert not kopf_settings(None).scanning.disabled, "KubeRay may be installed later"


def test_a_missing_kind_is_told_from_a_missing_object() -> None:
    assert isinstance(_translated(RAYCLUSTERS, ApiException(status=404, body="404 page not found\n")), KindMissing)
    error = _translated(RAYCLUSTERS, ApiException(status=404, body=STATUS))
    assert not isinstance(error, KindMissing)
    assert (error.status, error.reason) == (404, "NotFound")


def test_an_answer_that_is_no_status_keeps_its_words() -> None:
    error = _translated(RAYCLUSTERS, ApiException(status=502, reason="Bad Gateway", body="<html>proxy</html>"))
    assert (error.status, error.message) == (502, "<html>proxy</html>")


async def test_a_network_error_is_a_failed_try_for_the_lease_and_not_its_end() -> None:
    async def refused() -> tuple[bool, str]:
        raise ConnectionRefusedError("no API server")

    assert await _tried(refused(), lambda error: (False, error.reason)) == (False, "no API server")


def test_the_imports_fit_the_operators_memory() -> None:
    """All of it but the objects of the jobs; the promise is 120 MiB with one job."""
    script = "import rlhf_operator.__main__, re; print(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(out) / 1024 < 100
