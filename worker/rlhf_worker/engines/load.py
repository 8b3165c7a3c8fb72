"""How many sequences an engine had at a time."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Load:
    """Seconds by the number of sequences that were under way. Its user asks on another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = time.monotonic()
        self._seconds: defaultdict[int, float] = defaultdict(float)

    @contextmanager
    def one(self) -> Iterator[None]:
        """A sequence is under way."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._seconds[self._running] += now - self._since
            self._running, self._since = self._running + by, now

    def taken(self) -> dict[int, float]:
        """Seconds since it was last asked."""
        self._change(0)
        with self._lock:
            found, self._seconds = self._seconds, defaultdict(float)
        return dict(found)
