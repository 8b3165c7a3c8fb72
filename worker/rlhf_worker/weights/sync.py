"""One weight sync, seen from the driver: pause, send, adopt; and the proof. What is lost on the way is the fleet's
matter.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ray.actor import ActorHandle

from rlhf_api.run import RunConfig
from rlhf_worker.calls import call, call_all
from rlhf_worker.errors import SyncMismatch
from rlhf_worker.weights.backends import ADAPTER, PLANNED
from rlhf_worker.weights.compare import Compared, compare

# Log probabilities of the probe may differ by this much on average: the engine rounds in other places than the trainer.
# Rounding alone gives SmolLM2-135M 0.06 to 0.09 in bfloat16, and one wrong matrix of its 30 layers 0.2 and more; single
# tokens differ by 0.5 by rounding.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
PROBE_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Proof:
    """How the delivery of a version was proven."""

    version: int
    equal: int  # parameters whose checksums are equal, over all engine ranks
    indirect: int  # parameters that the model computes with only after packing or load_weights: they need the probe
    probe: float | None  # mean difference of log probabilities, the worst engine's
    seconds: float


@dataclass(frozen=True, slots=True)
class Synced:
    version: int
    seconds: float  # pause and resume included, the proof not
    backend: str
    proof: Proof | None


class WeightSync:
    """Holds both ends. `engines` are those of the next call: the fleet says before it who they are."""

    def __init__(
        self, config: RunConfig, policy: Sequence[ActorHandle], engines: list[ActorHandle], backend: str,
    ) -> None:
        self.config = config
        self.policy = policy
        self.engines = engines
        self.backend = backend
        self._deadline = config.weight_sync.deadline_seconds
        self._joined: list[ActorHandle] = []  # those that the trainer is connected to, by a link that has not failed

    def connect(self) -> None:
        """Once, after both ends have loaded the same checkpoint: what vLLM made of it tests the plan."""
        self._connect(frozenset())
        same = "load_format" not in self.config.rollout.engine_args
        if self.backend in PLANNED and same and (
            wrong := frozenset(name for names in self._compare().wrong.values() for name in names)
        ):
            self._connect(wrong)
        self._joined = list(self.engines)

    def _connect(self, distrusted: frozenset[str]) -> None:
        self.distrusted = distrusted
        address = call(self.policy[0], "address", deadline_seconds=self._deadline, what="weight sync: a port")
        for line in self._policy("connect", list(self.engines), self.backend, address, distrusted)[0]:
            print(f"weight sync: {line}", flush=True)

    def __call__(self, *, prove: bool) -> Synced:
        """Every engine ends on the policy's version, over a new link when they are others than last time, or the last
        sync failed.

        Raises DeadlineExceeded, LinkBroken, SyncMismatch, or what an actor raised; engines that hold a part serve
        nothing then. """
        start = time.monotonic()
        self._engines("pause")
        joined, self._joined = self._joined, []  # until it went well
        if self.engines != joined:
            self._connect(self.distrusted)
        version: int = self._policy("send", prove)[0]
        self._engines("adopt", version)
        self._joined = list(self.engines)
        seconds = time.monotonic() - start
        return Synced(version, seconds, self.backend, self.prove(version) if prove else None)

    def prove(self, version: int) -> Proof:
        """Checksums of all that was written in place or packed; a probe where something is packed, loaded, or below
        adapters. Raises SyncMismatch.
        """
        start = time.monotonic()
        compared = self._compare() if self.backend in (*PLANNED, ADAPTER) else Compared({}, 0, 0)
        for (engine, rank), names in compared.wrong.items():
            raise SyncMismatch(f"engine {engine} rank {rank} differs from the trainer at version {version} in "
                f"{len(names)} parameters: {names[:5]}")
        probe = self._probe(version) if compared.indirect or not compared.equal or self.backend == ADAPTER else None
        return Proof(version, compared.equal, compared.indirect, probe, time.monotonic() - start)

    def _compare(self) -> Compared:
        ours = self._policy("checksums")
        return compare(ours, self._engines("checksums", tuple(ours[0][0])))

    def _probe(self, version: int) -> float:
        """Mean difference of a fixed sequence's log probabilities between the trainer and an engine, the worst one's.
        """
        tokens = [3 + index * 7 % 61 for index in range(min(PROBE_LENGTH, self.config.data.max_prompt_tokens))]
        ours = self._policy("probe", tokens)[0]
        worst = max(
            fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True)) for theirs in self._engines("probe", tokens)
        )
        if not worst <= TOLERANCE[self.config.model.dtype]:
            raise SyncMismatch(f"an engine's log probabilities differ from the trainer's by {worst:.3g} on average at "
                f"version {version}")
        return worst

    def _engines(self, method: str, *args: object) -> list[Any]:
        return call_all(self.engines, method, *args, deadline_seconds=self._deadline, what=f"weight sync: {method} of "
            "the engines")

    def _policy(self, method: str, *args: object) -> list[Any]:
        return call_all(self.policy, method, *args, deadline_seconds=2 * self._deadline, what=f"weight sync: {method} "
            "of the trainer")
