"""A real cluster for the tests: the embedded one, with the chart's operator. One a session, taken down at its end.

RLHF_KEEP_CLUSTER=1 leaves it up, for the next run or a look.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hack.cluster import settings
from hack.kubectl import Kube, kube

T = TypeVar("T")
POLL_SECONDS = 2.0  # a kubectl costs half a second of a core, which the jobs under test need
CLONE = Path(__file__).resolve().parents[2]
numbers = count(int(time.time()) % 100000)


def hack_cluster(verb: str) -> int:
    return subprocess.run([sys.executable, "-m", "hack.cluster", verb], cwd=CLONE, check=False).returncode


def make_model(directory: Path, *options: str) -> None:
    """The tiny model and its prompts, by hack/tiny_model.py."""
    subprocess.run([sys.executable, "-m", "hack.tiny_model", str(directory), *options], cwd=CLONE, check=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Kube]:
    if hack_cluster("up") != 0:
        pytest.fail("the embedded cluster did not come up: see what it printed", pytrace=False)
    yield kube(settings.from_environment())
    if not os.environ.get("RLHF_KEEP_CLUSTER"):
        assert hack_cluster("down") == 0


@pytest.fixture(scope="session")
def operator(cluster: Kube) -> Kube:
    """The cluster with the chart installed."""
    cluster.install_operator()
    return cluster


@pytest.fixture(scope="session")
def volumes(cluster: Kube) -> Path:
    """This machine's side of /var/lib/rlhf in the pods, with the tiny model in it."""
    directory = settings.from_environment().volumes
    make_model(directory / "models" / "tiny")
    return directory


@pytest.fixture
def namespace(cluster: Kube) -> Iterator[str]:
    name = f"test-{next(numbers)}"
    cluster.run("create", "namespace", name)
    yield name
    cluster.run("delete", "namespace", name, "--wait=false")


def wait_for(probe: Callable[[], T | None], seconds: float, what: Callable[[], Any] | str) -> T:
    """The first truthy answer of `probe`, or a failure that says what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(POLL_SECONDS)
    pytest.fail(f"not within {seconds:.0f} s: {what if isinstance(what, str) else what()}", pytrace=True)
