"""What /metrics tells of the operator itself."""

from prometheus_client import Counter, Gauge, Histogram

RECONCILES = Counter("rlhf_operator_reconciles", "Passes over a job.", ["outcome"])
RECONCILE_SECONDS = Histogram("rlhf_operator_reconcile_seconds", "Time of one pass.", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30))
API_WRITES = Counter("rlhf_operator_api_writes", "Requests that may change something.", ["verb", "kind"])
QUEUE_DEPTH = Gauge("rlhf_operator_queue_depth", "Jobs that wait for a pass that is due.")
LAST_WATCH_EVENT = Gauge("rlhf_operator_last_watch_event_timestamp_seconds", "When kopf last delivered an event.")
LAST_RECONCILE = Gauge("rlhf_operator_last_reconcile_timestamp_seconds", "When a pass last ended, well or not.")
LEADER = Gauge("rlhf_operator_leader", "1 while this process holds the lease.")
