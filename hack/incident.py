"""What a fault did to a job, by the statuses that followed it. Pure, but for the files that a run left."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hack.cluster.kube import Object

PROMPTS_PER_STEP, PROMPTS = 16, 64  # of the tiny sample and its model
STEPS_UNMOVED = 3  # a fault that no status told of and that this many steps followed was survived without a word
_BEFORE_ITS_SEAT = ("waiting", "checking the run config")
_WELL = ("Running", "Starting", "Suspending", "Suspended", "Succeeded")


@dataclass
class Outcome:
    """One fault and what followed. Seconds are from the injection; None: it did not come."""

    number: int
    job: str
    fault: str
    moment: str  # that was wanted
    seen: str  # what showed that it was that moment; empty when it did not come
    at: str
    step: int
    victim: str = ""
    detected: float | None = None
    told: str = ""  # the first sign of it
    driver: float | None = None  # another driver reports; None where the one before goes on
    seated: float | None = None  # it has its GPUs, and starts what runs on them
    recovered: float | None = None
    lost: int = 0
    charged: str = ""  # class of the newest failure, where one was told
    trail: list[str] = field(default_factory=list)  # every other thing that the status said, with its second
    problems: list[str] = field(default_factory=list)


def step_of(status: Object) -> int:
    return int((status.get("progress") or {}).get("step") or 0)


def saved_of(status: Object) -> int:
    return int(((status.get("progress") or {}).get("checkpoint") or {}).get("step") or 0)


def condition(status: Object, kind: str) -> Object:
    return next((c for c in status.get("conditions") or [] if c["type"] == kind), {})


def sign(before: Object, now: Object) -> str:
    """What the status says now of an incident, that it did not say before; empty when nothing. Pure."""
    if now.get("phase") != before.get("phase") and now.get("phase") not in _WELL:
        return f"phase {now.get('phase')}"
    for kind, amiss in (("Degraded", "True"), ("ClusterReady", "False")):
        if condition(now, kind).get("status") == amiss != condition(before, kind).get("status"):
            return f"{kind} {condition(now, kind).get('reason')}"
    restarts = [(status.get("restarts") or {}).get("total", 0) for status in (before, now)]
    if restarts[1] > restarts[0]:
        return f"restarts {restarts[1]}"
    losses = [
        {loss.get("uid") for loss in (status.get("record") or {}).get("losses") or []} for status in (before, now)
    ]
    return "a loss in record.losses" if losses[1] - losses[0] else ""


def ended(status: Object) -> bool:
    return any(condition(status, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def goes_on(now: Object, floor: int, *, told: bool) -> bool:
    """Whether the run trains after a fault: a step more than when it was told of, or several without a word of it.

    What is told of may be yet to come: a driver finishes a step and ends with the pod that is going. So nothing may be
    amiss any more.
    """
    amiss = condition(now, "Degraded").get("status") == "True" or condition(
        now, "ClusterReady",
    ).get("status") == "False"
    return now.get("phase") == "Running" and not amiss and step_of(now) >= floor + (1 if told else STEPS_UNMOVED)


def resumed(before: Object, now: Object) -> bool:
    """Whether another driver's life trains now."""
    counts = [
        ((s.get("restarts") or {}).get("total", 0), (s.get("record") or {}).get("clusters", 0)) for s in (before, now)
    ]
    return counts[0] != counts[1]


def another_driver(before: Object, now: Object) -> bool:
    """Whether a driver reports that began after `before`, when one trained; what an idle one becomes is no sign."""
    was, told = before.get("progress") or {}, now.get("progress") or {}
    began = told.get("podUid") != was.get("podUid") or told.get("state") == "Starting"
    return was.get("state") == "Training" and began


def seated(now: Object) -> bool:
    """The driver is past what it waits for before it starts its actors: its number, Ray and the GPUs."""
    progress = now.get("progress") or {}
    waits = progress.get("state") == "Starting" and str(progress.get("detail")).startswith(_BEFORE_ITS_SEAT)
    return bool(progress) and not waits


def charge(before: Object, now: Object) -> str:
    """Class of the newest failure, if there is one more than before."""
    told, known = now.get("failures") or [], before.get("failures") or []
    return str(told[0]["class"]) if told and told[0] != (known[0] if known else None) else ""


def words(now: Object) -> str:
    """What the status says, in a line."""
    progress = now.get("progress") or {}
    return f"{now.get('phase')} {now.get('reason')}: {progress.get('state')}: {progress.get('detail')}"[:160]


def steps_lost(before: Object, now: Object) -> int:
    """Finished steps that had to be done again."""
    if not resumed(before, now):
        return 0
    return max(0, step_of(before) - int((now.get("progress") or {}).get("resumedFromStep") or 0))


def broken_promises(before: Object, seen: Sequence[Object]) -> list[str]:
    """What no fault may do: make a status forget step, checkpoint or reward, or resume from before a checkpoint."""
    found = set()
    for now in seen:
        progress, saved = now.get("progress") or {}, saved_of(before)
        if saved_of(now) < saved:
            found.add(f"progress.checkpoint went from step {saved} to {saved_of(now)}")
        if saved and step_of(now) < saved:
            found.add(f"progress.step went from {step_of(before)} to {step_of(now)}, the checkpoint is of {saved}")
        if (before.get("progress") or {}).get("reward") and not progress.get("reward"):
            found.add("progress.reward was forgotten")
    return sorted(found) + _resumed_early(before, seen[-1:])


def _resumed_early(before: Object, last: Sequence[Object]) -> list[str]:
    """Of the last status alone: the ones before may still hold what an earlier driver resumed from."""
    saved = saved_of(before)
    starts = [(now.get("progress") or {}).get("resumedFromStep") for now in last if resumed(before, now)]
    return [
        f"resumed from step {start}, the checkpoint was of {saved}" for start in starts if start and int(start) < saved
    ]


def prompts_trained(rollouts: Path, steps: int) -> list[str]:
    """What is wrong with the prompts of steps 1 to `steps`; each row once an epoch is right."""
    import pyarrow.parquet as pq

    found: list[str] = []
    for number in range(1, steps + 1):
        try:
            column = pq.read_table(rollouts / f"step-{number}.parquet", columns=["uid"])["uid"].to_pylist()
        except OSError as error:
            return [f"step {number} left no samples: {error}"]
        found += sorted(set(column))
    epochs = steps * PROMPTS_PER_STEP // PROMPTS
    whole = {f"{epoch}:{row}" for epoch in range(epochs) for row in range(PROMPTS)}
    twice = sorted({uid for uid in found if found.count(uid) > 1})
    lost = sorted(whole - set(found))
    return [
        f"{what}: {', '.join(which[:8])}"
        for what, which in (("prompts repeated", twice), ("prompts lost", lost))
        if which
    ]


def table(outcomes: Iterable[Outcome]) -> str:
    """In Markdown, by fault: how often, seconds (median, most) to each thing that follows, steps lost, classes."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.fault, []).append(outcome)
    head = ("Fault", "Times", "First sign, s", "Driver again, s", "GPUs again, s", "New step, s", "Steps lost", "Class")
    lines = [(fault, *_row(found)) for fault, found in sorted(rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _row(found: list[Outcome]) -> tuple[str, ...]:
    seconds = [spread([getattr(o, name) for o in found]) for name in ("detected", "driver", "seated", "recovered")]
    classes = ", ".join(sorted({o.charged or "none" for o in found}))
    return str(len(found)), *seconds, str(max(o.lost for o in found)), classes


def spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}, {max(known):.1f}" if known else "none"
