"""What survives from one pass to the next: the parts of the status that are read back."""

from dataclasses import dataclass, replace
from typing import Any

from rlhf_api.status import Failure, Record, Restarts, RLHFJobStatus

FAILURES_KEPT = 5


@dataclass(frozen=True, slots=True)
class Memory:
    """`failures`: newest first."""

    record: Record
    restarts: Restarts
    failures: tuple[Failure, ...] = ()
    start_time: str | None = None

    @classmethod
    def of(cls, status: RLHFJobStatus) -> "Memory":
        return cls(status.record, status.restarts, tuple(status.failures), status.start_time)

    def noting(self, **changes: Any) -> "Memory":
        """With these fields of the record."""
        return replace(self, record=self.record.model_copy(update=changes))

    def failed(self, failure: Failure) -> "Memory":
        return replace(self, failures=(failure, *self.failures)[:FAILURES_KEPT])
