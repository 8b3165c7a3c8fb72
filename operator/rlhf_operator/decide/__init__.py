"""decide(job, observed, now) -> Decision. Pure: what should exist, what the status says, which Events tell of it,
when to look again."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from rlhf_api.placement import plan_placement
from rlhf_api.status import Condition, ConditionType, Phase, RLHFJobStatus
from rlhf_operator.clock import stamp
from rlhf_operator.decide import deadlines
from rlhf_operator.decide.conditions import conditions
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.memory import Memory
from rlhf_operator.decide.phase import phase_of
from rlhf_operator.decide.record import remember
from rlhf_operator.decide.verdict import Verdict, no, yes
from rlhf_operator.decide.want import Want, want
from rlhf_operator.decide.words import brief
from rlhf_operator.names import cluster_name
from rlhf_operator.observed import Job, Observed

MESSAGE_MAX, HEAD_MAX = 1024, 256
# What may end without an edit is tried again; what nothing but an edit can mend waits for it.
RETRY = {"InvalidSpec": timedelta(minutes=10)}
RETRY_REFUSED = timedelta(seconds=60)
REFUSALS = ("InvalidSpec", "MissingReference", "NameConflict", "KubeRayNotInstalled", "KubeRayTooOld", "Refused")


@dataclass(frozen=True, slots=True)
class Note:
    """An Event to be."""

    warning: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Decision:
    """`status` has no progress: that is the driver's. `verdicts` are what its conditions were made from."""

    want: Want
    status: RLHFJobStatus
    notes: tuple[Note, ...]
    wake_at: datetime | None
    verdicts: dict[ConditionType, Verdict]
    facts: Facts


def decide(job: Job, observed: Observed, now: datetime) -> Decision:
    before = Facts(job, observed, Memory.of(job.status), now)
    facts = before.remembering(remember(before))
    wanted = want(facts if _begins(before, facts) else before, learned=facts.memory != before.memory)
    return _decision(facts, wanted, conditions(facts))


def _begins(before: Facts, now: Facts) -> bool:
    """The first RayCluster follows from the spec alone, which saves a write a job. An operator that dies before it has
    told of it leaves one that the next finds by its number, or gives up where the spec allows none any more."""
    return before.record.clusters == 0 and now.record.clusters == 1


def refused(decision: Decision, reason: str, message: str) -> Decision:
    """The API server did not take what was planned: told as Accepted=False, and tried again later."""
    verdicts = {**decision.verdicts, ConditionType.ACCEPTED: no(reason, message)}
    return _decision(decision.facts, decision.want, verdicts, done=decision.want.cluster is not None)


def troubled(decision: Decision, message: str) -> Decision:
    """This pass failed half-way: the status is written all the same, with the error in it."""
    verdicts = {**decision.verdicts, ConditionType.DEGRADED: _error(message)}
    return _decision(decision.facts, decision.want, verdicts, done=False)


def held_up(decision: Decision, message: str) -> Decision:
    """Something of an earlier job of this name has not gone yet."""
    waits = no("WaitingForOldObjects", message) if decision.want.cluster is not None else None
    verdicts = {**decision.verdicts, **({ConditionType.CLUSTER_READY: waits} if waits else {})}
    return _decision(decision.facts, decision.want, verdicts, done=False)


def broken(job: Job, message: str, now: datetime) -> RLHFJobStatus:
    """No decision was made at all: what was known stays, with the error beside it."""
    facts = Facts(job, Observed(), Memory.of(job.status), now)
    others = [c for c in job.status.conditions if c.type is not ConditionType.DEGRADED]
    degraded = _condition(facts, ConditionType.DEGRADED, _error(message))
    return job.status.model_copy(update={"conditions": [*others, degraded], "progress": None})


def _error(message: str) -> Verdict:
    return yes("ReconcileError", message)


def _decision(facts: Facts, wanted: Want, verdicts: dict[ConditionType, Verdict], *, done: bool = True) -> Decision:
    """`done` False: an edit of the spec is still to be acted on, and so is not called observed."""
    seen = facts.job.meta.generation if done else facts.job.status.observed_generation
    status = _status(facts, verdicts, seen)
    return Decision(wanted, status, _notes(facts, status), _wake_at(facts, verdicts), verdicts, facts)


def _wake_at(f: Facts, verdicts: dict[ConditionType, Verdict]) -> datetime | None:
    """At once when the memory moved: what it intends is for the next pass to do."""
    if f.memory != Memory.of(f.job.status):
        return f.now
    moments = (_retry(f, verdicts[ConditionType.ACCEPTED]), deadlines.next_wake(f))
    return min((moment for moment in moments if moment), default=None)


