"""Whether vLLM's core still works. It is a process of its own: the engine's actor answers also when that one hangs.

A core answers between its steps, so one that is busy is late and one that hangs is silent. A process that was
stopped is known at once; that of the actor itself is `watcher`'s, as every actor's.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rlhf_worker.watcher import STOPPED, below, state


class Pulse:
    """One question to the core at a time."""

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._ask = ask
        self._question: asyncio.Task[Any] | None = None
        self._since = 0.0

    def beat(self) -> None:
        """It finished something, so it is not silent."""
        self._since = time.monotonic()

    def forget(self) -> None:
        """What it does now has a deadline of its own."""
        if self._question is not None:
            self._question.cancel()
            self._question = None

    def silent_seconds(self) -> float:
        """For how long it has neither answered nor finished anything. Asks when no question is open."""
        if self._question is not None and not self._question.done():
            return time.monotonic() - self._since
        self.beat()
        self._question = asyncio.create_task(self._asked())
        return 0.0

    async def _asked(self) -> None:
        try:
            await self._ask()
        except Exception as error:  # an answer too; that a process died is for vLLM's own watch to tell
            print(f"vLLM's core answered with {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def stopped(pid: int) -> list[int]:
    """Of the processes under this one, those that a signal stopped."""
    return [child for child in below(pid) if state(child) == STOPPED]
