"""Waiting in tests: for a condition, and never for longer than it may take."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not come true in {seconds:g} s"
        time.sleep(0.01)


def kill(actor: Any) -> None:
    """Ends an actor, and comes back when whoever calls it is told so: ray.kill itself only asks for it."""
    import ray
    from ray.exceptions import RayActorError

    def dead() -> bool:
        try:
            ray.get(actor.__ray_ready__.remote())
        except RayActorError:
            return True
        return False

    ray.kill(actor)
    until(dead, 60)
