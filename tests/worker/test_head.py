"""A driver knows when the head that it was connected to is another one, and when one that starts waits for the dead."""

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_worker import run, watcher
from rlhf_worker.pod import head
from rlhf_worker.stop import Stop
from rlhf_worker.watcher import state
from tests.worker import waiting


def begin(folder: Path, name: str) -> Path:
    """As `ray start --head` does: a directory, and the link to the newest."""
    session = folder / name
    session.mkdir()
    latest = folder / head.LATEST
    latest.unlink(missing_ok=True)
    latest.symlink_to(session)
    return session


def test_a_head_that_stays_or_is_just_starting_is_no_news(tmp_path: Path) -> None:
    session = begin(tmp_path, "session_1")
    assert head.gone(session) is None
    (tmp_path / head.LATEST).unlink()
    assert head.gone(session) is None, "the link is away for a moment while a head starts"


def test_another_head_is_told_once_with_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.01)
    told: queue.Queue[str] = queue.Queue()
    head.watch(begin(tmp_path, "session_1"), told.put)
    begin(tmp_path, "session_2")
    assert "session_2 took the place of session_1" in told.get(timeout=10)
    for thread in threading.enumerate():
        if thread.name == "head":
            thread.join(10)
    assert told.empty()


def test_a_watch_that_was_ended_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.01)
    told: list[str] = []
    head.watch(begin(tmp_path, "session_1"), told.append).set()
    begin(tmp_path, "session_2")
    assert head.gone(tmp_path / "session_1") is not None
    for thread in threading.enumerate():
        if thread.name == "head":
            thread.join(10)
    assert told == []


START = """
import subprocess, sys, time
server = subprocess.Popen([sys.argv[1], "600"])
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def ray_start(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], int]]]:
    """A process called as `ray start` is, that looks at nothing it began, and its server of this name."""
    (script := tmp_path / "ray").write_text(START)
    begun: list[subprocess.Popen[str]] = []

    def begin(name: str) -> tuple[subprocess.Popen[str], int]:
        if not (server := tmp_path / name).exists():
            server.symlink_to(shutil.which("sleep") or "")
        command = [sys.executable, str(script), str(server)]
        begun.append(subprocess.Popen([*command, "start", "--head"], stdout=subprocess.PIPE, text=True))
        out = begun[-1].stdout
        assert out is not None
        return begun[-1], int(out.readline())

    yield begin
    for process in begun:
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
        process.kill()
        process.wait()


def kill(server: int) -> None:
    os.kill(server, signal.SIGKILL)
    waiting.until(lambda: state(server) == "Z")


@pytest.mark.parametrize("name", head.SERVERS)
def test_a_ray_start_whose_server_died_is_told_from_others(ray_start: Any, name: str) -> None:
    process, server = ray_start(name)
    other, unknown = ray_start("log_monitor")
    assert head.bereft().keys() & {process.pid, other.pid} == set()
    kill(server)
    kill(unknown)
    found = head.bereft()
    assert found[process.pid] == name and other.pid not in found


def test_a_ray_start_that_waits_for_the_dead_is_ended_while_ray_starts(
    ray_start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a driver that tries to connect meanwhile, and does when the kubelet has begun Ray anew."""
    monkeypatch.setattr(watcher, "LOOK_SECONDS", 0.05)
    (process, server), (well, _) = ray_start("gcs_server"), ray_start("gcs_server")
    config = SimpleNamespace(job=SimpleNamespace(name="sample"))
    reporter: Any = SimpleNamespace(update=lambda **_: None, pods_ready=True)

    def init(**_: Any) -> Any:
        if process.poll() is None:
            raise ConnectionError("no head yet")
        return SimpleNamespace(address_info={"session_dir": "session"})

    monkeypatch.setattr("rlhf_worker.run.ray.init", init)
    monkeypatch.setattr("rlhf_worker.run.head.watch", lambda session, end: None)
    kill(server)
    run._connect(config, reporter, Stop())  # type: ignore[arg-type]
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert well.poll() is None
    for thread in threading.enumerate():
        if thread.name == "head start":
            thread.join(10)
    late, server = ray_start("raylet")
    kill(server)
    assert head.bereft().keys() >= {late.pid} and late.poll() is None, "Ray has started: it is not for us to end"
