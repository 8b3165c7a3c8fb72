"""One weight sync, seen from the driver: pause, send, adopt, resume, and the proof."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from rlhf_api.job import PlacementMode
from rlhf_api.run import RunConfig
from rlhf_worker.actors.group import call, call_all
from rlhf_worker.errors import BadSpec, SyncMismatch
from rlhf_worker.weights.compare import differences

# Log probabilities of the probe may differ by this much: the engine rounds in other places than the trainer.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}
PROBE_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Proof:
    """How the delivery of a version was proven: parameters with equal checksums, those without, and the probe's largest difference."""

    version: int
    equal: int
    unproven: int
    probe: float | None


@dataclass(frozen=True, slots=True)
class Synced:
    version: int
    seconds: float  # pause and resume included, the proof not
    backend: str
    proof: Proof | None


def choose_backend(config: RunConfig, device: str) -> str:
    """Raises BadSpec for a backend that the device cannot run."""
    wish = config.weight_sync.backend
    colocated = config.placement.mode is PlacementMode.COLOCATED
    automatic = "gloo" if device == "cpu" else "ipc" if colocated else "nccl"
    if wish != "auto" and (wish == "gloo") != (device == "cpu"):
        raise BadSpec(f"spec.weightSync.backend is {wish}, but the run is on {device}: use auto, or {automatic}")
    return automatic if wish == "auto" else wish


class WeightSync:
    """Holds both ends; the policy's rank 0 moves the bytes."""

    def __init__(self, config: RunConfig, policy: Sequence[ActorHandle], engines: Sequence[ActorHandle], backend: str) -> None:
        self.config = config
        self.policy = policy
        self.engines = engines
        self.backend = backend
        self._deadline = config.weight_sync.deadline_seconds

    def connect(self) -> None:
        """Once, after both ends have loaded."""
        address = call(self.policy[0], "address", deadline_seconds=self._deadline, what="weight sync: a port")
        self._policy("connect", list(self.engines), self.backend, address)

    def __call__(self, *, prove: bool) -> Synced:
        """Every engine ends on the policy's version. Raises DeadlineExceeded, SyncMismatch, or what an actor raised."""
        start = time.monotonic()
        self._engines("pause")
        version = self._policy("send")[0]
        self._engines("adopt", version)
        self._engines("resume")
        seconds = time.monotonic() - start
        return Synced(version, seconds, self.backend, self.prove(version) if prove else None)

    def prove(self, version: int) -> Proof:
        """Checksums of every parameter where the engine still holds it as it came; for the others, the probe. Raises SyncMismatch."""
        shapes, packed = self._engines("layout")[0]
        expected = self._policy("digests", shapes, packed)[0]
        equal, unproven = 0, 0
        for index, engine in enumerate(self._engines("digests")):
            for rank, (trainer, held) in enumerate(zip(expected, engine, strict=True)):
                wrong, without = differences(trainer, held)
                if wrong:
                    raise SyncMismatch(f"engine {index} rank {rank} differs from the trainer at version {version} in {len(wrong)} parameters: {wrong[:5]}")
                equal, unproven = equal + len(held) - len(without), unproven + len(without)
        return Proof(version, equal, unproven, self._probe(version) if unproven else None)

    def _probe(self, version: int) -> float:
        """Largest difference of a fixed sequence's log probabilities between the trainer and each engine."""
        tokens = [3 + index * 7 % 61 for index in range(min(PROBE_LENGTH, self.config.data.max_prompt_tokens))]
        ours = self._policy("probe", tokens)[0]
        worst: float = max(abs(a - b) for theirs in self._engines("probe", tokens) for a, b in zip(ours, theirs, strict=True))
        if not worst <= TOLERANCE[self.config.model.dtype]:
            raise SyncMismatch(f"an engine's log probabilities differ from the trainer's by {worst:.3g} at version {version}")
        return worst

    def _engines(self, method: str, *args: object) -> list[Any]:
        return call_all(self.engines, method, *args, deadline_seconds=self._deadline, what=f"weight sync: {method} of the engines")

    def _policy(self, method: str, *args: object) -> list[Any]:
        return call_all(self.policy, method, *args, deadline_seconds=self._deadline, what=f"weight sync: {method} of the trainer")
