"""An actor whose process a signal stopped is ended; a silent one is not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
from ray._common.utils import load_class
from ray._private import ray_constants

from rlhf_worker import watcher
from tests.worker.processes import below, title
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
    seen, killed = iter(states), list[int]()
    left = iter(states)  # until the actor's own end
    monkeypatch.setattr("rlhf_worker.watcher.time.sleep", lambda _: None)
    monkeypatch.setattr(watcher, "state", lambda _: next(seen))
    monkeypatch.setattr(watcher, "end", lambda pid, why: killed.append(pid))
    watcher.watch(lambda: next(left, "") != "", lambda: watcher.halted([7]))
    assert killed == [7] * ended


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


RAYLET = """
import subprocess, sys
hook = [sys.executable, "-c", "from rlhf_worker.watcher import watch_node; watch_node(); print(flush=True); input()"]
sleep = ["-c", "import time; time.sleep(100)"]
core = ["-c", "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(100)"]
core += [sys.executable, *sleep]
for name in ("ray::Policy.__init__", "agent", "ray::Engine.start"):
    kept = {"stdout": subprocess.PIPE, "stderr": open(sys.argv[1], "a"), "text": True}
    begun = subprocess.Popen([name, *core], executable=sys.executable, **kept)
    print(begun.pid, begun.stdout.readline().strip(), flush=True)
for worker in [subprocess.Popen(hook, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]:
    worker.stdout.readline()
    worker.kill()
print(flush=True)
input()
"""


@dataclass
class Node:
    """What passes for a raylet, whose workers began a watch and ended, with two more workers and an agent, each of
    which has a child."""

    raylet: subprocess.Popen[str]
    log: Path
    worker: int
    agent: int
    core: int  # what another worker began

    def watchers(self) -> list[int]:
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if title(pid).split("\0")[-2:] == ["--workers-of", str(self.raylet.pid)]]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    log = tmp_path / "worker.err"
    raylet = subprocess.Popen(
        [sys.executable, "-c", RAYLET, str(log)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert raylet.stdout is not None
    family = [[int(pid) for pid in raylet.stdout.readline().split()] for _ in range(3)]
    (worker, _), (agent, _), (_, core) = family
    raylet.stdout.readline()
    yield Node(raylet, log, worker, agent, core)
    raylet.kill()
    raylet.communicate()
    for pid in chain(*family):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_one_watcher_a_node_ends_a_stopped_worker_that_nobody_could_ask_yet(node: Node) -> None:
    until(lambda: len(node.watchers()) == 1)
    os.kill(node.agent, signal.SIGSTOP)
    os.kill(node.worker, signal.SIGSTOP)
    until(lambda: watcher.state(node.worker) in watcher.ENDED)
    assert f"process {node.worker} was stopped by a signal (state T)" in node.log.read_text()
    assert watcher.state(node.agent) == "T", "a raylet ends with its agents: they are none of ours"
    assert len(node.watchers()) == 1


def test_what_a_worker_began_is_watched_too_before_anybody_could_ask_it(node: Node) -> None:
    until(lambda: len(node.watchers()) == 1)
    os.kill(node.core, signal.SIGSTOP)
    until(lambda: watcher.state(node.core) in watcher.ENDED)
    assert f"process {node.core} was stopped by a signal (state T)" in node.log.read_text()


def test_the_watcher_of_a_node_ends_with_its_raylet(node: Node) -> None:
    until(lambda: len(node.watchers()) == 1)
    node.raylet.kill()
    node.raylet.wait()
    until(lambda: not node.watchers())


def test_the_agents_of_a_raylet_are_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = ["ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::Policy.__init__", "python"]
    monkeypatch.setattr(watcher, "children", lambda pid: iter(range(len(titles)) if pid == 7 else ()))
    monkeypatch.setattr(watcher, "text", lambda path: titles[int(path.parts[2])] + "\0\0")
    assert watcher.workers_of(7) == [0, 3]


def test_the_image_hands_the_hook_to_its_rays() -> None:
    ((name, function),) = watcher.HOOK.items()
    assert f"ENV {name}={function}\n" in (Path(__file__).parents[2] / "images/worker.Dockerfile").read_text()
    assert name == ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    assert load_class(function) is watcher.watch_node
