"""Random faults over tiny jobs on the running embedded cluster, the same ones for the same seed.

usage: python -m hack.soak --faults 200 --seed 1 [--minutes M] [--per-job 6] [--log soak.jsonl] [--smoke]
       python -m hack.soak --fault "SIGKILL of raylet@training" --fault "drain of node, operator replaced" ...
       python -m hack.soak --faults 8 --seed 1 --per-job 8 --every 10 --step-seconds 30 --log goodput.jsonl

A soak that was cut off by --minutes goes on where its log ends. With --every a fault comes when that many steps have
finished since the one before, and with --step-seconds a step takes as long as one of a real model: what part of the
time is kept then is what a user of such steps sees. Each fault becomes one JSON line: what, at which moment, how long
until the status said so, how long until a step finished after it, and how many steps were done again. At each job's end
the invariants are checked: Succeeded, every prompt trained once, no step lost that a checkpoint held, nothing left
behind. The table by fault is printed at the end, for docs/reliability.md. Exit code 1: an invariant is broken. """

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from rlhf_api.job import RewardSpec

Object = dict[str, Any]
NAMESPACE = "soak"
STEPS_A_FAULT = 16  # of a job's length, unless faults come at fixed steps: some do not stop the training
STEPS_AFTER = 8  # the last fault
STEPS_BETWEEN = 3  # finished steps before a fault, after the recovery from the one before
_POLL_SECONDS = 0.2
_MOMENT_SECONDS = 60.0
_IDLE_SECONDS = 10.0  # that a suspended run is left alone after its fault
_RECOVERY_SECONDS = 600.0
_GONE_SECONDS = 180.0
# Behind the sample's own reward, which it calls.
_WAITS = """
import time
counted = reward
def reward(**sample):
    time.sleep({seconds})
    return counted(**sample)
"""
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


def left_of(faults: list[Fault], past: list[Outcome]) -> list[Fault]:
    """Those that did not come yet."""
    done, left = Counter((outcome.fault, outcome.moment) for outcome in past), list[Fault]()
    for fault in faults:
        if done[key := (str(fault), str(fault.moment))]:
            done[key] -= 1
        else:
            left.append(fault)
    return left


