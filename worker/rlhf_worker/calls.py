"""Calls to several actors at once, with a deadline and the first failure first."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from rlhf_worker.errors import DeadlineExceeded
from rlhf_worker.stop import interrupt_if_asked

PUMP_SECONDS = 0.1
SLICE_SECONDS = 0.5  # of a wait, between looks at whether the run was asked to end


def gather(
    calls: Sequence[Any], deadline_seconds: float, what: str, meanwhile: Callable[[], None] | None = None,
) -> list[Any]:
    """Results in the calls' order. The first failure ends the wait at once. Raises DeadlineExceeded, or what an actor
    raised.

    `meanwhile` is called between slices of the wait.
    """
    end, pending = time.monotonic() + deadline_seconds, list(calls)
    while pending:
        slice_seconds = PUMP_SECONDS if meanwhile else SLICE_SECONDS
        done, pending = ray.wait(pending, num_returns=1, timeout=min(slice_seconds, max(0.0, end - time.monotonic())))
        interrupt_if_asked()
        if meanwhile:
            meanwhile()
        if not done and time.monotonic() > end:
            raise DeadlineExceeded(f"{what}: {len(pending)} of {len(calls)} not done after {deadline_seconds:g} s")
        ray.get(done)
    return list(ray.get(list(calls))) if calls else []


def answering(actors: Sequence[ActorHandle], method: str, *, deadline_seconds: float) -> list[ActorHandle]:
    """Those whose method returns in time, without an error."""
    calls = {actor: getattr(actor, method).remote() for actor in actors}
    end, done = time.monotonic() + deadline_seconds, list[Any]()
    while len(done) < len(calls) and (left := end - time.monotonic()) > 0:
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=min(SLICE_SECONDS, left))
        interrupt_if_asked()
    return [actor for actor, answer in calls.items() if answer in done and not ended_badly(answer)]


def ended_badly(call: Any) -> bool:
    """Whether a call that has ended, ended with an error."""
    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return True
    return False


def root_cause(error: BaseException) -> BaseException:
    """What an actor raised, without Ray's wrapping, which nests when actors call actors."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def call(actor: ActorHandle, method: str, *args: Any, deadline_seconds: float, what: str) -> Any:
    """One actor's result. Raises as `gather` does."""
    return gather([getattr(actor, method).remote(*args)], deadline_seconds, what)[0]


def call_all(actors: Sequence[ActorHandle], method: str, *args: Any, deadline_seconds: float, what: str) -> list[Any]:
    """The same call to every actor. Raises as `gather` does."""
    return gather([getattr(actor, method).remote(*args) for actor in actors], deadline_seconds, what)


def ask(actors: Sequence[ActorHandle], method: str, *args: Any, arguments: Sequence[Any]) -> list[Any]:
    """Begins a call on every actor, for `gather`: actor i gets `args` and arguments[i]."""
    return [getattr(actor, method).remote(*args, argument) for actor, argument in zip(actors, arguments, strict=True)]
