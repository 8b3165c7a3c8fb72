"""One rank of a group that holds roles, as a Ray actor: a shell around `trainer.Trainer`.

The shell imports neither torch nor transformers, so that the driver, which needs the class, starts without them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from rlhf_api.run import RunConfig
from rlhf_worker.addresses import free_port
from rlhf_worker.placement import Seat
from rlhf_worker.roll import Member

if TYPE_CHECKING:
    from rlhf_worker.trainer.checkpoint import Outcome


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

    def send(self, prove: bool) -> int:
        return self.trainer.send(prove=prove)

    def saved(self, wait: bool) -> "list[Outcome]":
        return self.trainer.saved(wait=wait)

    def export(self, best: bool) -> str:
        return self.trainer.export(best=best)


def _forwarder(name: str) -> Callable[..., Any]:
    def forward(policy: Policy, *arguments: Any) -> Any:
        return getattr(policy.trainer, name)(*arguments)

    return forward


for _name in (
    "load", "logprobs", "values", "scores", "train", "refresh", "generate", "connect", "checksums", "probe", "fence",
    "save", "restore", "close",
):
    setattr(Policy, _name, _forwarder(_name))  # as the trainer declares it
RemotePolicy = ray.remote(Policy)
