"""The preStop hook of a worker, by the real bash against real sockets."""

import socket
import subprocess
from collections.abc import Iterator

import pytest

from rlhf_api.progress import DRIVER_PORT
from rlhf_operator.plan.stopping import CONNECT_SECONDS, ENDING_SECONDS, GRACE_SECONDS, worker_pre_stop

HOST = "127.0.0.1"


@pytest.fixture
def driver() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0), backlog=8) as listening:
        listening.settimeout(30)
        yield listening


def hook(
    port: int, script: str = worker_pre_stop("trainer", GRACE_SECONDS), host: str = HOST
) -> subprocess.Popen[bytes]:
    environment = {"PATH": "/usr/bin:/bin", "FQ_RAY_IP": host, "RAY_AUTH_TOKEN": "a-token", "RLHF_POD_NAME": "a-pod"}
    command = ["bash", "-c", script.replace(f"/{DRIVER_PORT}", f"/{port}")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_it_tells_the_driver_and_waits_until_the_driver_is_gone(driver: socket.socket) -> None:
    process = hook(driver.getsockname()[1])
    probe, _ = driver.accept()
    probe.close()
    connection, _ = driver.accept()
    assert connection.makefile().readline() == "a-token trainer a-pod\n"
    assert process.poll() is None
    connection.close()
    assert ended(process) == (0, b"", b"")


def test_it_ends_where_nobody_listens(driver: socket.socket) -> None:
    port = driver.getsockname()[1]
    driver.close()
    assert ended(hook(port)) == (0, b"", b"")


@pytest.mark.parametrize("host", ["no-such-head.invalid", ""])
def test_it_ends_where_the_head_has_no_name(host: str) -> None:
    assert ended(hook(DRIVER_PORT, host=host)) == (0, b"", b"")


def test_it_ends_though_the_head_does_not_answer() -> None:
    """A full backlog takes no more connections, as a node that is gone."""
    script = worker_pre_stop("trainer", GRACE_SECONDS).replace(f"timeout {CONNECT_SECONDS} ", "timeout 0.5 ")
    with socket.socket() as silent, socket.socket() as first:
        silent.bind((HOST, 0))
        silent.listen(0)
        first.connect(silent.getsockname())
        assert ended(hook(silent.getsockname()[1], script)) == (0, b"", b"")


def test_it_ends_though_the_driver_does_not(driver: socket.socket) -> None:
    script = worker_pre_stop("trainer", GRACE_SECONDS).replace(
        f"timeout {GRACE_SECONDS - ENDING_SECONDS} ", "timeout 0.5 "
    )
    assert ended(hook(driver.getsockname()[1], script)) == (0, b"", b"")


@pytest.mark.parametrize(("grace", "seconds"), [(120, 110), (600, 590), (3, 1), ("soon", 110), (None, 110)])
def test_it_leaves_time_for_rays_own_end(grace: object, seconds: int) -> None:
    assert f"\ntimeout {seconds} " in worker_pre_stop("rollout", grace)
