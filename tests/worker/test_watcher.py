"""An actor whose process a signal stopped is ended; a silent one is not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rlhf_worker import watcher
from tests.worker.processes import below
from tests.worker.waiting import until


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        ("SRSR", False),  # asleep or computing, for however long
        ("DDDD", False),  # writes a checkpoint
        ("tttt", False),  # a debugger or profiler looks at it
        ("TSTS", False),  # goes on at once
        ("STT", True),
        ("TtTT", True),
    ],
)
def test_only_a_stopped_process_that_stays_so_is_ended(
    monkeypatch: pytest.MonkeyPatch, states: str, ended: bool,
) -> None:
    seen, killed = iter(states), list[tuple[int, int]]()
    left = iter([7] * len(states))  # until the actor's own end
    monkeypatch.setattr("rlhf_worker.watcher.os.getppid", lambda: next(left, 1))
    monkeypatch.setattr("rlhf_worker.watcher.os.kill", lambda *given: killed.append(given))
    monkeypatch.setattr("rlhf_worker.watcher.time.sleep", lambda _: None)
    monkeypatch.setattr(watcher, "state", lambda _: next(seen))
    watcher.watch(7)
    assert killed == [(7, signal.SIGKILL)] * ended


@pytest.fixture
def actor() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has itself watched."""
    code = "import time; from rlhf_worker.watcher import watched; kept = watched(); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_an_actor_that_a_signal_stopped_is_ended_and_its_watcher_with_it(actor: subprocess.Popen[bytes]) -> None:
    until(lambda: bool(below(actor.pid)[1:]))
    os.kill(actor.pid, signal.SIGSTOP)
    _, words = actor.communicate(timeout=20)  # which ends with the last process that holds stderr
    assert actor.returncode == -signal.SIGKILL
    assert f"process {actor.pid} was stopped by a signal" in words.decode()


def test_the_watcher_of_an_actor_that_dies_ends(actor: subprocess.Popen[bytes]) -> None:
    until(lambda: bool(below(actor.pid)[1:]))
    actor.kill()
    assert actor.communicate(timeout=20)[1] == b""
