"""The clocks of a job. Each function says when its deadline falls, or None while that clock stands."""

from datetime import datetime, timedelta

from rlhf_operator.clock import moment
from rlhf_operator.decide.facts import Facts


def provisioning(f: Facts) -> datetime | None:
    """From creation, admission or the loss of the head, whichever came last, to all pods ready. Stands while queued."""
    if f.cluster is None or f.cluster.suspended or f.record.ready_at or f.spec.suspend:
        return None
    lost = f.record.last_failure.time if f.record.last_failure else None
    began = [m for m in map(moment, (f.record.cluster_created_at, f.record.admitted_at, lost)) if m]
    return max(began) + timedelta(seconds=f.spec.run_policy.provisioning_deadline_seconds) if began else None


def active(f: Facts) -> datetime | None:
    limit = f.spec.run_policy.active_deadline_seconds
    return f.after(f.record.started_at, limit - f.record.active_seconds) if limit is not None else None


def stall(f: Facts) -> datetime | None:
    """From the last finished step of this run, or from its start. Stands while pods are missing: that is provisioning."""
    if not f.driver_runs or not f.ready or f.driver is None:
        return None
    stepped = moment(f.progress.step_time) if f.progress else None
    began = [m for m in (f.driver.running_since, stepped, moment(f.record.ready_at)) if m]
    return max(began) + timedelta(seconds=f.spec.run_policy.stall_timeout_seconds)


def time_to_live(f: Facts) -> datetime | None:
    return f.after(f.record.finished_at, f.spec.run_policy.ttl_seconds_after_finished)


def passed(deadline: datetime | None, now: datetime) -> bool:
    return deadline is not None and now >= deadline


def next_wake(f: Facts) -> datetime | None:
    """The next moment at which time alone may change the decision."""
    clocks = (time_to_live,) if f.record.result else (provisioning, active, stall)
    return min((d for clock in clocks if (d := clock(f)) and d > f.now), default=None)
