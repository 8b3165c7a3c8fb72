"""Random faults over tiny jobs on the running embedded cluster, the same ones for the same seed.

usage: python -m hack.soak --faults 200 --seed 1 [--minutes M] [--per-job 6] [--log soak.jsonl] [--smoke]
       python -m hack.soak --fault "SIGKILL of raylet@training" --fault "drain of node, operator replaced" ...

Each fault becomes one JSON line: what, at which moment, how long until the status said so, how long until a step
finished after it, and how many steps were done again. At each job's end the invariants are checked: Succeeded, every
prompt trained once, no step lost that a checkpoint held, nothing left behind. The table by fault is printed at the end,
for docs/reliability.md. Exit code 1: an invariant is broken.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from hack.cluster import settings
from hack.cluster.kube import Api, ApiError
from hack.faults import (
    SIGNALS,
    Fault,
    How,
    Moment,
    Target,
    aim,
    catch,
    inject,
    job_status,
    left_behind,
    moment_of,
    named,
    pods_of,
    possible,
)
from hack.incident import (
    PROMPTS,
    PROMPTS_PER_STEP,
    Outcome,
    another_driver,
    broken_promises,
    charge,
    condition,
    ended,
    goes_on,
    prompts_trained,
    resumed,
    seated,
    sign,
    spread,
    step_of,
    steps_lost,
    table,
    words,
)
from hack.kubectl import Kube, kube

Object = dict[str, Any]
NAMESPACE = "soak"
STEPS_A_FAULT = 16  # of a job's length: some faults do not stop the training
STEPS_BETWEEN = 3  # finished steps before a fault, after the recovery from the one before
_POLL_SECONDS = 0.2
_MOMENT_SECONDS = 60.0
_IDLE_SECONDS = 10.0  # that a suspended run is left alone after its fault
_RECOVERY_SECONDS = 600.0
_GONE_SECONDS = 180.0
_SMOKE = (
    Fault(How.KILL, Target.ENGINE, Moment.GENERATING),
    Fault(How.KILL, Target.DRIVER, Moment.TRAINING),
    Fault(How.FORCE, Target.HEAD, Moment.TRAINING),
)


def schedule(seed: int, count: int) -> list[Fault]:
    """`count` faults: a shuffled deck of every fault at every moment, and another when it is used up. Pure."""
    draw, found = random.Random(seed), list[Fault]()
    while len(found) < count:
        deck = [Fault(how, target, moment) for how, target in possible() for moment in Moment]
        draw.shuffle(deck)
        found += deck
    return found[:count]


def batch(faults: list[Fault], size: int) -> list[Fault]:
    """The next job's: the first `size`, those of the start first."""
    return sorted(faults[:size], key=lambda fault: fault.moment is not Moment.STARTING)


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

    def suspend(self, value: bool) -> bool:
        """Returns whether the API server took it."""
        path = f"/apis/rlhf.dev/v1alpha1/namespaces/{NAMESPACE}/rlhfjobs/{self.name}"
        try:
            self.api.patch(path, {"spec": {"suspend": value}})
        except ApiError:
            return False
        return True

    def wait(self, holds: Callable[[Object], bool], seconds: float) -> Object | None:
        """The first status for which it holds, or the one of a job that ended; None when the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            now = self.status()
            if now and (holds(now) or ended(now)):
                return now
            time.sleep(_POLL_SECONDS)
        return None

    def remove(self) -> list[str]:
        """Delete it, and say what of it stays: pods, RayClusters, processes."""
        deadline = time.monotonic() + _GONE_SECONDS
        left = ["the RLHFJob"]
        while left and time.monotonic() < deadline:
            try:
                self.api.delete(f"/apis/rlhf.dev/v1alpha1/namespaces/{NAMESPACE}/rlhfjobs/{self.name}")
                left = self._left()
            except ApiError as error:
                left = [str(error)]
            time.sleep(1)
        return left

    def _left(self) -> list[str]:
        pods = pods_of(self.api, NAMESPACE, self.name)
        clusters = self.api.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters")["items"]
        every = {pod["metadata"]["uid"] for pod in self.api.get("/api/v1/pods")["items"]}
        orphans = [
            f"process {process.pid} {' '.join(process.arguments)[:60]}" for process in left_behind(self.cfg, every)
        ]
        return [f"{item.get('kind', 'object')} {item['metadata']['name']}" for item in (*pods, *clusters)] + orphans


def manifest(name: str, steps: int) -> Object:
    """tiny-colocated, with a checkpoint every second step and the samples of every step."""
    import yaml

    file = settings.from_environment().clone / "manifests" / "samples" / "tiny-colocated.yaml"
    (job,) = [document for document in yaml.safe_load_all(file.read_text()) if document]
    job["metadata"] = {"name": name, "namespace": NAMESPACE}
    spec = job["spec"]
    spec["trainer"]["steps"] = steps
    spec["checkpoint"] = {"path": f"/var/lib/rlhf/soak/{name}", "everySteps": 2, "keep": 2, "export": False}
    spec["telemetry"] = {"rolloutsEverySteps": 1}
    spec["runPolicy"] = {"backoffLimit": 20, "stallTimeoutSeconds": 300}
    return dict(job)


# --- one fault --------------------------------------------------------------------------------------------------


def strike(job: Job, number: int, fault: Fault) -> Outcome | None:
    """Wait for the moment, inject, watch until a step finishes after it. None: the job ended before its moment came."""
    before = _await_moment(job, fault.moment)
    if ended(before):
        return None
    outcome = Outcome(number, job.name, str(fault), fault.moment, "", _now(), step_of(before))
    start, known = _inject(job, fault, outcome)
    before = known or before
    outcome.step = step_of(before)
    _watch(job, before, outcome, start, idle=fault.moment is Moment.IDLE)
    return outcome


def _await_moment(job: Job, moment: Moment) -> Object:
    """A status of the moment, or, of a step's phases, one when the run trains; or of a job that ended."""
    base = step_of(job.status())
    if moment is Moment.STARTING:
        _start_again(job)
    else:
        job.wait(lambda now: now.get("phase") == "Running" and step_of(now) >= base + STEPS_BETWEEN, _RECOVERY_SECONDS)
    if moment is Moment.IDLE:
        job.suspend(True)
    if moment in (Moment.STARTING, Moment.IDLE):
        job.wait(lambda now: moment_of(now.get("progress") or {}) is moment, _MOMENT_SECONDS)
    return job.status()


