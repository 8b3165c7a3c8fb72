"""READ FIRST. The whole path of one job, one pass:

    1. observe   what there is           cluster.py, observed.py
    2. decide    what it means           decide/        (pure)
    3. plan      which objects follow    plan/          (pure)
    4. apply     create, delete          cluster.py
    5. write     the status, once, then Events

A pass knows nothing of the event that caused it and remembers nothing but `status.record`. An action follows only from a record
that is already stored; so a pass either writes down what it means to do, or does what is written down, and may die anywhere.
"""

from collections.abc import Callable
from datetime import UTC, datetime

from rlhf_operator.cluster import ClusterIO, Key
from rlhf_operator.decide import decide, refused, troubled
from rlhf_operator.plan import plan

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


async def reconcile(cluster: ClusterIO, key: Key, clock: Clock = utc_now) -> datetime | None:
    """When to look again unless something happens before; None for never. Raises ApiError after the status told of it."""
    job = await cluster.job(key)
    if job is None:
        return None
    observed = await cluster.observe(job)                                  # 1
    decision = decide(job, observed, clock())                              # 2
    planned = plan(job, decision.want)                                     # 3
    try:
        refusal = await cluster.perform(job, planned)                           # 4
        decision = refused(decision, refusal.reason, refusal.message) if refusal else decision
    except Exception as error:
        decision = troubled(decision, f"{type(error).__name__}: {error}")
        raise
    finally:
        if await cluster.write_status(job, decision.status):               # 5
            await cluster.write_events(job, decision.notes, clock())
    return decision.wake_at