def _retry(f: Facts, accepted: Verdict) -> datetime | None:
    if accepted.status == "True" or f.record.result or f.job.problems:
        return None
    return f.now + RETRY.get(accepted.reason, RETRY_REFUSED)


def _status(f: Facts, verdicts: dict[ConditionType, Verdict], generation: int) -> RLHFJobStatus:
    """Goodput moves with the clock: it is written along with news, and is none."""
    status = _news(f, verdicts, generation)
    as_it_was = status.model_copy(update={"goodput": f.job.status.goodput})
    return as_it_was if as_it_was == f.job.status.model_copy(update={"progress": None}) else status


def _news(f: Facts, verdicts: dict[ConditionType, Verdict], generation: int) -> RLHFJobStatus:
    phase, why = phase_of(verdicts)
    cluster = f.cluster
    return RLHFJobStatus(
        observed_generation=generation,
        phase=phase,
        reason=verdicts[why].reason,
        message=verdicts[why].message[:HEAD_MAX],
        cluster_name=cluster.name if cluster else None,
        gpus=plan_placement(f.job.parsed.spec).gpus if f.job.parsed and not f.job.problems else f.job.status.gpus,
        mode=f.job.parsed.spec.placement.mode if f.job.parsed else f.job.status.mode,
        queue=f.job.queue.name if f.job.queue else None,
        dashboard=f"http://{cluster.service}.{f.job.meta.namespace}.svc:8265" if cluster and cluster.service else None,
        restarts=f.memory.restarts,
        failures=list(f.memory.failures),
        start_time=f.memory.start_time,
        completion_time=f.record.finished_at,
        goodput=_goodput(f),
        conditions=[_condition(f, kind, verdict) for kind, verdict in verdicts.items()],
        record=f.record,
    )


def _goodput(f: Facts) -> str | None:
    productive = f.reported.productive_seconds if f.reported else None
    held = f.record.allocated_seconds + f.since(f.record.allocated_since)
    return f"{min(1.0, productive / held):.2f}" if productive is not None and held > 0 else f.job.status.goodput


def _condition(f: Facts, kind: ConditionType, verdict: Verdict) -> Condition:
    """A condition keeps its time while its status stays, as everywhere in Kubernetes; and its generation while the
    spec cannot be
    read, but for the one that says so."""
    was = next((c for c in f.job.status.conditions if c.type is kind), None)
    since = was.last_transition_time if was and was.status == verdict.status else stamp(f.now)
    read = f.job.parsed is not None or kind is ConditionType.ACCEPTED or was is None
    return Condition(
        type=kind, status=verdict.status, reason=verdict.reason, message=verdict.message[:MESSAGE_MAX],
        observed_generation=f.job.meta.generation if read or was is None else was.observed_generation,
        last_transition_time=since,
    )  # fmt: skip


def _notes(f: Facts, status: RLHFJobStatus) -> tuple[Note, ...]:
    """On transitions only."""
    was = f.job.status
    found = (_restart_note(was, status), _refused_suspend(f), _phase_note(was, status), _cluster_note(f, was, status))
    return tuple(note for note in found if note)


def _restart_note(was: RLHFJobStatus, status: RLHFJobStatus) -> Note | None:
    if status.restarts.total <= was.restarts.total or not status.failures:
        return None
    last = status.failures[0]
    return Note(True, "Restart", f"{last.failure_class.value}: {brief(last.message, last.words)}")


def _refused_suspend(f: Facts) -> Note | None:
    said = any(c.type is ConditionType.SUSPENDED and c.reason == "WouldLoseCheckpoint" for c in f.job.status.conditions)
    return (
        Note(True, "WouldLoseCheckpoint", "spec.suspend, or an edit, waits: the checkpoints would go with the pods")
        if f.would_lose and not said
        else None
    )


def _phase_note(was: RLHFJobStatus, status: RLHFJobStatus) -> Note | None:
    bad = status.phase is Phase.FAILED or (status.phase is Phase.PENDING and status.reason in REFUSALS)
    noted_elsewhere = status.phase in (Phase.PENDING, Phase.RESTARTING) and not bad
    if noted_elsewhere or (status.phase, bad and status.reason) == (was.phase, bad and was.reason):
        return None
    return Note(bad, status.reason or status.phase.value, f"{status.phase.value}: {status.message}")


def _cluster_note(f: Facts, was: RLHFJobStatus, status: RLHFJobStatus) -> Note | None:
    if not status.record.clusters > was.record.clusters > 0 or status.phase is not Phase.RESTARTING:
        return None
    name = cluster_name(f.job.meta.name, status.record.clusters)
    return Note(False, "NewCluster", f"RayCluster {name} takes the place of the one before")


__all__ = ["Decision", "Note", "Want", "broken", "decide", "held_up", "refused", "troubled"]
