"""Ray's head under the driver. It keeps nothing over a restart, so the driver of an earlier head drives nothing any
more.

Ray tells a driver so only where a call of its own fails: one that waits for a call whose raylet is gone waits for ever.
And `ray start` looks at what it began only once all of that is up: until then it waits for a dead one, half a minute.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_worker import watcher
from rlhf_worker.watcher import children, state, text

LOOK_SECONDS = 1.0
SERVERS = ("gcs_server", "raylet")
LATEST = "session_latest"  # beside the sessions: a link to the newest, which each start of a head sets anew


def gone(session: Path) -> str | None:
    """Why the head of this session no longer is, if so; `session` as ray.init tells it."""
    latest = session.parent / LATEST
    try:
        newest = latest.resolve(strict=True)
    except OSError:  # a head that starts takes the old link away first
        return None
    if newest == session.resolve():
        return None
    return f"Ray's head ended under this driver, and another began: {newest.name} took the place of {session.name}"


def watch(session: Path, end: Callable[[str], object]) -> threading.Event:
    """`end` is called once, from a thread, when the head is another one. The event, when set, ends the watch."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(LOOK_SECONDS):
            if why := gone(session):
                end(why)
                return

    threading.Thread(target=work, name="head", daemon=True).start()
    return stopped


def bereft() -> dict[int, str]:
    """Each `ray start` of this pod that has a server which died, and which one."""
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        pid, words = int(process.name), text(process / "cmdline").split("\0")
        if "start" in words and any(Path(word).name == "ray" for word in words[: words.index("start")]):
            dead = (text(Path(f"/proc/{child}/comm")).strip() for child in children(pid) if state(child) == "Z")
            found.update((pid, name) for name in dead if name in SERVERS)
    return found


@contextmanager
def attended() -> Iterator[None]:
    """While Ray starts, end a `ray start` that does not notice that its server died: the kubelet begins it anew. One
    that looks after its servers ends by itself within a look."""
    started = threading.Event()

    def work() -> None:
        watcher.watch(
            lambda: not started.is_set(),
            lambda: {pid: f"waits for its {server}, which died" for pid, server in bereft().items()},
        )

    threading.Thread(target=work, name="head start", daemon=True).start()
    try:
        yield
    finally:
        started.set()
