"""Being asked to end: SIGTERM, and what of a step it may interrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(Exception):
    """The run was asked to end, and nothing of what it finished is lost."""


class Stop:
    """A flag that SIGTERM (and, for a run by hand, SIGINT) sets; inside `abandonable` it also interrupts the main thread at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._may_abandon = False

    def install(self) -> None:
        """Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._asked.is_set()
        self._asked.set()
        if self._may_abandon or (again and number == signal.SIGINT):
            self._may_abandon = False
            raise Terminated(f"signal {signal.Signals(number).name}")

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Terminated if asked."""
        if self.asked:
            raise Terminated("asked to end")

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
