"""A Ray and a clock without processes: calls end when the world says so, late, twice told, out of order, or never.

A wait for what has not ended moves the clock; what was due meanwhile happens in its order.
"""

import heapq
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

NEVER = object()


class Ref:
    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None

    def end(self, value: Any = None, error: Exception | None = None) -> None:
        if not self.done:  # a call ends once
            self.done, self.value, self.error = True, value, error


def raised(error: Exception) -> Exception:
    """As the caller sees what an actor raised."""
    cause: Exception = RayTaskError("method", "its traceback", error).as_instanceof_cause()
    return cause


class World:
    exceptions = ray.exceptions

    def __init__(self, patch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.now, self._due, self._order = 1000.0, list[tuple[float, int, Callable[[], None]]](), itertools.count()
        for module in modules:
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
            if hasattr(module, "ray"):
                patch.setattr(module, "ray", self)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), act))

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, act = heapq.heappop(self._due)
            act()
        self.now = end

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Ref], list[Ref]]:
        if sum(ref.done for ref in refs) < num_returns:
            self.sleep(timeout)
        done = [ref for ref in refs if ref.done][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, refs: Any) -> Any:
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        assert refs.done, "a wait without an end"
        if refs.error is not None:
            raise refs.error
        return refs.value

    def kill(self, actor: "Actor") -> None:
        actor.die()


class Actor:
    """`does`: what a method answers, a value, a function of its arguments, an exception or NEVER; `takes`: seconds."""

    def __init__(self, world: World, name: str, **does: Any) -> None:
        self.world, self.name, self.does, self.takes = world, name, does, dict[str, float]()
        self.calls: list[tuple[str, tuple[Any, ...], Ref]] = []
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *args: self._call(method, args))

    def __repr__(self) -> str:
        return self.name

    def _call(self, method: str, args: tuple[Any, ...]) -> Ref:
        ref = Ref()
        self.calls.append((method, args, ref))
        if self.dead:
            ref.end(error=ActorDiedError())
        elif (does := self.does.get(method)) is not NEVER:
            self.world.after(self.takes.get(method, 0.0), lambda: self._answer(ref, does, args))
            if not self.takes.get(method):
                self.world.sleep(0.0)
        return ref

    def _answer(self, ref: Ref, does: Any, args: tuple[Any, ...]) -> None:
        try:
            value = does(*args) if callable(does) else does
        except Exception as error:
            value = error
        ref.end(error=raised(value)) if isinstance(value, Exception) else ref.end(value)

    def die(self) -> None:
        self.dead = True
        for _, _, ref in self.calls:
            ref.end(error=ActorDiedError())

    def asked(self, method: str) -> int:
        return sum(name == method for name, _, _ in self.calls)