def _start_again(job: Job) -> None:
    """A run that is past its start gets another: its driver is killed, and that is charged before anything else."""
    before = job.status()
    if before.get("phase") != "Running":
        return
    with suppress(LookupError, ApiError):
        inject(job.cfg, NAMESPACE, job.name, How.KILL, Target.DRIVER)
        job.wait(lambda now: resumed(before, now), _MOMENT_SECONDS)


def _inject(job: Job, fault: Fault, outcome: Outcome) -> tuple[float, Object]:
    """Aim, wait for the moment, fire. Returns when, by time.monotonic(), and the last status that knows nothing of it."""
    known: Object = {}
    try:
        shot = aim(job.cfg, NAMESPACE, job.name, fault.how, fault.target)
        outcome.victim, outcome.seen = shot.victim, _caught(job, fault.moment)
        # The operator sees at once what the API server is asked for, and no signal: there the moment counts.
        known = {} if fault.how in SIGNALS else job.status()
        shot.fire()
        if fault.unattended:
            inject(job.cfg, NAMESPACE, job.name, How.FORCE, Target.OPERATOR)
    except (LookupError, ApiError, OSError) as error:
        if isinstance(error, LookupError) and fault.moment is Moment.IDLE:  # a suspended run gives its pods up
            outcome.victim = f"none: {error}"
        else:
            outcome.problems.append(f"not injected: {error}")
    return time.monotonic(), known or job.status()


def _caught(job: Job, moment: Moment) -> str:
    """What shows that it is the moment: the titles of the actors, or the driver's own words."""
    if moment in (Moment.STARTING, Moment.IDLE):
        progress = job.status().get("progress") or {}
        return f"{progress.get('state')}: {progress.get('detail')}"[:80]
    return catch(pods_of(job.api, NAMESPACE, job.name), moment, _MOMENT_SECONDS)


def _watch(job: Job, before: Object, outcome: Outcome, start: float, *, idle: bool) -> None:
    """Fill in when the status said so and when a step finished again. What was suspended is resumed after a while; what
    its status says then is of the suspension.
    """
    floor, seen, tells = step_of(before), list[Object](), not idle
    while (passed := time.monotonic() - start) < _RECOVERY_SECONDS:
        time.sleep(_POLL_SECONDS)
        now = job.status()
        if idle and passed > _IDLE_SECONDS:
            idle = not job.suspend(False)
        if not now:
            continue
        seen.append(now)
        _follow(outcome, before, now, round(passed, 1))
        if tells and outcome.detected is None and (told := sign(before, now)):
            outcome.detected, outcome.told, floor = round(passed, 1), told, step_of(now)
        if ended(now) or goes_on(now, floor, told=outcome.detected is not None):
            outcome.recovered, outcome.lost = round(passed, 1), steps_lost(before, now)
            break
    else:
        outcome.problems.append(f"no step within {_RECOVERY_SECONDS:.0f} s")
    outcome.problems += broken_promises(before, seen)


