"""What each class of failure means: its counter in `status.restarts`, the reason of Running while it lasts, and what
it costs."""

from dataclasses import dataclass

from rlhf_api.status import FailureClass


@dataclass(frozen=True, slots=True)
class Meaning:
    """`cost`: what one takes from `runPolicy.backoffLimit`."""

    counter: str
    reason: str
    cost: int = 1


MEANINGS = {
    FailureClass.APP: Meaning("app", "AppFailed"),
    FailureClass.OOM: Meaning("oom", "OOMKilled"),
    FailureClass.HEAD_LOST: Meaning("head_lost", "HeadLost"),
    FailureClass.NODE_LOST: Meaning("node_lost", "NodeLost"),
    FailureClass.PREEMPTED: Meaning("preempted", "Preempted", cost=0),
    FailureClass.STALLED: Meaning("stalled", "Stalled"),
}
RESTARTING = tuple(meaning.reason for meaning in MEANINGS.values())
