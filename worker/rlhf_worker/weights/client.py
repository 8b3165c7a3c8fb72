"""The trainer's calls to the engines of a sync, all of them at once, each with a deadline."""

import pickle
import time
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf_worker.calls import ended_badly
from rlhf_worker.errors import DeadlineExceeded
from rlhf_worker.weights.plan import RankPlan


class EnginesClient:
    """vLLM's client protocol for several engines, and what the `planned` backend asks them when it connects.

    vLLM's own Ray client gives every engine the same rank offset, so it serves one only.
    """

    def __init__(self, engines: list[ActorHandle], ranks_per_engine: int, deadline_seconds: float) -> None:
        self.engines = engines
        self.ranks_per_engine = ranks_per_engine
        self.deadline_seconds = deadline_seconds
        self._end = 0.0
        self.begin()

    def begin(self) -> None:
        """A new sync: the deadline counts from here."""
        self._end = time.monotonic() + self.deadline_seconds

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._wait(method, [getattr(engine, method).remote(*args) for engine in self.engines])

    def _wait(self, method: str, calls: list[Any]) -> list[Any]:
        try:
            return list(ray.get(calls, timeout=max(0.0, self._end - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            raise DeadlineExceeded(f"weight sync: {method} took longer than spec.weightSync.deadlineSeconds "
                f"({self.deadline_seconds:g} s)") from None

    # The planned backend.

    def plans(self, metas: bytes, distrusted: frozenset[str]) -> list[RankPlan]:
        """Of each tensor-parallel rank, the same in every engine. Raises RuntimeError when engines differ."""
        found: list[list[RankPlan]] = [
            [pickle.loads(plan) for plan in plans] for plans in self._all("weight_plan", metas, distrusted)
        ]
        for index, plans in enumerate(found[1:], 1):
            if plans != found[0]:
                raise RuntimeError(f"weight sync: engine {index} lays its parameters out in another way than engine 0")
        return found[0]

    def nodes(self) -> list[str]:
        """Ray's, of each engine."""
        return [place.node for place in self._all("enrol")]

    def begin_connect(self, terms: bytes) -> list[Any]:
        return [
            engine.init_weight_transfer.remote({"terms": terms, "engine": index})
            for index, engine in enumerate(self.engines)
        ]

    def end_connect(self, calls: list[Any]) -> None:
        self._wait("init_weight_transfer", calls)

    def failed(self, calls: list[Any]) -> bool:
        """Whether an engine has ended with an error."""
        return any(ended_badly(call) for call in ray.wait(calls, num_returns=len(calls), timeout=0)[0])

    # Adapters.

    def load_adapter(self, version: int, files: dict[str, bytes]) -> None:
        """Through Ray's object store, so that it is sent to each node once."""
        self._all("load_adapter", version, ray.put(files))

    # vLLM's protocol, for its own backends.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = [
            engine.init_weight_transfer.remote(self._of(init_info, index)) for index, engine in enumerate(self.engines)
        ]
        self._wait("init_weight_transfer", calls)

    def _of(self, init_info: dict[str, Any], index: int) -> dict[str, Any]:
        """nccl: rank 0 is the trainer, and engine e's workers follow in order. sharded_rdt: which of how many engines.
        ipc has no ranks.
        """
        if "rank_offset" in init_info:
            return {**init_info, "rank_offset": 1 + index * self.ranks_per_engine}
        if "trainer_actor_names" in init_info:
            return {**init_info, "replica_rank": index, "num_replicas": len(self.engines)}
        return init_info

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")
