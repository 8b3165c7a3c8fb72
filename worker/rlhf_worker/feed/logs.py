"""The driver's output where it outlives the pods: `<checkpoint.path>/logs/attempt-<n>/<part>.log`.

Object stores cannot append, so a part is written anew with each chunk until it is full. Of an attempt its first part
and the newest stay, of the attempts the newest. Nothing that goes wrong here reaches
the run: it costs the log and a warning.
"""

import re
import sys
import threading

from rlhf_worker.errors import BadSpec
from rlhf_worker.storage import Store

PART_BYTES = 256 << 10
PARTS = 64  # of an attempt
ATTEMPTS = 20
ROOM_BYTES = 1 << 20  # of what waits while storage does not answer
FOLDER = re.compile(r"attempt-(\d+)")


class DriverLog:
    """One attempt's. Calls may overlap: one of them writes, and for the others too."""

    def __init__(self, root: str, attempt: int) -> None:
        self.root = root
        self.folder = f"logs/attempt-{attempt}"
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._part, self._written, self._number = b"", b"", 0
        self._busy = self._warned = False

    def add(self, text: str) -> None:
        with self._lock:
            self._part = (self._part + text.encode())[-ROOM_BYTES:]
            if self._busy:
                return
            self._busy = True
        try:
            self._write_out()
        except Exception as error:  # a driver of fsspec may raise anything
            self._warn(error)
        finally:
            self._busy = False

    def _write_out(self) -> None:
        store = self._opened()
        while True:
            with self._lock:
                data = self._part
            if data == self._written:
                return
            store.write(f"{self.folder}/{self._number:05}.log", data)
            self._written = data
            if len(data) >= PART_BYTES:
                self._next(store)

    def _next(self, store: Store) -> None:
        with self._lock:
            self._part = self._part.removeprefix(self._written)
            self._written, self._number = b"", self._number + 1
        for name in store.names(self.folder)[1 : -(PARTS - 1)]:
            store.remove(f"{self.folder}/{name}")

    def _opened(self) -> Store:
        """At the first chunk. A driver that is started again in its pod goes on after the parts that are there."""
        if self._store is None:
            store = Store(self.root)
            attempts = sorted(
                (int(match[1]), name) for name in store.names("logs") if (match := FOLDER.fullmatch(name))
            )
            for _, name in attempts[:-ATTEMPTS]:
                store.remove(f"logs/{name}")
            there = [
                int(name.removesuffix(".log"))
                for name in store.names(self.folder)
                if name.removesuffix(".log").isdigit()
            ]
            self._number, self._store = max(there, default=-1) + 1, store
        return self._store

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = error if isinstance(error, BadSpec) else f"{type(error).__name__}: {error}"
            print(f"the driver's log is not kept in {self.root}/{self.folder}: {reason}", file=sys.stderr, flush=True)
