"""Before anything heavy is loaded: every check by name, in the actors that will need what it tries.

What is wrong is collected, so that one start tells it all; it ends soon after the first, and what has not answered by
then is not waited for. Rewards come last, once all else is right, because a call of them may cost money, and each has a
deadline of its own.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf_api.job import RewardSpec
from rlhf_api.progress import Preflight
from rlhf_api.run import RunConfig
from rlhf_worker.calls import SLICE_SECONDS, root_cause
from rlhf_worker.errors import DeadlineExceeded, Problems, combined, said
from rlhf_worker.progress import Reporter
from rlhf_worker.stop import interrupt_if_asked
from rlhf_worker.trainer.checks import CHECKS
from rlhf_worker.words import printable

DEADLINE_SECONDS = 60.0  # of all CHECKS
WRONG_SECONDS = 50.0  # from the beginning: for the others to answer once something is wrong
LEAST_SECONDS = 10.0  # for the same, where the first came late
REWARD_SLACK_SECONDS = 30.0

Calls = Mapping[str, Sequence[Any]]  # under way, by the name of what they try


@dataclass(slots=True)
class Findings:
    begun: float
    problems: dict[str, list[Exception]] = field(default_factory=dict)  # by the check's name
    passed: list[str] = field(default_factory=list)
    end: float = math.inf  # of all waits, once something is wrong

    def add(self, name: str, error: Exception) -> None:
        self.problems.setdefault(name, []).append(error)
        self.end = min(self.end, max(self.begun + WRONG_SECONDS, time.monotonic() + LEAST_SECONDS))


def preflight(
    config: RunConfig, opening: Calls, ranks: Sequence[ActorHandle], feed: ActorHandle, reporter: Reporter,
    known: Problems, deadline_seconds: float,
) -> None:
    """opening: what is under way side by side, of it "Join" of the ranks' groups; known: what was wrong before.

    deadline_seconds: for what is opened. Raises what `combined` makes of all that is wrong; Terminated, Ended.
    """
    findings = Findings(time.monotonic())
    for error in known.errors:
        findings.add("Spec", error)
    reporter.update(detail="preflight")
    together = "Join" not in _settle(findings, opening, deadline_seconds) and "Join" not in findings.problems
    end = time.monotonic() + DEADLINE_SECONDS
    for name in CHECKS if together else ():
        if _settle(findings, {name: [rank.preflight.remote(name) for rank in ranks]}, end - time.monotonic()):
            break  # a rank is still at it, so that the next would wait for it
    if not findings.problems:
        _settle(findings, {"Rewards": [feed.try_rewards.remote()]}, rewards_seconds(config))
    _tell(findings, reporter)


def rewards_seconds(config: RunConfig) -> float:
    """Each reward is tried on every source that it judges, and each of an evaluation set's own on that set."""
    of_sources = [
        reward
        for source in config.data.sources or (None,)
        for reward in config.rewards
        if source is None or source.judged_by(reward.name)
    ]
    of_sets = [reward for spec in config.evaluation for reward in spec.rewards or ()]
    return sum(map(reward_seconds, [*of_sources, *of_sets]))


def reward_seconds(reward: RewardSpec) -> float:
    """That a reward's own deadline gives all its tries, and some for their way there and back."""
    from rlhf_worker.rewards.attempt import BACKOFF_LIMIT  # brings torch, which what is wrong need not wait for

    return (reward.timeout_seconds + BACKOFF_LIMIT) * (reward.retries + 1) + REWARD_SLACK_SECONDS


def _settle(findings: Findings, calls: Calls, deadline_seconds: float) -> set[str]:
    """Waits for the calls, each to its end. Returns the names of those that are given up."""
    start = time.monotonic()
    pending = {call: name for name, each in calls.items() for call in each}
    while pending:
        left = min(findings.end, start + deadline_seconds) - time.monotonic()
        done, _ = ray.wait(list(pending), num_returns=1, timeout=min(SLICE_SECONDS, max(0.0, left)))
        interrupt_if_asked()
        for call in done:
            _note(findings, pending.pop(call), call)
        if not done and left <= 0:
            break
    seconds, given_up = time.monotonic() - start, list(pending.values())
    for name in dict.fromkeys(given_up):
        words = f"{given_up.count(name)} of {len(calls[name])} not done after {seconds:.0f} s"
        findings.add(name, DeadlineExceeded(f"preflight check {name}: {words}"))
    findings.passed += [f"{name} {seconds:.1f} s" for name in calls if name not in {*findings.problems, *given_up}]
    return set(given_up)


def _note(findings: Findings, name: str, call: Any) -> None:
    try:
        ray.get(call)
    except Exception as error:
        findings.add(name, error)


def _tell(findings: Findings, reporter: Reporter) -> None:
    seconds = f"{time.monotonic() - findings.begun:.1f}"
    errors = [error for each in findings.problems.values() for error in each]
    if not errors:
        words = ", ".join(findings.passed)
        reporter.update(preflight=Preflight(message=words, seconds=seconds))
        print(f"preflight: {words}", flush=True)
        return
    causes = [cause for error in errors if isinstance(cause := root_cause(error), Exception)]
    whole = errors[0] if len(errors) == 1 else combined(causes)
    words = printable(said(root_cause(whole)))[:1000]
    reporter.update(preflight=Preflight(failed=next(iter(findings.problems)), message=words, seconds=seconds))
    raise whole from (whole.__cause__ if whole in errors else errors[0])
