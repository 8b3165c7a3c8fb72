"""A python reward: a pool of subprocesses, each of which can be killed without loss."""

import asyncio
import contextlib
import json
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec, RewardFailed
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, Judgement, Once, Reward, arguments, of_group

START_DEADLINE = 300.0  # seconds for a child's imports
DEATH_GRACE = 1.0  # seconds that a child which closed its socket has to end by itself, for the sake of its exit status


class LoadFailure(Failure):
    """The child is well, what it should load cannot be loaded: another try would fail alike."""


class Child:
    """A subprocess in a process group of its own: started when it is needed, and anew after its death.

    One call at a time; `close` from any thread.
    """

    def __init__(self, *, episodes: bool = False, group: bool = False, **spec: str | None) -> None:
        """spec: what it loads, as `child.load` takes it; group: a reward that sees all completions of a prompt."""
        self._first: dict[str, Any] = {"spec": spec, "episodes": episodes, "group": group}
        self._process: subprocess.Popen[bytes] | None = None
        self._calls = threading.Lock()
        self._closed = False

    def load(self) -> None:
        """`start`, at the run's start: raises BadSpec where that raises LoadFailure."""
        try:
            self.start()
        except LoadFailure as error:
            field, code = (self._first["spec"][name] for name in ("field", "code"))
            raise BadSpec(f"{field}.{'function' if code is None else 'code'} cannot be loaded: {error}") from None

    def start(self) -> None:
        """Unless it runs. Raises LoadFailure, or Failure if it did not get so far."""
        if self._process is not None:
            return
        self._connection, theirs = socket.socketpair()
        self._answers = self._connection.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_worker.rewards.child", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
            )
        answer = self._exchange(self._first, START_DEADLINE)
        if "error" in answer:
            self._kill()
            raise LoadFailure(answer["error"])

    def ask(self, call: dict[str, Any], seconds: float) -> Any:
        """The value for these arguments. Raises Failure: its own error, no answer in time, or its death."""
        with self._calls:
            self.start()
            answer = self._exchange(call, seconds)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["value"]

    def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer, within `seconds` from here; where this raises it is dead."""
        if self._closed:  # `close` sets it before it looks for a process, and there is one now
            self._kill()
            raise Failure("the pool was closed")
        end = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            self._connection.sendall(pickle.dumps(message))
            self._connection.settimeout(max(1e-3, end - time.monotonic()))
            line = self._answers.readline()
        except TimeoutError:
            self._kill()
            raise Failure(f"no answer within {seconds:g} s; its process was killed") from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise Failure(f"its process died: {self._ending()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ending(self) -> str:
        """Of a process that closed its socket, in words."""
        assert self._process is not None
        with contextlib.suppress(OSError), open(os.pidfd_open(self._process.pid)) as descriptor:  # noqa: PTH123
            select.select([descriptor], [], [], DEATH_GRACE)
        status = self._kill()
        return f"signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"exit status {status}"

    def _kill(self) -> int:
        """Kill and reap it, and close the socket; its exit status. The group is killed while the child still holds the
        number.
        """
        assert self._process is not None
        _kill_group(self._process)
        status = self._process.wait()
        self._process = None
        self._answers.close()
        self._connection.close()
        return status

    def close(self) -> None:
        """For good, also in the middle of a call, which fails. Nothing is left of it, nor of what it started."""
        self._closed = True
        if process := self._process:
            _kill_group(process)
        with self._calls:
            if self._process is not None:
                self._kill()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class PythonReward(Reward):
    """Calls a function once a sample, or once a group. Raises BadSpec at once when the function cannot be loaded."""

    def __init__(self, spec: RewardSpec) -> None:
        super().__init__(spec)
        field, group = f"rewards[{spec.name}]", spec.scope == "group"
        what: dict[str, Any] = {"function": spec.function, "code": spec.code, "field": field, "kind": "function"}
        name = f"reward(prompt, {'completions' if group else 'completion'}, **row)"
        self._children = [Child(group=group, name=name, **what) for _ in range(spec.workers)]
        # The one that was used last comes first, so that no more are started than are needed.
        self._idle: queue.LifoQueue[Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        try:
            self._children[-1].load()
        except Failure as error:
            raise RewardFailed(f"{field} did not start: {error}") from None

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Once]:
        with ThreadPoolExecutor(self.spec.workers, thread_name_prefix=f"reward-{self.spec.name}") as threads:
            yield partial(self._once, threads)

    async def _once(self, threads: ThreadPoolExecutor, batch: Sequence[Sample], attempt: int) -> list[Judgement]:
        return await asyncio.get_running_loop().run_in_executor(threads, self._call, batch)

    def _call(self, batch: Sequence[Sample]) -> list[Judgement]:
        asked = of_group(batch) if self.spec.scope == "group" else arguments(batch[0])
        child = self._idle.get()
        try:
            return self.judgements(child.ask(asked, self.spec.timeout_seconds), len(batch))
        finally:
            self._idle.put(child)

    def close(self) -> None:
        for child in self._children:
            child.close()
