"""What the driver says of an actor that died. That a death is found, and told while the driver waits for others, is in
test_weight_sync.py.
"""

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayTaskError

from rlhf_worker import roll as module
from rlhf_worker import run
from rlhf_worker.errors import BadSpec, Fenced
from rlhf_worker.local import local_ray
from rlhf_worker.progress import Reporter
from rlhf_worker.roll import Member, Place, Roll
from rlhf_worker.stop import Ended, Stop, Terminated
from rlhf_worker.watcher import WORDS
from tests.worker.configs import run_config
from tests.worker.waiting import until

GUESS = ("Worker exits with connection error code 2. (1) The process is killed by SIGKILL by OOM killer due to high "
    "memory usage.")
PLACE = Place("tiny-trainer-0", "n", 7, "/log")
STOPPED = f"a line\nprocess 7 {WORDS} (state T): it is ended, to be started anew"


class Handle:
    """An actor's, as the roll uses it."""

    def __init__(self, number: int) -> None:
        self._actor_id = bytes([number]) * 16
        self.enrol = SimpleNamespace(remote=lambda: PLACE)


FIRST, SECOND = Handle(1), Handle(2)


def death(handle: Any) -> ActorDiedError:
    return ActorDiedError(
        ActorDiedErrorContext(class_name="Policy", actor_id=handle._actor_id, pid=7, error_message=GUESS)
    )


def through_an_actor(cause: Exception) -> Any:
    return RayTaskError("Policy.train()", "Traceback: rank.py line 7", cause, pid=1, ip="::1").as_instanceof_cause()


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A driver whose run ends by an error, while `died` of its two actors is dead and printed `log`: exit code and last
    words.
    """

    def driven(error: Exception, log: str, died: Handle | None) -> tuple[int, str]:
        def begun(config: Any, reporter: Any, stop: Any, roll: Roll, pod: Any) -> Any:
            roll.enrol(FIRST, "trainer rank 0")
            roll.enrol(SECOND, "critic rank 0")
            raise error

        monkeypatch.setattr(run, "_drive", begun)
        monkeypatch.setattr(run, "TERMINATION_LOG", tmp_path / "words")
        monkeypatch.setattr(module, "_question", lambda actor: actor)
        monkeypatch.setattr(module, "_death", lambda actor: death(actor) if actor == died else None)
        monkeypatch.setattr(module, "_answer", lambda place: place)
        monkeypatch.setattr(module, "_log", lambda place: log)
        monkeypatch.setattr("rlhf_worker.roll.ray.wait", lambda left, timeout: (left, []))
        (tmp_path / "words").touch()
        config = run_config()
        return run.guarded(lambda: run.drive(config, Reporter(config), Stop())), (tmp_path / "words").read_text()

    return driven


TORN = through_an_actor(RuntimeError("gloo: Connection closed by peer"))
AS_IT_ENDED = [pytest.param(death(SECOND), id="as Ray tells it"), pytest.param(TORN, id="as a peer tells it")]


@pytest.mark.parametrize("error", AS_IT_ENDED)
def test_a_stopped_actor_is_named_and_memory_is_not_blamed(drive: Any, error: Exception) -> None:
    code, words = drive(error, STOPPED, SECOND)
    assert code == 1
    assert words.startswith("ActorLost: critic rank 0 (pod tiny-trainer-0, process 7) was stopped by a signal (state "
        "T)")
    assert "memory" not in words and "gloo" not in words


@pytest.mark.parametrize("error", AS_IT_ENDED)
def test_a_dead_actor_is_named_with_the_end_of_its_log(drive: Any, error: Exception) -> None:
    code, words = drive(error, "Fatal Python error: Segmentation fault", SECOND)
    assert code == 1
    assert "ActorLost: critic rank 0 (pod tiny-trainer-0, process 7) died: The actor died unexpectedly" in words
    assert "its log ends:\nFatal Python error: Segmentation fault" in words and GUESS in words


@pytest.mark.parametrize(
    "error", [BadSpec("spec.x"), Fenced("later"), Terminated("asked"), Ended("gone"), ValueError("v")],
)
def test_what_came_of_no_death_stays_as_it_is(drive: Any, error: Exception) -> None:
    """Also where actors die of it; of an error that nobody foresaw, where none did."""
    died = None if isinstance(error, ValueError) else FIRST
    _, words = drive(error, "", died)
    assert "ActorLost" not in words


class Begun(Member):
    """Tells its process, and stands still before it is made, as one that a signal stopped while it imports."""

    def __init__(self, told: str) -> None:
        Path(told).write_text(str(os.getpid()))
        time.sleep(600)


@pytest.mark.ray
def test_an_actor_that_is_stopped_before_it_could_tell_its_place_is_named_as_stopped(tmp_path: Path) -> None:
    """By the watcher of its node, and by the driver, who knows of it only what Ray tells."""
    told, roll = tmp_path / "pid", Roll(Stop())
    with local_ray(run_config(), verbose=False):
        actor = ray.remote(Begun).options(num_cpus=0).remote(str(told))
        roll.enrol(actor, "engine 0")
        until(lambda: told.exists() and told.read_text() != "", 120)
        pid = int(told.read_text())
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ActorDiedError) as died:
            ray.get(actor.__ray_ready__.remote(), timeout=120)
        lost = str(roll.explained(died.value))
    assert lost.startswith(f"engine 0 (pod {socket.gethostname()}, process {pid}) was stopped by a signal (state T)")


def test_what_is_lost_ends_every_wait_and_also_a_save() -> None:
    stop = Stop()
    stop.lose(ValueError("rank 1"))
    with pytest.raises(ValueError, match="rank 1"):
        stop.interrupt()
    stop.end("the job is gone")
    with pytest.raises(Ended):
        stop.interrupt()
