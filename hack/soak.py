"""Random faults over tiny jobs on the running embedded cluster, the same ones for the same seed.

usage: python -m hack.soak --faults 200 --seed 1 [--minutes M] [--per-job 6] [--log soak.jsonl] [--smoke]

Each fault becomes one JSON line: what, at which moment, how long until the status said so, how long until a step finished after it, and
how many steps were done again. At each job's end the invariants are checked: Succeeded, every prompt trained once, no step lost that a
checkpoint held, nothing left behind. The table by fault is printed at the end, for docs/reliability.md. Exit code 1: an invariant is broken.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from hack.cluster import settings
from hack.cluster.kube import Api, ApiError
from hack.faults import Fault, How, Moment, Target, inject, job_status, left_behind, moment_of, pods_of, possible
from hack.kubectl import Kube, kube
from hack.tiny_model import write as write_model

Object = dict[str, Any]
NAMESPACE = "soak"
PROMPTS_PER_STEP, PROMPTS = 16, 64  # of the tiny sample and its model
STEPS_BETWEEN = 3  # finished steps before a fault, after the recovery from the one before
STEPS_UNMOVED = 3  # a fault that no status told of and that this many steps followed was survived without a word
_POLL_SECONDS = 0.2
_MOMENT_SECONDS = 60.0
_RECOVERY_SECONDS = 600.0
_GONE_SECONDS = 180.0
_SMOKE = (
    Fault(How.KILL, Target.ENGINE, Moment.GENERATING),
    Fault(How.KILL, Target.DRIVER, Moment.TRAINING),
    Fault(How.FORCE, Target.HEAD, Moment.TRAINING),
)


@dataclass
class Outcome:
    """One fault and what followed. Seconds are from the injection; None: it did not come."""

    number: int
    job: str
    fault: str
    moment: str  # that was wanted
    seen: str  # what the status said at the injection
    at: str
    step: int
    victim: str = ""
    detected: float | None = None
    told: str = ""  # the first sign of it
    recovered: float | None = None
    lost: int = 0
    problems: list[str] = field(default_factory=list)


def schedule(seed: int, count: int) -> list[Fault]:
    """`count` faults: a shuffled deck of every fault at every moment, and another when it is used up. Pure."""
    draw, found = random.Random(seed), list[Fault]()
    while len(found) < count:
        deck = [Fault(how, target, moment) for how, target in possible() for moment in Moment]
        draw.shuffle(deck)
        found += deck
    return found[:count]


# --- what a status says -----------------------------------------------------------------------------------------


def step_of(status: Object) -> int:
    return int((status.get("progress") or {}).get("step") or 0)


def saved_of(status: Object) -> int:
    return int(((status.get("progress") or {}).get("checkpoint") or {}).get("step") or 0)


def condition(status: Object, kind: str) -> Object:
    return next((c for c in status.get("conditions") or [] if c["type"] == kind), {})


def sign(before: Object, now: Object) -> str:
    """What the status says now of an incident, that it did not say before; empty when nothing. Pure."""
    if now.get("phase") != before.get("phase") and now.get("phase") not in ("Running", "Succeeded", "Starting"):
        return f"phase {now.get('phase')}"
    for kind, amiss in (("Degraded", "True"), ("ClusterReady", "False")):
        if condition(now, kind).get("status") == amiss != condition(before, kind).get("status"):
            return f"{kind} {condition(now, kind).get('reason')}"
    restarts = [(status.get("restarts") or {}).get("total", 0) for status in (before, now)]
    if restarts[1] > restarts[0]:
        return f"restarts {restarts[1]}"
    losses = [{loss.get("uid") for loss in (status.get("record") or {}).get("losses") or []} for status in (before, now)]
    return "a loss in record.losses" if losses[1] - losses[0] else ""


def resumed(before: Object, now: Object) -> bool:
    """Whether another driver's life trains now."""
    counts = [((s.get("restarts") or {}).get("total", 0), (s.get("record") or {}).get("clusters", 0)) for s in (before, now)]
    return counts[0] != counts[1]


