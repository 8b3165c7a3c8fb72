"""vLLM's weight-sync client for several engines in one group, every call with a deadline."""

import time
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf_worker.errors import DeadlineExceeded


class EnginesClient:
    """Fans each call out to all engines. vLLM's own Ray client gives every engine the same rank offset, so it serves one only."""

    def __init__(self, engines: list[ActorHandle], ranks_per_engine: int, deadline_seconds: float) -> None:
        self.engines = engines
        self.ranks_per_engine = ranks_per_engine
        self.deadline_seconds = deadline_seconds
        self._end = 0.0
        self.begin()

    def begin(self) -> None:
        """A new sync: the deadline counts from here."""
        self._end = time.monotonic() + self.deadline_seconds

    def _all(self, method: str, *args: Any) -> None:
        calls = [getattr(engine, method).remote(*args) for engine in self.engines]
        self._wait(method, calls)

    def _wait(self, method: str, calls: list[Any]) -> None:
        try:
            ray.get(calls, timeout=max(0.0, self._end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise DeadlineExceeded(f"weight sync: {method} took longer than spec.weightSync.deadlineSeconds ({self.deadline_seconds:g} s)") from None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = [engine.init_weight_transfer.remote(self._of(init_info, index)) for index, engine in enumerate(self.engines)]
        self._wait("init_weight_transfer", calls)

    def _of(self, init_info: dict[str, Any], index: int) -> dict[str, Any]:
        """Rank 0 is the trainer; engine e's workers follow in order. The ipc backend has no ranks."""
        if "rank_offset" not in init_info:
            return init_info
        return {**init_info, "rank_offset": 1 + index * self.ranks_per_engine}

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")
