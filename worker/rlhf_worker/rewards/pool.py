"""A python reward: a pool of subprocesses, each of which can be killed without loss."""

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec, RewardFailed
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, arguments, failed, finite
from rlhf_worker.rewards.child import receive, send

START_DEADLINE = 300.0  # seconds for a child's imports
DEATH_GRACE = 1.0  # seconds that a child which closed its socket has to end by itself, for the sake of its exit status


class LoadFailure(Failure):
    """The child is well, the function cannot be loaded: another try would fail alike."""


class Child:
    """One reward subprocess, in a process group of its own. `load` comes first."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_worker.rewards.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )

    def load(self, *, episodes: bool = False, **spec: str | None) -> None:
        """Import what `child.load` is given. Raises LoadFailure, or Failure if it did not get so far."""
        answer = self._exchange({"spec": spec, "episodes": episodes}, START_DEADLINE)
        if "error" in answer:
            self.kill()
            raise LoadFailure(answer["error"])

    def ask(self, call: dict[str, Any], seconds: float) -> Any:
        """The value for these arguments. Raises Failure: its own error, no answer in time, or its death; in the last two `alive` is False."""
        answer = self._exchange(call, seconds)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["value"]

    def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            send(self._connection, pickle.dumps(message))
            answer: dict[str, Any] = json.loads(receive(self._connection, deadline))
        except TimeoutError:
            self.kill()
            raise Failure(f"no answer within {seconds:g} s; its process was killed") from None
        except (OSError, EOFError):
            raise Failure(f"its process died: {_ending(self._buried())}") from None
        return answer

    @property
    def alive(self) -> bool:
        """Whether it was not reaped yet."""
        return self._process.returncode is None

    def interrupt(self) -> None:
        """Kill it and what it started, from any thread; who talks to it then sees its death."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> int:
        """Kill and reap it; its exit status. The group is killed while the child still holds the number."""
        self.interrupt()
        self._connection.close()
        return self._process.wait()

    def _buried(self) -> int:
        with contextlib.suppress(OSError), open(os.pidfd_open(self._process.pid)) as descriptor:  # noqa: PTH123
            select.select([descriptor], [], [], DEATH_GRACE)
        return self.kill()


def _ending(status: int) -> str:
    """A Popen return code in words."""
    return f"signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"exit status {status}"


class PythonReward:
    """Calls a function once a sample, `spec.workers` at a time, each with a deadline, each failed one again up to `spec.retries` times.

    Raises BadSpec at once when the function cannot be loaded.
    """

    def __init__(self, spec: RewardSpec) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._idle: list[Child] = []
        self._busy: set[Child] = set()
        self._closed = False
        self._executor = ThreadPoolExecutor(spec.workers, thread_name_prefix=f"reward-{spec.name}")
        try:
            self._give_back(self._take())
        except LoadFailure as error:
            field = "code" if spec.code is not None else "function"
            raise BadSpec(f"rewards[{spec.name}].{field} cannot be loaded: {error}") from None
        except Failure as error:
            raise RewardFailed(f"rewards[{spec.name}] did not start: {error}") from None

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One value a sample, in order. Raises RewardFailed at the first sample that has failed every try; the others are given up."""
        futures = [self._executor.submit(self._score, sample) for sample in samples]
        try:
            return [future.result() for future in _until_failure(futures)]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _score(self, sample: Sample) -> float:
        reason = Failure("closed")
        for _ in range(self.spec.retries + 1):
            try:
                return self._call(sample)
            except Failure as failure:
                reason = failure
        raise failed(self.spec, sample, reason)

    def _call(self, sample: Sample) -> float:
        child = self._take()
        try:
            return finite(child.ask(arguments(sample), self.spec.timeout_seconds))
        finally:
            self._give_back(child)

    def _take(self) -> Child:
        with self._lock:
            if self._closed:
                raise Failure("the pool was closed")
            child = self._idle.pop() if self._idle else None
            fresh = child is None
            child = child or Child()
            self._busy.add(child)
        if fresh:
            self._load(child)
        return child

    def _load(self, child: Child) -> None:
        try:
            child.load(function=self.spec.function, code=self.spec.code, field=f"rewards[{self.spec.name}]", kind="function", name="reward(prompt, completion, **row)")
        except BaseException:
            self._give_back(child)
            raise

    def _give_back(self, child: Child) -> None:
        with self._lock:
            self._busy.discard(child)
            if child.alive and not self._closed:
                self._idle.append(child)
            elif child.alive:
                child.kill()

    def close(self) -> None:
        """End every child, also in the middle of a call, and wait for the threads. Nothing is left."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for child in self._busy:
                child.interrupt()
        for child in idle:
            child.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _until_failure(futures: Sequence[Future[float]]) -> Sequence[Future[float]]:
    """Wait for all, or for the first that raised, which then comes first."""
    wait(futures, return_when=FIRST_EXCEPTION)
    return sorted(futures, key=lambda f: not (f.done() and not f.cancelled() and f.exception() is not None))