def steps_lost(before: Object, now: Object) -> int:
    """Finished steps that had to be done again."""
    if not resumed(before, now):
        return 0
    return max(0, step_of(before) - int((now.get("progress") or {}).get("resumedFromStep") or 0))


def broken_promises(before: Object, seen: Sequence[Object]) -> list[str]:
    """What no fault may do to a status: forget the step, the checkpoint or the reward; resume from before a checkpoint."""
    found = set()
    for now in seen:
        progress, saved = now.get("progress") or {}, saved_of(before)
        if saved_of(now) < saved:
            found.add(f"progress.checkpoint went from step {saved} to {saved_of(now)}")
        if saved and step_of(now) < saved:
            found.add(f"progress.step went from {step_of(before)} to {step_of(now)}, the checkpoint is of {saved}")
        if (before.get("progress") or {}).get("reward") and not progress.get("reward"):
            found.add("progress.reward was forgotten")
        if resumed(before, now) and (start := progress.get("resumedFromStep")) is not None and int(start) < saved:
            found.add(f"resumed from step {start}, the checkpoint was of {saved}")
    return sorted(found)


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
    return [f"{what}: {', '.join(which[:8])}" for what, which in (("prompts repeated", twice), ("prompts lost", lost)) if which]


# --- one job ----------------------------------------------------------------------------------------------------


