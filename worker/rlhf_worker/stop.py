"""Being asked to end: by SIGTERM, a pod that is being deleted, or the end of the job; and what that may interrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(Exception):
    """The run was asked to end, and nothing of what it finished is lost."""


class Ended(Exception):
    """The job has ended, or is gone: nothing that this process still makes is wanted by anyone."""


class Stop:
    """A flag that SIGTERM (and, for a run by hand, SIGINT) sets; inside `abandonable`, `interrupt_if_asked` raises.

    The handler itself raises nothing: Ray's waits turn an exception from a handler into a SystemError.
    """

    installed: ClassVar["Stop | None"] = None  # signals belong to the process, so there is one

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._why = "asked to end"
        self._ended = ""
        self._lost: Exception | None = None
        self._may_abandon = False

    def install(self) -> None:
        """Main thread only, and after ray.init, which takes SIGTERM for itself."""
        Stop.installed = self
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()

    def ask(self, why: str) -> None:
        """As SIGTERM does, from any thread."""
        self._why = why
        self._asked.set()

    def end(self, why: str) -> None:
        """For good: even what may not be dropped half-way is dropped, for nothing of it will be used."""
        self._ended = why
        self._asked.set()

    def lose(self, error: Exception) -> None:
        """Something died without which nothing that is under way can end: whoever waits is told, by this error."""
        self._lost = error

    def outlive(self) -> None:
        """It was told: what can still be done without it is not interrupted."""
        self._lost = None

    def interrupt(self) -> None:
        """Raises Terminated if asked while what runs may be dropped; Ended, and what was lost, in any case."""
        if self._may_abandon or self._ended or self._lost:
            self.check()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Ended, or Terminated, if asked; what was lost."""
        if self._ended:
            raise Ended(self._ended)
        if self._lost:
            raise self._lost
        if self.asked:
            raise Terminated(self._why)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """What runs inside may be dropped."""
        self._may_abandon = True
        try:
            self.check()
            yield
        finally:
            self._may_abandon = False

    def wait(self, seconds: float) -> None:
        self._asked.wait(seconds)


def interrupt_if_asked() -> None:
    """Every wait of the driver calls this between its slices. Raises Terminated, Ended, or what was lost."""
    if Stop.installed is not None:
        Stop.installed.interrupt()
