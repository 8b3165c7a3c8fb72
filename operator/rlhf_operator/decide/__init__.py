"""decide(job, observed, now) -> Decision. Pure: what should exist, what the status says, which Events tell of it, when to look again."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from rlhf_api.status import Condition, ConditionType, Phase, Record, RLHFJobStatus
from rlhf_operator.clock import stamp
from rlhf_operator.decide import deadlines
from rlhf_operator.decide.conditions import conditions
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.phase import phase_of
from rlhf_operator.decide.record import remember
from rlhf_operator.decide.verdict import Verdict, no, yes
from rlhf_operator.decide.want import Want, want
from rlhf_operator.names import cluster_name
from rlhf_operator.observed import Job, Observed

MESSAGE_MAX = 8192
RETRY_REFUSED = timedelta(seconds=15)
REFUSALS = ("InvalidSpec", "MissingReference", "NameConflict", "KubeRayNotInstalled", "Refused")


@dataclass(frozen=True, slots=True)
class Note:
    """An Event to be."""

    warning: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Decision:
    """`status` has no progress: that is the driver's. `told` is what its conditions were made from."""

    want: Want
    status: RLHFJobStatus
    notes: tuple[Note, ...]
    wake_at: datetime | None
    told: dict[ConditionType, Verdict]
    facts: Facts


def decide(job: Job, observed: Observed, now: datetime) -> Decision:
    before = Facts(job, observed, job.status.record, now)
    facts = before.knowing(remember(before))
    return _decision(facts, want(before), conditions(facts))


def refused(decision: Decision, reason: str, message: str) -> Decision:
    """The API server did not take what was planned: told as Accepted=False, and tried again later."""
    return _decision(decision.facts, decision.want, {**decision.told, ConditionType.ACCEPTED: no(reason, message)})


def troubled(decision: Decision, message: str) -> Decision:
    """This pass failed half-way: the status is written all the same, with the error in it."""
    return _decision(decision.facts, decision.want, {**decision.told, ConditionType.DEGRADED: yes("ReconcileError", message)})


def broken(job: Job, message: str, now: datetime) -> RLHFJobStatus:
    """decide itself failed: what was told stays, and the error beside it."""
    since = next((c.last_transition_time for c in job.status.conditions if c.type is ConditionType.DEGRADED and c.status == "True"), stamp(now))
    degraded = Condition(
        type=ConditionType.DEGRADED, status="True", reason="ReconcileError", message=message[:1024],
        observed_generation=job.meta.generation, last_transition_time=since,
    )
    others = [c for c in job.status.conditions if c.type is not ConditionType.DEGRADED]
    return job.status.model_copy(update={"conditions": [*others, degraded]})


def _decision(facts: Facts, wanted: Want, told: dict[ConditionType, Verdict]) -> Decision:
    status = _status(facts, told)
    return Decision(wanted, status, _notes(facts, status), _wake_at(facts, told), told, facts)


def _wake_at(f: Facts, told: dict[ConditionType, Verdict]) -> datetime | None:
    """At once when the record moved: what it intends is for the next pass to do."""
    if f.record != f.job.status.record:
        return f.now
    retry = f.now + RETRY_REFUSED if told[ConditionType.ACCEPTED].status != "True" and not f.record.result else None
    clock = deadlines.next_wake(f) if f.job.parsed else None
    return min((moment for moment in (retry, clock) if moment), default=None)


def _status(f: Facts, told: dict[ConditionType, Verdict]) -> RLHFJobStatus:
    phase, why = phase_of(told)
    spec = f.job.parsed.spec if f.job.parsed else None
    cluster = f.cluster
    return RLHFJobStatus(
        observed_generation=f.job.meta.generation,
        phase=phase,
        reason=told[why].reason,
        message=told[why].message[:MESSAGE_MAX],
        cluster_name=cluster.name if cluster else None,
        gpus=f.placement.gpus if spec else None,
        mode=spec.placement.mode if spec else None,
        queue=spec.queue.name if spec and spec.queue else None,
        dashboard=f"http://{cluster.service}.{f.job.meta.namespace}.svc:8265" if cluster and cluster.service else None,
        restarts=f.record.restarts,
        last_failure=f.record.last_failure,
        conditions=[_condition(f, kind, verdict) for kind, verdict in told.items()],
        record=f.record,
    )


def _condition(f: Facts, kind: ConditionType, verdict: Verdict) -> Condition:
    """A condition keeps its time while its status stays, as everywhere in Kubernetes."""
    was = next((c for c in f.job.status.conditions if c.type is kind), None)
    since = was.last_transition_time if was and was.status == verdict.status else stamp(f.now)
    return Condition(
        type=kind, status=verdict.status, reason=verdict.reason, message=verdict.message[:MESSAGE_MAX],
        observed_generation=f.job.meta.generation, last_transition_time=since,
    )


def _notes(f: Facts, status: RLHFJobStatus) -> tuple[Note, ...]:
    """On transitions only: a new phase, a new reason of a refusal, a restart more."""
    was, notes = f.job.status, []
    if status.restarts.total > was.record.restarts.total and status.last_failure:
        notes.append(Note(True, "Restart", f"{status.last_failure.failure_class.value}: {status.last_failure.message}"))
    bad = status.phase is Phase.FAILED or (status.phase is Phase.PENDING and status.reason in REFUSALS)
    told_otherwise = status.phase in (Phase.PENDING, Phase.RESTARTING) and not bad
    if (status.phase, bad and status.reason) != (was.phase, bad and was.reason) and not told_otherwise:
        notes.append(Note(bad, status.reason or status.phase.value, f"{status.phase.value}: {status.message}"))
    if status.record.clusters > was.record.clusters > 0 and status.phase is Phase.RESTARTING:
        notes.append(Note(False, "NewCluster", f"RayCluster {cluster_name(f.job.meta.name, status.record.clusters)} takes the place of the one before"))
    return tuple(notes)


__all__ = ["Decision", "Note", "Record", "Want", "broken", "decide", "refused", "troubled"]
