"""Whether the job has ended, and how. First match wins; success comes first, so that an operator that looks late never turns a
finished job into one that missed its deadline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC
from rlhf_operator.decide import deadlines, readiness
from rlhf_operator.decide.facts import Facts


@dataclass(frozen=True, slots=True)
class Outcome:
    result: Literal["Complete", "Failed"]
    reason: str
    message: str


def outcome(f: Facts) -> Outcome | None:
    return next((found for rule in LADDER if (found := rule(f))), None)


def _success(f: Facts) -> Outcome | None:
    return Outcome("Complete", "JobSucceeded", "the driver finished all steps") if f.succeeded else None


def _final_exit(f: Facts) -> Outcome | None:
    """Exits that no retry can mend."""
    reason = {EXIT_BAD_SPEC: "InvalidSpec", EXIT_BAD_DATA: "InvalidData"}.get(f.driver_exit or 0)
    last = f.driver.last if f.driver else None
    if reason is None or last is None:
        return None
    return Outcome("Failed", reason, last.message or f"the driver refused with exit code {last.exit_code} and said nothing")


def _backoff(f: Facts) -> Outcome | None:
    limit, failure = f.spec.run_policy.backoff_limit, f.record.last_failure
    if f.record.restarts_since_progress <= limit or failure is None:
        return None
    spent = f"{f.record.restarts_since_progress} failed runs without a finished step (runPolicy.backoffLimit is {limit})"
    return Outcome("Failed", "BackoffLimitExceeded", f"{spent}; the last one, {failure.failure_class.value}: {failure.message}")


def _active_deadline(f: Facts) -> Outcome | None:
    limit = f.spec.run_policy.active_deadline_seconds
    return Outcome("Failed", "DeadlineExceeded", f"ran longer than {limit} s (runPolicy.activeDeadlineSeconds)") if deadlines.passed(deadlines.active(f), f.now) else None


def _provisioning_deadline(f: Facts) -> Outcome | None:
    if not deadlines.passed(deadlines.provisioning(f), f.now) or f.ready:
        return None
    limit, why = f.spec.run_policy.provisioning_deadline_seconds, readiness.explain(f)
    return Outcome("Failed", "ProvisioningDeadlineExceeded", f"not all pods were ready after {limit} s (runPolicy.provisioningDeadlineSeconds): {why.reason}: {why.message}")


LADDER: tuple[Callable[[Facts], Outcome | None], ...] = (_success, _final_exit, _backoff, _active_deadline, _provisioning_deadline)
