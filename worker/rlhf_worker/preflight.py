"""Before anything heavy is loaded: every check by name, in the actors that will need what it tries, side by side.

What is wrong is collected, so that one start tells it all; it ends soon after the first, and what has not answered by
then is not waited for. Rewards come last, once all else is right, because a call of them may cost money, and each has a
deadline of its own.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    checked: float = math.inf  # of those of CHECKS

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
    checks = iter(CHECKS)

    def then(ended: str) -> tuple[Calls, float]:
        """Ranks that have joined try one check after the other, whatever feed and engines are still at."""
        if "Join" in findings.problems or ended not in ("Join", *CHECKS) or (name := next(checks, None)) is None:
            return {}, 0.0
        findings.checked = min(findings.checked, time.monotonic() + DEADLINE_SECONDS)
        return {name: [rank.preflight.remote(name) for rank in ranks]}, findings.checked - time.monotonic()

    _settle(findings, opening, deadline_seconds, then)
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


def _settle(
    findings: Findings, calls: Calls, deadline_seconds: float,
    then: Callable[[str], tuple[Calls, float]] = lambda ended: ({}, 0.0),
) -> None:
    """Waits for the calls, each to its end. then: what begins when all calls of a name have ended, and its deadline;
    nothing follows one that is given up.
    """
    pending: dict[Any, str] = {}
    counts, begun, ends, took = dict[str, int](), dict[str, float](), dict[str, float](), dict[str, float]()

    def begin(calls: Calls, deadline_seconds: float) -> None:
        for name, each in calls.items():
            counts[name], begun[name], took[name] = len(each), time.monotonic(), 0.0
            ends[name] = begun[name] + deadline_seconds
            pending.update(dict.fromkeys(each, name))

    begin(calls, deadline_seconds)
    while pending:
        end = min(findings.end, *(ends[name] for name in pending.values()))
        left = max(0.0, end - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=1, timeout=min(SLICE_SECONDS, left))
        interrupt_if_asked()
        for call in done:
            name = pending.pop(call)
            _note(findings, name, call)
            took[name] = time.monotonic() - begun[name]
            if name not in pending.values():
                begin(*then(name))
        now, names = time.monotonic(), list(pending.values())
        for name in dict.fromkeys(names) if not done else ():
            if now >= min(findings.end, ends[name]):
                words = f"{names.count(name)} of {counts[name]} not done after {now - begun[name]:.0f} s"
                findings.add(name, DeadlineExceeded(f"preflight check {name}: {words}"))
                pending = {call: other for call, other in pending.items() if other != name}
    findings.passed += [f"{name} {seconds:.1f} s" for name, seconds in took.items() if name not in findings.problems]


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
