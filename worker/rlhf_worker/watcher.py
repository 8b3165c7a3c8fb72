"""Ends a process of the run that a signal stopped: Ray tells at once of one that died, and never of one that stands
still.

By the state of the process, never by its silence: one that compiles, computes or saves for long is not stopped. One
watcher a node has all of its Ray's workers in view from their first moment, also while they import what they run, and
what they begin, such as a core of vLLM that nobody can ask before it is up; the driver has its own. Each is this file
as a script: a small process that imports nothing of the worker, and ends with what it watches.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

STOPPED = "T"  # of /proc/<pid>/stat: by a signal, not by a tracer
ENDED = ("", "Z", "X")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # without which a raylet ends
LOOK_SECONDS = 1.0
LOOKS = 2  # in a row: what goes on at once may
WORDS = "was stopped by a signal"
# Environment of a raylet. Ray hands a `worker_process_setup_hook` to its workers by this name; given as a runtime
# environment it would come by way of an agent, which each worker's start then waits for.
HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "rlhf_worker.watcher.watch_node"}


def watched() -> subprocess.Popen[bytes]:
    """From now on this process is, for as long as it lives. Keep what is returned."""
    return subprocess.Popen([sys.executable, "-I", "-S", __file__, str(os.getpid())])


def watch_node() -> None:
    """Ray's hook, in each of its worker processes before it gets work: the first one begins the watch of all."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as free:
        free.bind(_name(os.getppid()))  # in use: somebody watches already
        free.close()
        command = [sys.executable, "-I", "-S", __file__, "--workers-of", str(os.getppid())]
        null = subprocess.DEVNULL
        subprocess.run(command, stdin=null, stdout=null, stderr=null, check=False)


def state(pid: int) -> str:
    """One letter; empty for a process that is gone."""
    return text(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1]


def children(pid: int) -> Iterator[int]:
    with suppress(OSError):  # it ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, text(thread / "children").split())


def below(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from below(child)


def watch(alive: Callable[[], bool], faults: Callable[[], dict[int, str]]) -> None:
    """Kills the processes that have a fault for LOOKS looks in a row, for as long as it is `alive` that is watched
    for. faults: what is wrong with which one, now."""
    looks: dict[int, int] = {}
    while alive():
        found = faults()
        looks = {pid: looks.get(pid, 0) + 1 for pid in found}
        for pid in [pid for pid, count in looks.items() if count == LOOKS]:
            end(pid, found[pid])
        time.sleep(LOOK_SECONDS)


def halted(pids: Iterable[int]) -> dict[int, str]:
    return {pid: f"{WORDS} (state {STOPPED})" for pid in pids if state(pid) == STOPPED}


def workers_of(raylet: int) -> list[int]:
    """With all that is below them."""
    titles = {pid: text(Path(f"/proc/{pid}/cmdline")).rstrip("\0") for pid in children(raylet)}
    workers = [pid for pid, title in titles.items() if title.startswith("ray::") and title not in AGENTS]
    return [*workers, *(pid for worker in workers for pid in below(worker))]


def end(pid: int, why: str) -> None:
    """Its own log says why, where the driver looks for its last words."""
    with suppress(OSError), Path(f"/proc/{pid}/fd/2").open("a") as log:
        log.write(f"process {pid} {why}: it is ended, to be started anew\n")
    with suppress(ProcessLookupError, PermissionError):  # of a container whose user is another
        os.kill(pid, signal.SIGKILL)


def _name(raylet: int) -> str:
    """Of the abstract socket that the watcher of this raylet holds."""
    return f"\0rlhf-watcher/{Path('/proc/self/ns/pid').readlink()}/{raylet}"


def text(file: Path) -> str:
    """Empty for a file that is not there."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def main(given: list[str]) -> None:
    pid = int(given[-1])
    if given[0] != "--workers-of":
        watch(lambda: os.getppid() == pid, lambda: halted([pid]))
    elif not os.fork():  # no child of the worker that began it, whose children end with it
        os.setsid()
        with suppress(OSError), socket.socket(socket.AF_UNIX) as mine:
            mine.bind(_name(pid))
            watch(lambda: state(pid) not in ENDED, lambda: halted(workers_of(pid)))


if __name__ == "__main__":
    main(sys.argv[1:])
