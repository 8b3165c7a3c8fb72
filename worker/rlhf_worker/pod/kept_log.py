"""What the driver prints, kept beside its checkpoints by the feed: the container's log goes with its pod.

Best effort, and never in the way: printing goes to the terminal first and waits for nothing; what the feed does not
take in time is dropped.
"""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import ray
from ray.actor import ActorHandle

from rlhf_worker.words import printable

SEND_SECONDS = 5.0  # between two calls of the feed
LAST_SECONDS = 5.0  # for what is left at the end
MOST_CHARACTERS = 1 << 20  # that wait to be sent


class KeptLog:
    """Takes text from any thread; sends it from one of its own, once it knows the feed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[str] = []
        self._waiting = self._dropped = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, text: str) -> None:
        with self._lock:
            if self._waiting + len(text) > MOST_CHARACTERS:
                self._dropped += len(text)
                return
            self._parts.append(text)
            self._waiting += len(text)

    def send_to(self, feed: ActorHandle, attempt: int) -> None:
        """From now on, and what was added before."""
        self._thread = threading.Thread(target=self._work, args=(feed, attempt), name="kept log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, or give up after LAST_SECONDS. What is printed from now on is not kept."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    def _work(self, feed: ActorHandle, attempt: int) -> None:
        """One call at a time, so that lines keep their order. It may hang: nobody waits for this thread."""
        try:
            closing = False
            while not closing:
                closing = self._closing.wait(SEND_SECONDS)
                if text := self._take():
                    ray.get(feed.keep_log.remote(attempt, text))
        except Exception as error:  # a feed that died, a disk that is full: the log of the container has it all
            print(f"the log of this attempt is kept no further: {error}", file=sys.stderr, flush=True)

    def _take(self) -> str:
        with self._lock:
            text, lost = "".join(self._parts), self._dropped
            self._parts, self._waiting, self._dropped = [], 0, 0
        return printable(text) + (f"\n({lost} characters were dropped here)\n" if lost else "")


class Tee:
    """A text stream whose text goes to the log too; what goes past `write`, such as through `buffer`, is not kept."""

    def __init__(self, stream: TextIO, log: KeptLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        count = self._stream.write(text)
        self._log.add(text)
        return count

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept_log() -> Iterator[KeptLog]:
    """All that this process prints inside goes there too."""
    log, streams = KeptLog(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (cast(TextIO, Tee(stream, log)) for stream in streams)
    try:
        yield log
    finally:
        sys.stdout, sys.stderr = streams
        log.close()
