"""The phase: one word for the conditions. A pure function of them and of nothing else."""

from collections.abc import Mapping

from rlhf_api.status import ConditionType, Phase
from rlhf_operator.decide.classes import RESTARTING
from rlhf_operator.decide.verdict import Verdict

ENDING = ("Stopping", "FinalSave")
NOTHING = Verdict("Unknown", "", "")


def phase_of(verdicts: Mapping[ConditionType, Verdict]) -> tuple[Phase, ConditionType]:
    """The phase and the condition whose reason and message explain it. First match wins."""
    is_true = {kind for kind, verdict in verdicts.items() if verdict.status == "True"}
    explained = (ConditionType.RUNNING, ConditionType.CLUSTER_READY, ConditionType.SUSPENDED)
    running, ready, suspended = (verdicts.get(kind, NOTHING) for kind in explained)
    quota = verdicts.get(ConditionType.QUOTA_RESERVED)
    ladder = (
        (ConditionType.COMPLETE in is_true, Phase.SUCCEEDED, ConditionType.COMPLETE),
        (ConditionType.FAILED in is_true, Phase.FAILED, ConditionType.FAILED),
        (ConditionType.SUSPENDED in is_true, Phase.SUSPENDED, ConditionType.SUSPENDED),
        (suspended.reason in ENDING, Phase.SUSPENDING, ConditionType.SUSPENDED),
        (ConditionType.RUNNING in is_true, Phase.RUNNING, ConditionType.PROGRESSING),
        (
            ConditionType.ACCEPTED not in is_true and ready.reason in ("", "NotCreated"),
            Phase.PENDING,
            ConditionType.ACCEPTED,
        ),
        (
            quota is not None and quota.status != "True" and ready.reason == "Suspended",
            Phase.QUEUED,
            ConditionType.QUOTA_RESERVED,
        ),
        (running.reason in RESTARTING, Phase.RESTARTING, ConditionType.RUNNING),
        (
            ready.reason in ("NotCreated", "WaitingForOldPods", "WaitingForOldObjects"), Phase.PENDING,
            ConditionType.CLUSTER_READY,
        ),
        (ConditionType.CLUSTER_READY not in is_true, Phase.PROVISIONING, ConditionType.CLUSTER_READY),
    )
    return next(((phase, kind) for match, phase, kind in ladder if match), (Phase.STARTING, ConditionType.RUNNING))
