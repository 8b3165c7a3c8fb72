"""One rank of a group that holds roles, as a Ray actor: a shell around `trainer.Trainer`.

The shell imports neither torch nor transformers, so that the driver, which needs the class, starts without them.
"""

from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from rlhf_api.run import RunConfig
from rlhf_worker.addresses import free_port
from rlhf_worker.placement import Seat
from rlhf_worker.roll import Member

if TYPE_CHECKING:
    from rlhf_worker.experience import Batching, Floats, PackedBatch, Sample, TrainSequence
    from rlhf_worker.rollout.episode import Request
    from rlhf_worker.trainer.checkpoint import Outcome, Restored
    from rlhf_worker.trainer.roles import Text


class Policy(Member):
    """Created in its bundle by `crew`; the work begins with `join`, so that a failure is the call's and not the
    actor's.
    """

    def __init__(self, config: RunConfig, names: list[str], rank: int, world: int, device: str, threads: int) -> None:
        self.device = device
        self.given = (config, names, rank, world, device, threads)

    def address(self) -> tuple[str, int]:
        """A free port on this rank's node."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def join(self, address: tuple[str, int]) -> None:
        """Form the group, before anything heavy is loaded."""
        from rlhf_worker.trainer.rank import Trainer

        self.trainer = Trainer(*self.given)
        self.trainer.join(address)

    def preflight(self, check: str) -> None:
        from rlhf_worker.trainer.checks import CHECKS

        CHECKS[check](self.trainer)

    def seat(self) -> Seat:
        return Seat.here(self.device)

    def load(self) -> "dict[str, Batching]":
        return self.trainer.load()

    def _taken(self, sequences: "list[TrainSequence]", batches: list[list[int]]) -> "list[PackedBatch]":
        """This rank's micro-batches: all ranks get all sequences, one object on a node, and the numbers of their own.
        """
        from rlhf_worker.experience import taken

        return taken(sequences, batches, self.given[0].trainer)

    def logprobs(
        self, role: str, sequences: "list[TrainSequence]", batches: list[list[int]]
    ) -> "dict[int, Floats]":
        return self.trainer.logprobs(role, self._taken(sequences, batches))

    def values(self, sequences: "list[TrainSequence]", batches: list[list[int]]) -> "dict[int, Floats]":
        return self.trainer.values(self._taken(sequences, batches))

    def scores(self, role: str, prompts: "list[Text]", completions: list[str]) -> list[float]:
        return self.trainer.scores(role, prompts, completions)

    def token_budget(self) -> int:
        return self.trainer.token_budget()

    def train(
        self, role: str, updates: "list[list[TrainSequence]]", dealing: list[list[list[int]]]
    ) -> dict[str, float]:
        return self.trainer.train(role, list(map(self._taken, updates, dealing)))

    def refresh(self) -> int:
        return self.trainer.refresh()

    def generate(self, requests: "list[Request]", deadline_seconds: float) -> "list[Sample | None]":
        return self.trainer.generate(requests, deadline_seconds)

    def connect(
        self, engines: list[ActorHandle], backend: str, address: tuple[str, int], distrusted: frozenset[str],
    ) -> list[str]:
        return self.trainer.connect(engines, backend, address, distrusted)

    def send(self, prove: bool) -> int:
        return self.trainer.send(prove=prove)

    def checksums(self) -> list[dict[str, int]]:
        return self.trainer.checksums()

    def probe(self, token_ids: list[int]) -> list[float]:
        return self.trainer.probe(token_ids)

    def fence(self, job: str, attempt: int) -> None:
        self.trainer.fence(job, attempt)

    def save(self, step: int, sampler: dict[str, Any], loop: dict[str, Any]) -> None:
        self.trainer.save(step, sampler, loop)

    def saved(self, wait: bool) -> "list[Outcome]":
        return self.trainer.saved(wait=wait)

    def restore(self) -> "Restored":
        return self.trainer.restore()

    def export(self, best: bool) -> str:
        return self.trainer.export(best=best)

    def close(self) -> None:
        self.trainer.close()


RemotePolicy = ray.remote(Policy)
