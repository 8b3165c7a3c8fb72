"""The policy's own ranks in the place of a fleet of engines (rollout.engine hf): what there is to do for them, which is
little.
"""

import sys
import time
from collections.abc import Sequence

from ray.actor import ActorHandle

from rlhf_api.run import RunConfig
from rlhf_worker.calls import call_all
from rlhf_worker.errors import EnginesLost
from rlhf_worker.weights.sync import Synced


class Hosts:
    def __init__(self, config: RunConfig, ranks: Sequence[ActorHandle]) -> None:
        self.serving = list(ranks)
        self._deadline = config.weight_sync.deadline_seconds

    def sync(self, *, prove: bool) -> Synced:
        """Each rank copies the policy's weights; there is no way to prove."""
        start = time.monotonic()
        version = call_all(self.serving, "refresh", deadline_seconds=self._deadline, what="copy of the weights")[0]
        return Synced(version, time.monotonic() - start, "copy", None)

    short, slots = False, sys.maxsize

    def lost(self, actor: ActorHandle) -> None:
        if actor in self.serving:
            self.serving.remove(actor)

    def ensure(self) -> None:
        """Raises EnginesLost: a rank of the trainer is not started anew beside the training."""
        raise EnginesLost("a rank of the trainer is lost, which generates")

    def sleep(self) -> None: ...

    def loads(self) -> list[dict[int, float]]:
        """None: a rank generates its sequences as one batch."""
        return []

    def close(self) -> None: ...
