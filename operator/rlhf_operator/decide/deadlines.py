"""The clocks of a job. Each function says when its deadline falls, or None while that clock stands."""

from datetime import datetime, timedelta

from rlhf_operator.clock import moment
from rlhf_operator.decide.facts import Facts


def provisioning(f: Facts) -> datetime | None:
    """From creation or admission to all pods ready; a lost pod begins it anew (see `record.py`). Stands while queued, and while
    the driver trains all the same: what it makes of a lost engine is its own affair, and bounded by the stall clock."""
    if f.cluster is None or f.cluster.suspended or f.record.ready_at or f.spec.suspend or f.training:
        return None
    began = [m for m in map(moment, (f.record.cluster_created_at, f.record.admitted_at)) if m]
    return max(began) + timedelta(seconds=f.spec.run_policy.provisioning_deadline_seconds) if began else None


def active(f: Facts) -> datetime | None:
    limit = f.spec.run_policy.active_deadline_seconds
    return f.after(f.record.started_at, limit - f.record.active_seconds) if limit is not None else None


def stall(f: Facts) -> datetime | None:
    """From the last finished step of this run, or from its start. Stands while it waits for pods: that is provisioning."""
    if f.driver is None or not f.driver_runs or not (f.ready or f.training):
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
