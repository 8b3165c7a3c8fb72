"""A real cluster for the tests: the embedded one, with the chart's operator. One a session, taken down at its end.

RLHF_KEEP_CLUSTER=1 leaves it up, for the next run or a look.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from hack.cluster import settings
from hack.kubectl import OPERATOR_NAMESPACE, Kube, kube
from tests.cluster.jobs import CLONE, Undisturbed, rewards, sample, status, step, wait_for_condition
from tests.cluster.waiting import wait_for

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


@pytest.fixture(scope="session")
def undisturbed(operator: Kube, volumes: Path) -> Undisturbed:
    """The tiny colocated sample to its end. Its operator is deleted by force on the way, and it does not notice."""
    namespace = f"undisturbed-{next(numbers)}"
    operator.run("create", "namespace", namespace)
    job = sample("tiny-colocated.yaml", "tiny", namespace)
    operator.apply(job)
    wait_for_condition(operator, namespace, "tiny", "Running", 240)
    wait_for(lambda: step(operator, namespace, "tiny") >= 3, 120, "three steps")
    selector = "app.kubernetes.io/name=rlhf-operator"
    operator.run("delete", "pod", "-n", OPERATOR_NAMESPACE, "-l", selector, "--force", "--grace-period=0")
    wait_for_condition(operator, namespace, "tiny", "Complete", 300)
    return Undisturbed(job, status(operator, namespace, "tiny"), rewards(volumes, job))
