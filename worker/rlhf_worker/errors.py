"""How a run ends when its input is wrong, and the named failures that the kubelet retries in place."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class BadSpec(Exception):
    """The spec is wrong (exit 64, never retried). The message names the field and the fix."""


class BadData(Exception):
    """Data or a checkpoint is wrong (exit 65, never retried). The message names the place and the fix."""


def together(steps: Iterable[Callable[[], T]]) -> list[T]:
    """What each gives. Raises BadSpec, or BadData where there is no other, with the words of all that is wrong."""
    results, wrong = [], list[BadSpec | BadData]()
    for step in steps:
        try:
            results.append(step())
        except (BadSpec, BadData) as error:
            wrong.append(error)
    if wrong:
        kind = BadSpec if any(isinstance(error, BadSpec) for error in wrong) else BadData
        raise kind("\n".join(map(str, wrong)))
    return results


class NotNumbered(Exception):
    """The operator gave this driver's pod no number, without which it must not write."""


class PortTaken(Exception):
    """Where pods that are being deleted tell the driver, something else listens."""


class PreflightFailed(Exception):
    """A check before the first step failed, and another try may find it mended."""


class DownloadFailed(Exception):
    """The hub, or the way to it, gave nothing for too long. What came is kept, and gone on from."""


class PlacementFailed(Exception):
    """Ray lacks what the placement asks for, or roles sit on other GPUs than planned."""


class DeadlineExceeded(Exception):
    """A call into the cluster did not come back in the time that the spec gives it."""


class SyncMismatch(Exception):
    """The engines do not hold the trainer's weights after a sync."""


class Diverged(Exception):
    """Loss or gradient is not finite. The message says where the batch was dumped."""


class SaveFailed(Exception):
    """The run's last checkpoint could not be written. The message names path, room and fix."""


class Fenced(Exception):
    """A later driver writes this checkpoint path: this one publishes nothing any more, and has nothing left to do."""


class EngineFailed(Exception):
    """vLLM did not start, or its processes ended. The message holds the end of their log."""


class ActorLost(Exception):
    """An actor died that the run cannot do without. The message names it, its pod and process, and how it ended."""


class EnginesLost(Exception):
    """Too few engines are left to go on, and starting them anew did not help."""


class RewardFailed(Exception):
    """A reward gave no value for a sample, in any of its tries. The message names the reward, the prompt and the reward's own error."""


class EnvironmentFailed(Exception):
    """An environment gave no answer, in any of an episode's tries. The message names the prompt and the environment's own error."""


class LinkBroken(Exception):
    """A weight sync failed between its ranks: one of them died, or its link did. What they hold is not a version."""
