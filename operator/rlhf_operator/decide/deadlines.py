"""The clocks of a job. Each function says when its deadline falls, or None while that clock stands."""

from datetime import datetime, timedelta

from rlhf_operator.clock import moment
from rlhf_operator.decide.facts import Facts
from rlhf_operator.observed import Pod

# How long a deletion may be overdue, and pods without their RayCluster may stay, before we end them ourselves.
OVERDUE = timedelta(minutes=5)
BACKED_OFF = timedelta(minutes=10)
QUEUE_REACTS = timedelta(seconds=60)


def provisioning(f: Facts) -> datetime | None:
    """`awaited_since` stands while queued, suspended, or training all the same: what a run makes of a lost engine is
    its own affair."""
    return f.after(f.record.awaited_since, provisioning_seconds(f))


def provisioning_seconds(f: Facts) -> int:
    """A run that had its pods once has something to lose: it waits longer for them."""
    policy = f.job.run_policy
    return policy.reprovisioning_deadline_seconds if f.record.first_ready_at else policy.provisioning_deadline_seconds


def active(f: Facts) -> datetime | None:
    limit = f.job.run_policy.active_deadline_seconds
    return f.after(f.record.started_at, limit - f.record.active_seconds) if limit is not None else None


def stall(f: Facts) -> datetime | None:
    """From the last that the run did, or from when it could begin. Stands while it waits for pods, and until it is on
    record that they are there: pods that have just come have not been idle, nor those whose Ray ended and runs again,
    which nobody may have seen."""
    if f.driver is None or not (f.training or (f.ready and f.record.ready_at)):
        return None
    ended = f.driver.last.finished_at if f.driver.last else None
    ray = (pod.ray.running_since for pod in f.pods if pod.ray)
    began = [m for m in (f.driver.running_since or ended, f.active_at, moment(f.record.ready_at), *ray) if m]
    return max(began) + stall_limit(f) if began else None


def stall_limit(f: Facts) -> timedelta:
    """A driver that does not run is given what the kubelet's back-off may take, and more."""
    limit = timedelta(seconds=f.job.run_policy.stall_timeout_seconds)
    return limit if f.driver_runs else max(limit, BACKED_OFF)


def final_save(f: Facts) -> datetime | None:
    return f.after(f.job.meta.deletion_timestamp, f.job.run_policy.final_save_timeout_seconds)


def time_to_live(f: Facts) -> datetime | None:
    return f.after(f.record.finished_at, f.job.run_policy.ttl_seconds_after_finished)


def kill(pod: Pod) -> datetime | None:
    """When a pod that is to go is ended by force."""
    return pod.deletion_due + OVERDUE if pod.deletion_due else None


def orphaned(f: Facts) -> datetime | None:
    """When pods that the garbage collector should have taken are deleted by us."""
    since = [m for m in map(moment, (f.record.released_at, f.record.finished_at, f.job.meta.creation_timestamp)) if m]
    return max(since) + OVERDUE if since and f.orphans else None


def queue_silence(f: Facts) -> datetime | None:
    """When a queue that has not reacted to the RayCluster is said not to."""
    made = moment(f.record.cluster_created_at)
    waits = (
        f.cluster is not None
        and f.cluster.suspended
        and f.observed.queue is not None
        and f.observed.queue.workload is None
    )
    return made + QUEUE_REACTS if made and waits else None


def passed(deadline: datetime | None, now: datetime) -> bool:
    return deadline is not None and now >= deadline


def next_wake(f: Facts) -> datetime | None:
    """The next moment at which time alone may change the decision."""
    running = (provisioning, active, stall, queue_silence, final_save)
    clocks = (time_to_live, orphaned) if f.record.result else (*running, orphaned)
    moments = [*(clock(f) for clock in clocks), *map(kill, f.all_pods)]
    return min((m for m in moments if m and m > f.now), default=None)
