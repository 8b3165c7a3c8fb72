"""The benchmarks of the operator, as small as they get: they run to the end, and what they count is plausible."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from hack.generate import ROOT as CLONE

pytestmark = pytest.mark.cluster


def result(module: str, *arguments: str) -> Any:
    """The line of JSON that it prints last. It has an API server of its own, and needs no cluster."""
    done = subprocess.run(
        [sys.executable, "-m", f"hack.bench.{module}", *arguments],
        cwd=CLONE,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def smokes() -> Iterator[dict[str, Future[Any]]]:
    """Two at a time: most of each is waiting for leases and reports."""
    commands = {
        "scale": ("--jobs", "5", "--idle-seconds", "3", "--pods", "standin"),
        "heartbeats": ("--jobs", "3", "--seconds", "11"), "handover": ("--jobs", "2", "--rounds", "1"),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(result, name, *given, "--limit", "120") for name, given in commands.items()}


def test_scale_makes_every_raycluster_and_leaves_nothing(smokes: dict[str, Future[Any]]) -> None:
    (found,) = smokes["scale"].result()
    assert found["calls"]["create rayclusters"] == 5
    assert found["calls_a_job"] > 1
    assert found["idle_calls"] == 0, "nothing changed"
    assert found["deleted_all"] > 0


def test_jobs_that_report_are_running_and_heard(smokes: dict[str, Future[Any]]) -> None:
    windows = smokes["heartbeats"].result()
    assert [window["reports"] > 0 for window in windows] == [False, True, True]


def test_another_operator_takes_over_and_does_nothing_twice(smokes: dict[str, Future[Any]]) -> None:
    found = smokes["handover"].result()
    assert set(found["seconds"]) == {"SIGKILL", "SIGTERM"}
    assert not found["twice"]
