"""The driver's output where it outlives the pods: `<checkpoint.path>/logs/attempt-<n>/<part>.log`.

Object stores cannot append, so a part is written anew with each chunk until it is full. Of an attempt its first part
and the newest stay, of the attempts the newest. Nothing that goes wrong here reaches the run: it costs the log and a
warning.
"""

import re
import sys

from rlhf_worker.errors import BadSpec
from rlhf_worker.storage import Store

PART_BYTES = 256 << 10
PARTS = 64  # of an attempt
ATTEMPTS = 20
ROOM_BYTES = 1 << 20  # of what waits while storage fails
FOLDER, PART = re.compile(r"attempt-(\d+)"), re.compile(r"(\d+)\.log")


class DriverLog:
    """One attempt's. One call at a time."""

    def __init__(self, root: str, attempt: int) -> None:
        self.root = root
        self.folder = f"logs/attempt-{attempt}"
        self._store: Store | None = None
        self._part, self._number, self._warned = b"", 0, False

    def add(self, text: str) -> None:
        self._part = (self._part + text.encode())[-ROOM_BYTES:]
        try:
            self._write_out()
        except Exception as error:  # a driver of fsspec may raise anything
            self._warn(error)

    def _write_out(self) -> None:
        store = self._opened()
        store.write(f"{self.folder}/{self._number:05}.log", self._part)
        if len(self._part) >= PART_BYTES:
            self._part, self._number = b"", self._number + 1
            for name in store.names(self.folder)[1 : -(PARTS - 1)]:
                store.remove(f"{self.folder}/{name}")

    def _opened(self) -> Store:
        """At the first chunk. A driver that is started again in its pod goes on after the parts that are there."""
        if self._store is None:
            store = Store(self.root)
            matches = [match for name in store.names("logs") if (match := FOLDER.fullmatch(name))]
            for match in sorted(matches, key=lambda match: int(match[1]))[:-ATTEMPTS]:
                store.remove(f"logs/{match[0]}")
            parts = [int(match[1]) for name in store.names(self.folder) if (match := PART.fullmatch(name))]
            self._number, self._store = max(parts, default=-1) + 1, store
        return self._store

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = error if isinstance(error, BadSpec) else f"{type(error).__name__}: {error}"
            print(f"the driver's log is not kept in {self.root}/{self.folder}: {reason}", file=sys.stderr, flush=True)