class Job:
    """A tiny job under faults. Its namespace, its directory on this machine, and its status as it comes."""

    def __init__(self, tools: Kube, cfg: settings.Settings, name: str, steps: int) -> None:
        self.kube, self.cfg, self.name, self.steps = tools, cfg, name, steps
        self.api = Api.from_kubeconfig(cfg.kubeconfig)
        self.directory = cfg.volumes / "soak" / name

    def start(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.kube.apply(manifest(self.name, self.steps))

    def status(self) -> Object:
        return job_status(self.api, NAMESPACE, self.name)

    def suspend(self, value: bool) -> None:
        self.api.patch(f"/apis/rlhf.dev/v1alpha1/namespaces/{NAMESPACE}/rlhfjobs/{self.name}", {"spec": {"suspend": value}})

    def ended(self) -> bool:
        return any(condition(self.status(), kind).get("status") == "True" for kind in ("Complete", "Failed"))

    def wait(self, holds: Callable[[Object], bool], seconds: float) -> Object | None:
        """The first status for which it holds, or the one of a job that ended; None when the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            now = self.status()
            if now and (
                holds(now) or condition(now, "Complete").get("status") == "True" or condition(now, "Failed").get("status") == "True"
            ):
                return now
            time.sleep(_POLL_SECONDS)
        return None

    def remove(self) -> list[str]:
        """Delete it, and say what of it stays: pods, RayClusters, processes."""
        self.kube.run("delete", "rlhfjob", self.name, "-n", NAMESPACE, "--wait=false")
        deadline = time.monotonic() + _GONE_SECONDS
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(1)
        return left

    def _left(self) -> list[str]:
        pods = pods_of(self.api, NAMESPACE, self.name)
        clusters = self.api.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters")["items"]
        every = {pod["metadata"]["uid"] for pod in self.api.get("/api/v1/pods")["items"]}
        orphans = [f"process {process.pid} {' '.join(process.arguments)[:60]}" for process in left_behind(self.cfg, every)]
        return [f"{item.get('kind', 'object')} {item['metadata']['name']}" for item in (*pods, *clusters)] + orphans


def manifest(name: str, steps: int) -> Object:
    """tiny-colocated, with a checkpoint every second step, the samples of every step, and a reward that takes a moment."""
    import yaml

    file = settings.from_environment().clone / "manifests" / "samples" / "tiny-colocated.yaml"
    (job,) = [document for document in yaml.safe_load_all(file.read_text()) if document]
    job["metadata"] = {"name": name, "namespace": NAMESPACE}
    spec = job["spec"]
    spec["trainer"]["steps"] = steps
    spec["checkpoint"] = {"path": f"/var/lib/rlhf/soak/{name}", "everySteps": 2, "keep": 2, "export": False}
    spec["telemetry"] = {"rolloutsEverySteps": 1}
    spec["runPolicy"] = {"backoffLimit": 20, "stallTimeoutSeconds": 90}
    return dict(job)


# --- one fault --------------------------------------------------------------------------------------------------


def strike(job: Job, number: int, fault: Fault) -> Outcome | None:
    """Wait for the moment, inject, and watch until a step finishes after it. None: the job ended before its moment came."""
    before = _await_moment(job, fault.moment)
    if before is None or job.ended():
        return None
    progress = before.get("progress") or {}
    outcome = Outcome(
        number, job.name, str(fault), fault.moment, f"{progress.get('state')}: {progress.get('detail')}"[:80], _now(), step_of(before)
    )
    start, striking = time.monotonic(), Thread(target=_inject, args=(job, fault, outcome), daemon=True)
    striking.start()
    try:
        _watch(job, before, outcome, start, resume=fault.moment is Moment.IDLE)
    finally:
        striking.join()
    return outcome


def _await_moment(job: Job, moment: Moment) -> Object | None:
    """The status at the moment; one near it where it does not come, as some are short. None when the job ended."""
    base = step_of(job.status())
    if moment is not Moment.STARTING:
        job.wait(lambda now: now.get("phase") == "Running" and step_of(now) >= base + STEPS_BETWEEN, _RECOVERY_SECONDS)
    if job.ended():
        return None
    if moment is Moment.IDLE:
        job.suspend(True)
    return job.wait(lambda now: moment_of(now.get("progress") or {}) is moment, _MOMENT_SECONDS) or job.status() or None


def _inject(job: Job, fault: Fault, outcome: Outcome) -> None:
    try:
        outcome.victim = inject(job.cfg, NAMESPACE, job.name, fault.how, fault.target)
    except (LookupError, ApiError, OSError) as error:
        outcome.problems.append(f"not injected: {error}")


def _watch(job: Job, before: Object, outcome: Outcome, start: float, *, resume: bool) -> None:
    """Fill in when the status said so and when a step finished again."""
    floor, seen = step_of(before), list[Object]()
    while (passed := time.monotonic() - start) < _RECOVERY_SECONDS:
        now = job.status()
        if now:
            seen.append(now)
            if outcome.detected is None and (told := sign(before, now)):
                outcome.detected, outcome.told, floor = round(passed, 1), told, step_of(now)
            if resume and now.get("phase") in ("Suspended", "Suspending") and passed > 5:
                job.suspend(False)
                resume = False
            ended = condition(now, "Complete").get("status") == "True" or condition(now, "Failed").get("status") == "True"
            silent = outcome.detected is None and step_of(now) >= floor + STEPS_UNMOVED
            if ended or silent or (outcome.detected is not None and now.get("phase") == "Running" and step_of(now) > floor):
                outcome.recovered, outcome.lost = round(passed, 1), steps_lost(before, now)
                break
        time.sleep(_POLL_SECONDS)
    else:
        outcome.problems.append(f"no step within {_RECOVERY_SECONDS:.0f} s")
    outcome.problems += broken_promises(before, seen)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- all of it --------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """A run of the soak: what is to come, what came, and where it is written."""

    kube: Kube
    cfg: settings.Settings
    log: TextIO
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    goodputs: list[float] = field(default_factory=list)

    def job(self, name: str, faults: list[Fault], deadline: float) -> None:
        """One job with as many of the faults as it lives to see, which are taken from the list."""
        steps = round_up(STEPS_BETWEEN * (len(faults) + 1) * 2 + 8, PROMPTS // PROMPTS_PER_STEP)
        job = Job(self.kube, self.cfg, name, steps)
        job.start()
        while faults and time.monotonic() < deadline:
            outcome = strike(job, len(self.outcomes) + 1, faults[0])
            if outcome is None:
                break
            faults.pop(0)
            self.outcomes.append(outcome)
            self.write(asdict(outcome))
        self.finish(job)

    def finish(self, job: Job) -> None:
        last = job.wait(lambda _: False, _RECOVERY_SECONDS) or job.status()
        problems = [] if condition(last, "Complete").get("status") == "True" else [f"{last.get('phase')}: {last.get('message')}"]
        problems += prompts_trained(job.directory / "rollouts", job.steps) if not problems else []
        problems += [f"left behind: {what}" for what in job.remove()]
        if goodput := last.get("goodput"):
            self.goodputs.append(float(goodput))
        self.write({"job": job.name, "steps": step_of(last), "goodput": goodput, "restarts": last.get("restarts"), "problems": problems})
        self.problems += [f"{job.name}: {problem}" for problem in problems]

    def write(self, line: Object) -> None:
        print(json.dumps(line), file=self.log, flush=True)
        print(json.dumps(line), flush=True)


def round_up(value: int, of: int) -> int:
    return -(-value // of) * of


def table(outcomes: Iterable[Outcome]) -> str:
    """By fault: how often, seconds to the first sign and to the next step (median, most), steps lost (most). Markdown."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.fault, []).append(outcome)
    head = "| Fault | Times | First sign, s (median, most) | New step, s (median, most) | Steps lost (most) |\n|---|---|---|---|---|"
    lines = [
        f"| {fault} | {len(found)} | {_spread(o.detected for o in found)} | {_spread(o.recovered for o in found)} | {max(o.lost for o in found)} |"
        for fault, found in sorted(rows.items())
    ]
    return "\n".join([head, *lines])


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}, {max(known):.1f}" if known else "none"