def _follow(outcome: Outcome, before: Object, now: Object, passed: float) -> None:
    """Note what is new."""
    told = words(now)
    if not outcome.trail or not outcome.trail[-1].endswith(f" {told}"):
        outcome.trail.append(f"{passed} {told}")
    outcome.charged = charge(before, now) or outcome.charged
    if outcome.driver is None and another_driver(before, now):
        outcome.driver = passed
    if outcome.driver is not None and outcome.seated is None and seated(now):
        outcome.seated = passed


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
        steps = round_up(STEPS_A_FAULT * len(faults) + 8, PROMPTS // PROMPTS_PER_STEP)
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
        complete = condition(last, "Complete").get("status") == "True"
        problems = [] if complete else [f"{last.get('phase')}: {last.get('message')}"]
        problems += prompts_trained(job.directory / "rollouts", job.steps) if complete else []
        problems += [f"left behind: {what}" for what in job.remove()]
        goodput, restarts = last.get("goodput"), last.get("restarts")
        self.goodputs += [float(goodput)] if goodput else []
        self.problems += [f"{job.name}: {problem}" for problem in problems]
        self.write(
            {"job": job.name, "steps": step_of(last), "goodput": goodput, "restarts": restarts, "problems": problems}
        )

    def write(self, line: Object) -> None:
        print(json.dumps(line), file=self.log, flush=True)
        print(json.dumps(line), flush=True)


def round_up(value: int, of: int) -> int:
    return -(-value // of) * of


def summary(soak: Soak) -> str:
    """The table, and what of it is compared with a promise."""
    found = soak.outcomes
    signs, steps = spread(o.detected for o in found), spread(o.recovered for o in found)
    lines = [table(found), "", f"faults {len(found)}, first sign {signs} s, new step {steps} s (median, most)"]
    if soak.goodputs:
        lines.append(f"goodput {statistics.mean(soak.goodputs):.2f} (mean of the jobs)")
    broken = [
        *soak.problems,
        *(f"{o.number} {o.fault} ({o.moment}): {problem}" for o in found for problem in o.problems),
    ]
    return "\n".join([*lines, *(f"BROKEN {text}" for text in broken)])


def prepare(tools: Kube, cfg: settings.Settings) -> None:
    model = [sys.executable, "-m", "hack.tiny_model", str(cfg.volumes / "models" / "tiny")]
    subprocess.run(model, cwd=cfg.clone, check=True, stderr=subprocess.DEVNULL)
    if tools.find("namespace", NAMESPACE) is None:
        tools.run("create", "namespace", NAMESPACE)


def run(faults: list[Fault], per_job: int, minutes: float, log: Path) -> Soak:
    cfg = settings.from_environment()
    tools = kube(cfg)
    prepare(tools, cfg)
    deadline = time.monotonic() + minutes * 60
    with log.open("a") as file:
        soak, number = Soak(tools, cfg, file), 0
        while faults and time.monotonic() < deadline:
            number += 1
            taken, done = batch(faults, per_job), len(soak.outcomes)
            faults = faults[per_job:]
            soak.job(f"soak-{number}", taken, deadline)
            faults = [*taken, *faults]  # with those that the job did not live to see
            if len(soak.outcomes) == done and time.monotonic() < deadline:
                soak.problems.append(f"soak-{number} ended before its first fault")
                break
    return soak


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="no fault after this; what is not reached is not counted"
    )
    parser.add_argument("--per-job", type=int, default=6)
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="three faults, always the same")
    parser.add_argument("--fault", type=named, action="append", help="this one, in the order given; no others")
    given = parser.parse_args(arguments)
    faults = given.fault or (list(_SMOKE) if given.smoke else schedule(given.seed, given.faults))
    print(
        json.dumps({"seed": given.seed, "faults": len(faults), "smoke": given.smoke, "perJob": given.per_job}),
        flush=True,
    )
    soak = run(faults, given.per_job, given.minutes, given.log)
    print(summary(soak))
    return 1 if soak.problems or any(outcome.problems for outcome in soak.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
