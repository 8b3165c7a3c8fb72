"""What /metrics tells of the operator itself and of the jobs."""

import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rlhf_api.status import Phase, RLHFJobStatus
from rlhf_operator.clock import moment, stamp
from rlhf_operator.store import Store

WAITS = (1, 5, 15, 60, 300, 900, 3600, 14400, 86400)

RECONCILES = Counter("rlhf_operator_reconciles", "Passes over a job.", ["outcome"])
RECONCILE_SECONDS = Histogram(
    "rlhf_operator_reconcile_seconds", "Time of one pass.", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
)
API_WRITES = Counter("rlhf_operator_api_writes", "Requests that may change something.", ["verb", "kind"])
API_READS = Counter(
    "rlhf_operator_api_reads", "Lists that fill the store, and reads of what stood in the way of a write.", ["kind"]
)
QUEUE_DEPTH = Gauge("rlhf_operator_queue_depth", "Jobs that have a next pass, due now or later.")
ACTIVE = Gauge("rlhf_operator_active_passes", "Passes under way.")
LAST_RECONCILE = Gauge("rlhf_operator_last_reconcile_timestamp_seconds", "When a pass last ended, well or not.")
LEADER = Gauge("rlhf_operator_leader", "1 while this process holds the lease.")
WATCH_EVENTS = Counter("rlhf_operator_watch_events", "Events of the watches, by what they are about.", ["kind"])
WATCH_RESTARTS = Counter("rlhf_operator_watch_restarts", "Times that all watches were begun anew after an error.")
RESTARTS = Counter(
    "rlhf_operator_job_restarts", "Restarts of drivers and clusters that this process charged.", ["class"]
)
QUEUE_SECONDS = Histogram(
    "rlhf_operator_job_queue_seconds", "From a RayCluster's creation to its admission by the queue.", buckets=WAITS
)
PROVISIONING_SECONDS = Histogram(
    "rlhf_operator_job_provisioning_seconds",
    "From a RayCluster's creation, its admission, or the loss of a pod to all of its pods ready.",
    buckets=WAITS,
)
DETECT_SECONDS = Histogram(
    "rlhf_operator_job_detect_seconds", "From a driver's end to the status that tells of it.",
    buckets=(0.3, 1, 3, 10, 30, 60, 120, 300),
)
ENDED = Counter("rlhf_operator_jobs_ended", "Jobs that ended while this process served them.", ["result"])


def told(before: RLHFJobStatus, after: RLHFJobStatus) -> None:
    """After a status was written: what it tells for the first time."""
    was, now = before.record, after.record
    for name in type(after.restarts).model_fields:
        if name != "total" and (more := getattr(after.restarts, name) - getattr(before.restarts, name)) > 0:
            RESTARTS.labels(name).inc(more)
    if now.admitted_at and not was.admitted_at:
        _observe(QUEUE_SECONDS, now.cluster_created_at, now.admitted_at)
    if now.ready_at and not was.ready_at:
        _observe(PROVISIONING_SECONDS, was.awaited_since, now.ready_at)
    if now.result and not was.result:
        ENDED.labels(now.result).inc()
    known = {(one.pod, one.time) for one in before.failures}  # its words may come later
    for failure in after.failures:
        if (failure.pod, failure.time) not in known:
            _observe(DETECT_SECONDS, failure.time, stamp(datetime.now(UTC)))


def _observe(histogram: Histogram, began: str | None, ended: str) -> None:
    since, until = moment(began), moment(ended)
    if since and until:
        histogram.observe(max(0.0, (until - since).total_seconds()))


class WatchAges:
    """When each kind's watch last told of something. Quiet is not dead: where nothing happens, nothing is told."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def told(self, plural: str) -> None:
        self._last[plural] = time.monotonic()
        WATCH_EVENTS.labels(plural).inc()

    def of(self) -> dict[str, float]:
        now = time.monotonic()
        return {plural: round(now - last, 1) for plural, last in self._last.items()}

    @property
    def least(self) -> float | None:
        return min(self.of().values(), default=None)


class StoreCollector(Collector):
    """Gauges that are counted when asked for."""

    def __init__(self, store: Store, ages: WatchAges) -> None:
        self.store, self.ages = store, ages

    def collect(self) -> Iterator[GaugeMetricFamily]:
        reasons, phases = self.store.reasons(), Counts(dict.fromkeys([phase.value for phase in Phase], 0))
        for (phase, _), count in reasons.items():
            phases[phase] += count
        yield _family("rlhf_operator_jobs", "Jobs by phase.", ["phase"], (([name], n) for name, n in phases.items()))
        yield _family(
            "rlhf_operator_jobs_by_reason", "Jobs by phase and status.reason.", ["phase", "reason"],
            (([*both], n) for both, n in reasons.items()),
        )
        yield _family(
            "rlhf_operator_store_objects",
            "Objects held in memory.",
            ["kind"],
            (([k], n) for k, n in self.store.sizes().items()),
        )
        ages = (([kind], age) for kind, age in self.ages.of().items())
        yield _family(
            "rlhf_operator_watch_age_seconds", "Since the watch of a kind last told of something.", ["kind"], ages
        )
        goodput = (([*key], share) for key, share in self.store.goodputs())
        yield _family(
            "rlhf_operator_job_goodput",
            "Share of the held time that went into steps that were kept.",
            ["namespace", "name"],
            goodput,
        )


def _family(name: str, text: str, labels: list[str], samples: Iterable[tuple[list[str], float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