def summary(soak: Soak) -> str:
    """The table, and what of it is compared with a promise."""
    found = soak.outcomes
    lines = [
        table(found),
        "",
        f"faults {len(found)}, first sign {_spread(o.detected for o in found)} s, new step {_spread(o.recovered for o in found)} s",
    ]
    if soak.goodputs:
        lines.append(f"goodput {statistics.mean(soak.goodputs):.2f} (mean of the jobs)")
    broken = [*soak.problems, *(f"{o.number} {o.fault} ({o.moment}): {problem}" for o in found for problem in o.problems)]
    return "\n".join([*lines, *(f"BROKEN {text}" for text in broken)])


def prepare(tools: Kube, cfg: settings.Settings) -> None:
    write_model(cfg.volumes / "models" / "tiny")
    if tools.find("namespace", NAMESPACE) is None:
        tools.run("create", "namespace", NAMESPACE)


def run(faults: list[Fault], per_job: int, minutes: float, log: Path) -> Soak:
    cfg = settings.from_environment()
    tools = kube(cfg)
    prepare(tools, cfg)
    deadline = time.monotonic() + minutes * 60
    with log.open("a") as file:
        soak = Soak(tools, cfg, file)
        number = 0
        while faults and time.monotonic() < deadline:
            number += 1
            batch, faults = faults[:per_job], faults[per_job:]
            soak.job(f"soak-{number}", batch, deadline)
            faults = [*batch, *faults]  # those that the job did not live to see
    return soak


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no fault after this; what is not reached is not counted")
    parser.add_argument("--per-job", type=int, default=6)
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="three faults, always the same")
    given = parser.parse_args(arguments)
    faults = list(_SMOKE) if given.smoke else schedule(given.seed, given.faults)
    soak = run(faults, given.per_job, given.minutes, given.log)
    print(summary(soak))
    return 1 if soak.problems or any(outcome.problems for outcome in soak.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
