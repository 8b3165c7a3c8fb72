"""Every actor that a run cannot do without, by name: that one died, where it was, and what its process printed last.

Ray tells of a death whoever has a call under way, by a number and with guesses at the cause; a rank's peers may tell of
a broken connection before it. Here the driver hears of it whatever it waits for, and its last words name the actor. """

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_worker.calls import root_cause
from rlhf_worker.errors import ActorLost, BadData, BadSpec, Fenced
from rlhf_worker.stop import Ended, Stop, Terminated
from rlhf_worker.watcher import STOPPED, WORDS

LOOK_SECONDS = 2.0  # between two looks at whether all live
CAUSE_SECONDS = 5.0  # for Ray to tell of the death that an error came from
LOG_SECONDS = 60.0  # for the node to tell what the process printed: Ray starts a process for it, on a busy machine late
LOG_BYTES = 1500
OF_NO_DEATH = (ActorLost, BadSpec, BadData, Fenced, Terminated, Ended)

Death = tuple[ActorHandle, ActorDiedError]


@dataclass(frozen=True, slots=True)
class Place:
    """Of an actor's process. `node`: Ray's; `log`: where its stderr goes, on that node; "": among Ray's own there."""

    pod: str
    node: str
    pid: int
    log: str

    def __str__(self) -> str:
        return f"pod {self.pod}, process {self.pid}"


class Member:
    """What every actor of a run is."""

    def enrol(self) -> Place:
        """The first call."""
        log = str(Path("/proc/self/fd/2").readlink())
        return Place(socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid(), log)


class Roll:
    """`close` before the actors are: what ends then is no loss."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._members: dict[ActorHandle, tuple[str, Any]] = {}  # title, and the call that tells the place
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def enrol(self, actor: ActorHandle, title: str) -> None:
        with self._lock:
            self._members[actor] = (title, actor.enrol.remote())

    def release(self, actors: Iterable[ActorHandle]) -> None:
        """Someone else looks after these from now on."""
        with self._lock:
            for actor in actors:
                del self._members[actor]

    def watch(self) -> None:
        """From now on a death ends every wait of the driver."""
        self._thread = threading.Thread(target=self._watch, name="roll", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        asked: dict[ActorHandle, Any] = {}
        while not self._closing.wait(LOOK_SECONDS):
            try:
                asked, died = self._look(asked)
                if died:
                    self._stop.lose(self._lost(*died))
                    return
            except Exception as error:  # a Ray that goes away ends the driver elsewhere; a look must not
                print(f"the run's actors could not be watched: {error}", file=sys.stderr, flush=True)

    def _look(self, asked: dict[ActorHandle, Any]) -> tuple[dict[ActorHandle, Any], Death | None]:
        """One question to each: an idle actor answers it, a busy one later, and Ray for one that died. Returns those
        that are open.
        """
        asked = {actor: asked.get(actor) or _question(actor) for actor in self._actors()}
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0) if asked else ([], [])
        died = next(((actor, death) for actor, one in asked.items() if one in done and (death := _death(one))), None)
        return {actor: one for actor, one in asked.items() if one not in done}, died

    def _actors(self) -> list[ActorHandle]:
        with self._lock:
            return list(self._members)

    def explained(self, error: Exception) -> Exception:
        """In place of an error that is an actor's death, or came from one, an ActorLost; any other as it is."""
        if isinstance(root_cause(error), OF_NO_DEATH) or (died := self._died(error)) is None:
            return error
        lost = self._lost(*died)
        # Ray does not know of a signal, and would guess at memory
        lost.__cause__ = None if WORDS in str(lost) else error
        return lost

    def _lost(self, actor: ActorHandle, death: ActorDiedError) -> ActorLost:
        title, place = self._members[actor]
        where = _answer(place) or _told_by_ray(death)
        end = _log(where) if where else ""
        who = f"{title} ({where or 'it had not told its place'})"
        if WORDS in end:
            return ActorLost(f"{who} {WORDS} (state {STOPPED}) and did not go on: it was ended, the run goes on from "
                "its newest checkpoint")
        return ActorLost(f"{who} died: {death.error_msg.strip()}" + (f"\nits log ends:\n{end}" if end else ""))

    def _died(self, error: Exception) -> Death | None:
        """Of the members; Ray may need a moment to tell."""
        cause, by_id = root_cause(error), {actor._actor_id.hex(): actor for actor in self._actors()}
        if isinstance(cause, ActorDiedError) and (found := by_id.get(cause.actor_id)):
            return found, cause
        asked = {_question(actor): actor for actor in by_id.values()}
        end, left = time.monotonic() + CAUSE_SECONDS, list(asked)
        while left and (seconds := end - time.monotonic()) > 0:
            done, left = ray.wait(left, timeout=seconds)
            for question in done:
                if died := _death(question):
                    return asked[question], died
        return None


def _question(actor: ActorHandle) -> Any:
    return actor.__ray_ready__.remote()


def _death(question: Any) -> ActorDiedError | None:
    """What ended a question that has ended, where it is that."""
    try:
        ray.get(question)
    except ActorDiedError as error:
        return error
    except RayError:
        pass
    return None


def _answer(place: Any) -> Place | None:
    """None of an actor that died before it could tell."""
    with suppress(RayError):
        found: Place = ray.get(place, timeout=0)
        return found
    return None


def _told_by_ray(death: ActorDiedError) -> Place | None:
    """Of an actor that died before it could tell its place, as one that is stopped while it is made."""
    pid, address = (re.search(rf"^\t{name}: (\S+)$", death.error_msg, re.MULTILINE) for name in ("pid", "ip"))
    nodes = ray.nodes() if pid and address else []
    there = next((node for node in nodes if address and node["NodeManagerAddress"] == address[1]), None)
    return Place(there["NodeManagerHostname"], there["NodeID"], int(pid[1]), "") if there and pid else None


def _log(place: Place) -> str:
    """The end of what the process printed; nothing where its node is gone too."""
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    with suppress(RayError):
        found: str = ray.get(
            ray.remote(_end).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(place.log, place.pid),
            timeout=LOG_SECONDS,
        )
        return found
    return ""


def _end(log: str, pid: int) -> str:
    """In a process of Ray's, whose log lies beside all others of the node."""
    try:
        logs = Path("/proc/self/fd/2").readlink().parent
        with (Path(log) if log else next(logs.glob(f"worker-*-{pid}.err"))).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            return file.read().decode(errors="replace").strip()
    except (OSError, StopIteration):
        return ""
