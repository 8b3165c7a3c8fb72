"""Ray's head under the driver. It keeps nothing over a restart, so the driver of an earlier head drives nothing any
more.

Ray tells a driver so only where a call of its own fails: one that waits for a call whose raylet is gone waits for ever.
"""

import threading
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 1.0
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
