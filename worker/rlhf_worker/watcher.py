"""Ends an actor of the run that a signal stopped: Ray tells at once of one that died, and never of one that stands
still.

By the state of its process, never by its silence: one that compiles, computes or saves for long is not stopped.
`watched` starts this file as a script: a small process that imports nothing of the worker and ends with its parent.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STOPPED = "T"  # of /proc/<pid>/stat: by a signal, not by a tracer
LOOK_SECONDS = 1.0
LOOKS = 2  # in a row: what goes on at once may
WORDS = "was stopped by a signal"


def watched() -> subprocess.Popen[bytes]:
    """From now on this process is, for as long as it lives. Keep what is returned."""
    return subprocess.Popen([sys.executable, "-I", "-S", __file__, str(os.getpid())])


def state(pid: int) -> str:
    """One letter; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def watch(pid: int) -> None:
    looks = 0
    while os.getppid() == pid:
        looks = looks + 1 if state(pid) == STOPPED else 0
        if looks == LOOKS:
            words = f"process {pid} {WORDS} (state {STOPPED}): it is ended, to be started anew"
            print(words, file=sys.stderr, flush=True)
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