# --- one job ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How often a fault comes, and how long a step takes."""

    every: int = 0  # steps from one fault to the next; 0: as soon as the run has gone on
    step_seconds: float = 0.0  # that the rewards of a step wait

    def steps(self, faults: int) -> int:
        """Length of a job that sees so many: whole epochs."""
        return round_up((self.every or STEPS_A_FAULT) * faults + STEPS_AFTER, PROMPTS // PROMPTS_PER_STEP)



class Job:
    """A tiny job under faults. Its namespace, its directory on this machine, and its status as it comes."""

    def __init__(self, tools: Kube, cfg: settings.Settings, name: str, steps: int, pace: Pace) -> None:
        self.kube, self.cfg, self.name, self.steps, self.pace = tools, cfg, name, steps, pace
        self.api = Api.from_kubeconfig(cfg.kubeconfig)
        self.directory = cfg.volumes / "soak" / name
        self.patience = _RECOVERY_SECONDS + steps * pace.step_seconds
        self.struck = 0  # the step of the last fault

    def start(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.kube.apply(manifest(self.name, self.steps, self.pace.step_seconds))

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


def manifest(name: str, steps: int, step_seconds: float) -> Object:
    """tiny-colocated, with a checkpoint every second step, the samples of every step, and rewards that wait."""
    import yaml

    file = settings.from_environment().clone / "manifests" / "samples" / "tiny-colocated.yaml"
    (job,) = [document for document in yaml.safe_load_all(file.read_text()) if document]
    job["metadata"] = {"name": name, "namespace": NAMESPACE}
    spec = job["spec"]
    spec["trainer"]["steps"] = steps
    spec["checkpoint"] = {"path": f"/var/lib/rlhf/soak/{name}", "everySteps": 2, "keep": 2, "export": False}
    spec["telemetry"] = {"rolloutsEverySteps": 1}
    spec["runPolicy"] = {"backoffLimit": 20, "stallTimeoutSeconds": 300}
    if step_seconds:
        spec["rewards"][0]["code"] += _WAITS.format(seconds=step_seconds / calls_in_turn(spec["rollout"]))
    return dict(job)


def calls_in_turn(rollout: Object) -> int:
    """Of a step's reward, in each of its processes."""
    return int(rollout["promptsPerStep"] * rollout["samplesPerPrompt"] / RewardSpec.model_fields["workers"].default)


# --- one fault --------------------------------------------------------------------------------------------------


def strike(job: Job, number: int, fault: Fault) -> Outcome | None:
    """Wait for the moment, inject, watch until a step finishes after it. None: the job ended before its moment came."""
    before = _await_moment(job, fault.moment)
    if ended(before):
        return None
    outcome = Outcome(number, job.name, str(fault), fault.moment, "", _now(), step_of(before))
    start, known = _inject(job, fault, outcome)
    before = known or before
    outcome.step = job.struck = step_of(before)
    _watch(job, before, outcome, start, idle=fault.moment is Moment.IDLE)
    return outcome


def _await_moment(job: Job, moment: Moment) -> Object:
    """A status of the moment, or, of a step's phases, one when the run trains; or of a job that ended."""
    due = max(step_of(job.status()) + STEPS_BETWEEN, job.struck + job.pace.every)
    if moment is not Moment.STARTING or (job.struck and job.pace.every):
        job.wait(lambda now: now.get("phase") == "Running" and step_of(now) >= due, job.patience)
    if moment is Moment.STARTING:
        _start_again(job)
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
    """Aim, wait for the moment, fire. Returns when, by time.monotonic(), and the last status that knows nothing of it.
    """
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
    while (passed := time.monotonic() - start) < job.patience:
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
        outcome.problems.append(f"no step within {job.patience:.0f} s")
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
    """What came of the faults, and where it is written."""

    log: Path
    outcomes: list[Outcome] = field(default_factory=list)
    jobs: list[Object] = field(default_factory=list)  # their ends: name, steps, goodput, restarts, problems

    @classmethod
    def so_far(cls, log: Path) -> Soak:
        """As its log has it, which may not be there yet."""
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        faults, jobs = ([line for line in lines if ("fault" in line) is one] for one in (True, False))
        return cls(log, [Outcome(**line) for line in faults], jobs)

    def write(self, line: Object) -> None:
        with self.log.open("a") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.write(asdict(outcome))

    def end(self, job: Object) -> None:
        self.jobs.append(job)
        self.write(job)

    def broken(self) -> list[str]:
        """Every promise that was."""
        ends = [f"{job['job']}: {problem}" for job in self.jobs for problem in job["problems"]]
        return ends + [f"{o.number} {o.fault} ({o.moment}): {what}" for o in self.outcomes for what in o.problems]


@dataclass(frozen=True)
class Runner:
    """Jobs one after the other on the running cluster, with their faults."""

    kube: Kube
    cfg: settings.Settings
    soak: Soak
    pace: Pace
    deadline: float  # by time.monotonic()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def run(self, faults: list[Fault], per_job: int) -> None:
        while faults and not self.late:
            taken, before = batch(faults, per_job), len(self.soak.outcomes)
            left = self.job(f"{self.soak.log.stem}-{len(self.soak.jobs) + 1}", taken)
            faults = [*left, *faults[per_job:]]
            if len(self.soak.outcomes) == before and not self.late:
                raise RuntimeError(f"{self.soak.jobs[-1]['job']} ended before its first fault")

    def job(self, name: str, faults: list[Fault]) -> list[Fault]:
        """One job; returns the faults that it did not live to see."""
        job = Job(self.kube, self.cfg, name, self.pace.steps(len(faults)), self.pace)
        job.start()
        while faults and not self.late and (outcome := strike(job, len(self.soak.outcomes) + 1, faults[0])):
            faults = faults[1:]
            self.soak.add(outcome)
        self.soak.end(finish(job))
        return faults


def finish(job: Job) -> Object:
    """Wait for its end, delete it; returns what the log says of it."""
    last = job.wait(lambda _: False, job.patience) or job.status()
    complete = condition(last, "Complete").get("status") == "True"
    problems = [] if complete else [f"{last.get('phase')}: {last.get('message')}"]
    problems += prompts_trained(job.directory / "rollouts", job.steps) if complete else []
    problems += [f"left behind: {what}" for what in job.remove()]
    told = {"steps": step_of(last), "goodput": last.get("goodput"), "restarts": last.get("restarts")}
    return {"job": job.name, **told, "problems": problems}


def round_up(value: int, of: int) -> int:
    return -(-value // of) * of


def summary(soak: Soak) -> str:
    """The table, and what of it is compared with a promise."""
    found = soak.outcomes
    signs, steps = spread(o.detected for o in found), spread(o.recovered for o in found)
    lines = [table(found), "", f"faults {len(found)}, first sign {signs} s, new step {steps} s (median, most)"]
    if goodputs := [float(job["goodput"]) for job in soak.jobs if job["goodput"]]:
        lines.append(f"goodput {statistics.mean(goodputs):.2f} (mean of {len(goodputs)} jobs)")
    return "\n".join([*lines, *(f"BROKEN {text}" for text in soak.broken())])


def prepare(tools: Kube, cfg: settings.Settings) -> None:
    model = [sys.executable, "-m", "hack.tiny_model", str(cfg.volumes / "models" / "tiny")]
    subprocess.run(model, cwd=cfg.clone, check=True, stderr=subprocess.DEVNULL)
    if tools.find("namespace", NAMESPACE) is None:
        tools.run("create", "namespace", NAMESPACE)


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
    parser.add_argument("--every", type=int, default=0, help="steps from one fault to the next")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="that a step's rewards wait")
    given = parser.parse_args(arguments)
    soak = Soak.so_far(given.log)
    faults = given.fault or (
        list(_SMOKE) if given.smoke else left_of(schedule(given.seed, given.faults), soak.outcomes)
    )
    print(json.dumps({"seed": given.seed, "faults": len(faults), "perJob": given.per_job}), flush=True)
    cfg = settings.from_environment()
    tools, pace = kube(cfg), Pace(given.every, given.step_seconds)
    prepare(tools, cfg)
    Runner(tools, cfg, soak, pace, time.monotonic() + given.minutes * 60).run(faults, given.per_job)
    print(summary(soak))
    return 1 if soak.broken() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
