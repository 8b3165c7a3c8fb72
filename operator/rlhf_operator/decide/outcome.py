"""Whether the job has ended, and how. First match wins; success comes first, so that an operator that looks late
never turns a
finished job into one that missed its deadline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC
from rlhf_operator.decide import deadlines, readiness
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.words import brief, headline

WORDS_MAX, REFUSAL_MAX = 1024, 512


@dataclass(frozen=True, slots=True)
class Outcome:
    result: Literal["Complete", "Failed"]
    reason: str
    message: str


def outcome(f: Facts) -> Outcome | None:
    found = next((found for rule in LADDER if (found := rule(f))), None)
    return Outcome(found.result, found.reason, found.message[:WORDS_MAX]) if found else None


def _success(f: Facts) -> Outcome | None:
    return Outcome("Complete", "JobSucceeded", "the driver finished all steps") if f.succeeded else None


def _final_exit(f: Facts) -> Outcome | None:
    """Exits that no retry can mend."""
    reason = {EXIT_BAD_SPEC: "InvalidSpec", EXIT_BAD_DATA: "InvalidData"}.get(f.driver_exit or 0)
    last = f.driver.last if f.driver else None
    if reason is None or last is None:
        return None
    silence = f"the driver refused with exit code {last.exit_code} and said nothing"
    return Outcome("Failed", reason, headline(last.message, REFUSAL_MAX) or silence)


def _backoff(f: Facts) -> Outcome | None:
    limit, failures = f.job.run_policy.backoff_limit, f.memory.failures
    if f.record.restarts_since_progress <= limit or not failures:
        return None
    last = failures[0]
    spent = (
        f"{f.record.restarts_since_progress} failed runs without a finished step (runPolicy.backoffLimit is {limit})"
    )
    return Outcome(
        "Failed",
        "BackoffLimitExceeded",
        f"{spent}; the last one, {last.failure_class.value}: {brief(last.message, last.words)}",
    )


def _active_deadline(f: Facts) -> Outcome | None:
    if not deadlines.passed(deadlines.active(f), f.now):
        return None
    limit = f.job.run_policy.active_deadline_seconds
    return Outcome("Failed", "DeadlineExceeded", f"ran longer than {limit} s (runPolicy.activeDeadlineSeconds)")


def _provisioning_deadline(f: Facts) -> Outcome | None:
    if not deadlines.passed(deadlines.provisioning(f), f.now):
        return None
    limit, why, again = deadlines.provisioning_seconds(f), readiness.explain(f), bool(f.record.first_ready_at)
    reason = "ReprovisioningDeadlineExceeded" if again else "ProvisioningDeadlineExceeded"
    name = f"runPolicy.{'reprovisioning' if again else 'provisioning'}DeadlineSeconds"
    lacking = "lost pods were not ready again" if again else "not all pods were ready"
    return Outcome("Failed", reason, f"{lacking} after {limit} s ({name}): {why.reason}: {why.message}")


LADDER: tuple[Callable[[Facts], Outcome | None], ...] = (
    _success,
    _final_exit,
    _backoff,
    _active_deadline,
    _provisioning_deadline,
)
