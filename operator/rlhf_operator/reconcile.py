"""READ FIRST. The whole path of one job, one pass:

    1. observe   what there is           store.py, observed.py
    2. decide    what it means           decide/        (pure)
    3. plan      which objects follow    plan/          (pure)
    4. apply     create, delete          cluster.py
    5. write     the status, once, then Events

A pass knows nothing of the event that caused it and remembers nothing but `status.record`. An action follows only
from a record that is already stored; so a pass either writes down what it means to do, or does what is written down,
and may die anywhere. Only the first RayCluster follows from the spec alone, for it has nothing behind it that could be
forgotten. What goes wrong between 1 and 5, whatever it is, is told in the status. Before it, what a job of the
same name left when it went is deleted (sweep.py).
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from rlhf_operator.clock import moment
from rlhf_operator.cluster import ClusterIO, InTheWay, Stale
from rlhf_operator.decide import Decision, broken, decide, held_up, refused, troubled
from rlhf_operator.observed import Job
from rlhf_operator.plan import plan
from rlhf_operator.shelf import Key
from rlhf_operator.sweep import sweep

log = logging.getLogger(__name__)
Clock = Callable[[], datetime]
# A job that changes under our hands is looked at again at once: in the queue's order it would be late again.
LOOKS, LATE = 3, timedelta(seconds=1)
# A predecessor's objects go within seconds of it. What does not go then is held by somebody, and nothing tells when it
# is gone.
IN_THE_WAY, IN_THE_WAY_LONG, LONG = timedelta(seconds=2), timedelta(seconds=30), timedelta(seconds=60)
# The API server keeps only a part of the status (its CRD is older): what the record lacks cannot be waited for.
UNKEPT = timedelta(seconds=30)


def utc_now() -> datetime:
    return datetime.now(UTC)


async def reconcile(cluster: ClusterIO, key: Key, clock: Clock = utc_now, home: str = "default") -> datetime | None:
    """When to look again unless something happens before; None for never. Raises what went wrong after the status
    told of it. `home` is the operator's own namespace."""
    await sweep(cluster, key)
    for _ in range(LOOKS):
        job = cluster.job(key)
        if job is None:
            return None
        try:
            return await _pass(cluster, job, clock, home)
        except Stale as late:
            log.debug("%s: %s", "/".join(key), late)
            await cluster.catch_up(job)
    return clock() + LATE


async def _pass(cluster: ClusterIO, job: Job, clock: Clock, home: str) -> datetime | None:
    now = clock()
    try:
        decision = decide(job, cluster.observe(job), now)                  # 1, 2
    except Exception as error:
        await cluster.write_status(job, broken(job, _words(error), now))
        raise
    try:
        refusal = await cluster.perform(job, plan(job, decision.want, home))  # 3, 4
    except Stale:
        raise
    except InTheWay as wait:
        log.info("%s/%s waits: %s", job.meta.namespace, job.meta.name, wait)
        return _sooner(await _tell(cluster, job, held_up(decision, str(wait)), clock), now + _patience(job, now))
    except Exception as error:
        await _tell(cluster, job, troubled(decision, _words(error)), clock)
        raise
    if refusal:
        return await _tell(cluster, job, refused(decision, refusal.reason, refusal.message), clock)
    if decision.want.cluster is not None and not job.status.record.clusters:
        return now  # the first RayCluster is there: the next look tells of it and of its number in one write
    return await _tell(cluster, job, decision, clock)


async def _tell(cluster: ClusterIO, job: Job, decision: Decision, clock: Clock) -> datetime | None:
    """5. A decision that wants to look at what it just wrote does so only if it was written."""
    written = await cluster.write_status(job, decision.status)
    if written:
        await cluster.write_events(job, decision.notes, clock())
    at_once = decision.wake_at is not None and decision.wake_at <= clock()
    return clock() + UNKEPT if at_once and not written else decision.wake_at


def _patience(job: Job, now: datetime) -> timedelta:
    since = moment(job.status.record.released_at or job.meta.creation_timestamp)
    return IN_THE_WAY_LONG if since is not None and now > since + LONG else IN_THE_WAY


def _sooner(one: datetime | None, other: datetime) -> datetime:
    return min(one, other) if one else other


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
