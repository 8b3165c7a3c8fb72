"""The soak's own judgement: what is a sign of a fault, what was lost, what was broken (pure, no cluster)."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hack import incident, soak
from hack.faults import PODS, PROCESSES, Fault, How, Moment, Target, moment_in, moment_of, named, possible
from hack.incident import Outcome
from hack.soak import Pace, Runner, Soak, batch, left_of, schedule

Object = dict[str, Any]


def status(step: int = 8, saved: int = 6, phase: str = "Running", **changes: Any) -> Object:
    progress = {
        "step": step,
        "reward": "0.5",
        "checkpoint": {"step": saved},
        "resumedFromStep": changes.pop("resumed", None),
    }
    restarts, clusters = changes.pop("restarts", 0), changes.pop("clusters", 1)
    conditions = [
        {"type": kind, "status": value, "reason": "R"} for kind, value in changes.pop("conditions", {}).items()
    ]
    progress |= changes.pop("progress", {})
    record = {"clusters": clusters, "losses": changes.pop("losses", [])}
    return {
        "phase": phase,
        "progress": progress,
        "restarts": {"total": restarts},
        "conditions": conditions,
        "record": record,
    }


def test_the_same_seed_is_the_same_soak_and_every_fault_comes_before_one_comes_twice() -> None:
    whole = len(possible()) * len(Moment)
    assert schedule(1, 50) == schedule(1, 300)[:50]
    assert schedule(1, 50) != schedule(2, 50)
    assert set(Counter(schedule(7, whole)).values()) == {1}


def test_every_target_has_its_faults() -> None:
    assert {target for _, target in possible()} == set(Target)
    assert {*PROCESSES, *PODS, Target.CLUSTER, Target.NODE} == set(Target)


@pytest.mark.parametrize("unattended", [False, True])
@pytest.mark.parametrize(("how", "target"), possible())
def test_a_fault_is_named_as_it_prints_itself(how: How, target: Target, unattended: bool) -> None:
    fault = Fault(how, target, Moment.SAVING, unattended)
    assert named(f"{fault}@saving") == fault
    assert named(str(fault)) == replace(fault, moment=Moment.TRAINING)


@pytest.mark.parametrize("text", ["SIGKILL of node", "delete of raylet", "SIGKILL", "SIGKILL of driver@never", ""])
def test_no_such_fault(text: str) -> None:
    with pytest.raises(ValueError):
        named(text)


def test_a_job_s_first_fault_is_one_of_its_start() -> None:
    faults = [Fault(How.KILL, Target.GCS, moment) for moment in (Moment.IDLE, Moment.SAVING, Moment.STARTING)]
    assert [fault.moment for fault in batch(faults, 3)] == [Moment.STARTING, Moment.IDLE, Moment.SAVING]
    assert [fault.moment for fault in batch(faults, 2)] == [Moment.IDLE, Moment.SAVING]


def test_a_soak_goes_on_where_its_log_ends(tmp_path: Path) -> None:
    log, plan = tmp_path / "soak.jsonl", schedule(3, 6)
    soak = Soak.so_far(log)
    for number, fault in enumerate((plan[4], plan[0]), start=1):
        soak.add(
            Outcome(number, "soak-1", str(fault), fault.moment, "", "", 4, problems=["lost"] if number == 2 else [])
        )
    soak.end({"job": "soak-1", "goodput": "0.5", "problems": ["left behind: a pod"]})
    assert Soak.so_far(log) == soak
    assert left_of(plan, soak.outcomes) == [plan[1], plan[2], plan[3], plan[5]]
    assert left_of(plan * 2, soak.outcomes)[4:] == plan
    assert soak.broken() == ["soak-1: left behind: a pod", f"2 {plan[0]} ({plan[0].moment}): lost"]


def test_a_job_that_ends_early_leaves_its_faults_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first job sees one fault of two, the next sees the other and a third."""
    plan, lives, names = schedule(3, 3), [1, 2], list[str]()

    class Life:
        def __init__(self, kube: Any, cfg: Any, name: str, steps: int, pace: Pace) -> None:
            names.append(f"{name} {steps}")
            self.name, self.left = name, lives.pop(0)

        def start(self) -> None: ...

    def struck(job: Life, number: int, fault: Fault) -> Outcome | None:
        job.left -= 1
        return Outcome(number, job.name, str(fault), fault.moment, "", "", 4) if job.left >= 0 else None

    monkeypatch.setattr(soak, "Job", Life)
    monkeypatch.setattr(soak, "strike", struck)
    monkeypatch.setattr(soak, "finish", lambda job: {"job": job.name, "goodput": None, "problems": []})
    record = Soak.so_far(tmp_path / "run.jsonl")
    nothing: Any = None
    Runner(nothing, nothing, record, Pace(every=10, step_seconds=1), float("inf")).run(plan, 2)
    assert left_of(plan, record.outcomes) == []
    assert [outcome.number for outcome in record.outcomes] == [1, 2, 3]
    assert names == ["run-1 28", "run-2 28"]


def test_a_step_waits_as_long_as_it_is_asked_to() -> None:
    (reward,) = soak.manifest("j", 4, 30.0)["spec"]["rewards"]
    waited: list[float] = []
    space: Object = {"waited": waited}
    exec(reward["code"].replace("time.sleep", "waited.append"), space)
    assert space["reward"](prompt="", completion="ee") == 1.0
    assert waited == [30.0 / 64]  # 16 prompts, 8 samples, 2 processes


@pytest.mark.parametrize(
    ("progress", "moment"),
    [
        ({"state": "Starting", "detail": "loading models"}, Moment.STARTING),
        ({"state": "Training", "detail": "generating"}, None),
        ({"state": "Draining"}, Moment.SAVING),
        ({"state": "Drained"}, Moment.IDLE),
        ({}, None),
    ],
)
def test_moments(progress: Object, moment: Moment | None) -> None:
    assert moment_of(progress) is moment


@pytest.mark.parametrize(
    ("titles", "moment"),
    [
        (["ray::Feed", "ray::Policy", "ray::Engine.generate"], Moment.GENERATING),
        (["ray::Policy.train", "ray::Engine"], Moment.TRAINING),
        (["ray::Policy.send", "ray::Engine.generate"], Moment.SYNCING),
        (["ray::Policy.save", "ray::Engine.generate"], Moment.SAVING),
        (["ray::Policy", "ray::Engine.start"], None),
        ([], None),
    ],
)
def test_moments_by_what_the_actors_do(titles: list[str], moment: Moment | None) -> None:
    assert moment_in(titles) is moment


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (status(), ""),
        (status(step=9), ""),
        (status(phase="Restarting"), "phase Restarting"),
        (status(phase="Suspended"), ""),
        (status(conditions={"Degraded": "True"}), "Degraded R"),
        (status(conditions={"ClusterReady": "False"}), "ClusterReady R"),
        (status(conditions={"Degraded": "False"}), ""),
        (status(restarts=1), "restarts 1"),
        (status(losses=[{"uid": "u"}]), "a loss in record.losses"),
    ],
)
def test_signs(now: Object, told: str) -> None:
    assert incident.sign(status(), now) == told


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        (status(step=9), 0),
        (status(restarts=1, resumed=6), 2),
        (status(clusters=2, resumed=8), 0),
        (status(restarts=1), 8),
    ],
)
def test_steps_lost(now: Object, lost: int) -> None:
    assert incident.steps_lost(status(), now) == lost


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (status(step=6, restarts=1, resumed=6), None),
        (status(step=0), "progress.step went from 8 to 0"),
        (status(saved=0), "progress.checkpoint went from step 6 to 0"),
        (status(progress={"reward": None}), "progress.reward was forgotten"),
        (status(restarts=1, resumed=4), "resumed from step 4, the checkpoint was of 6"),
    ],
)
def test_promises(now: Object, words: str | None) -> None:
    found = incident.broken_promises(status(), [now])
    assert (len(found) == 0) if words is None else any(words in text for text in found)


def test_what_an_earlier_driver_resumed_from_is_not_held_against_the_next() -> None:
    seen = [status(restarts=1, resumed=2), status(step=9, restarts=1, resumed=6)]
    assert incident.broken_promises(status(resumed=2), seen) == []


@pytest.mark.parametrize(
    ("now", "told", "goes"),
    [
        (status(step=9), True, True),
        (status(step=8), True, False),
        (status(step=9, phase="Restarting"), True, False),
        (status(step=9, conditions={"ClusterReady": "False"}), True, False),
        (status(step=9, conditions={"Degraded": "True"}), True, False),
        (status(step=9, conditions={"ClusterReady": "True", "Degraded": "False"}), True, True),
        (status(step=9), False, False),
        (status(step=11), False, True),
    ],
)
def test_a_run_goes_on(now: Object, told: bool, goes: bool) -> None:
    assert incident.goes_on(now, 8, told=told) is goes


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([range(16), range(16, 32), range(32, 48), range(48, 64)], None),
        ([range(16), range(16, 32), range(32, 48), range(32, 48)], "prompts repeated"),
        ([range(16), range(16, 32), range(32, 48), range(48, 60)], "prompts lost: 0:60"),
        ([range(16)], "step 2 left no samples"),
    ],
)
def test_prompts_are_trained_once(tmp_path: Path, steps: list[range], words: str | None) -> None:
    for number, rows in enumerate(steps, start=1):
        uids = [f"0:{row}" for row in rows for _ in range(8)]
        pq.write_table(pa.table({"uid": uids}), tmp_path / f"step-{number}.parquet")
    found = incident.prompts_trained(tmp_path, 4)
    assert (found == []) if words is None else any(words in text for text in found)


DRIVES: Object = {"state": "Training", "podUid": "u"}


@pytest.mark.parametrize(
    ("was", "told", "another", "has_gpus"),
    [
        (DRIVES, DRIVES, False, True),
        (DRIVES, DRIVES | {"detail": "ActorDiedError"}, False, True),
        (DRIVES, DRIVES | {"state": "Starting", "detail": "waiting for 1 GPUs"}, True, False),
        (DRIVES, DRIVES | {"state": "Starting", "detail": "starting feed, trainer and engines"}, True, True),
        (DRIVES, DRIVES | {"podUid": "v"}, True, True),
        (DRIVES | {"state": "Drained"}, DRIVES | {"state": "Starting", "detail": "waiting"}, False, False),
        (DRIVES, {}, True, False),
    ],
)
def test_another_driver_and_its_gpus(was: Object, told: Object, another: bool, has_gpus: bool) -> None:
    before, now = {"progress": was}, {"progress": told}
    assert (incident.another_driver(before, now), incident.seated(now)) == (another, has_gpus)


def test_only_a_failure_that_is_new_is_charged() -> None:
    old, new = {"class": "App", "time": "1"}, {"class": "HeadLost", "time": "2"}
    assert incident.charge({"failures": [old]}, {"failures": [old]}) == ""
    assert incident.charge({"failures": [old]}, {"failures": [new, old]}) == "HeadLost"
    assert incident.charge({}, {"failures": [old]}) == "App"


def test_the_table_says_none_where_nothing_was_told() -> None:
    outcomes = [
        Outcome(
            1, "j", "SIGKILL of driver", "training", "", "", 4, detected=1.0, recovered=30.0, lost=2, charged="App",
        ),
        Outcome(2, "j", "SIGKILL of driver", "training", "", "", 8, detected=2.0, driver=5.0, recovered=50.0),
        Outcome(3, "j", "SIGKILL of operator", "training", "", "", 9, recovered=4.0),
    ]
    assert incident.table(outcomes).splitlines()[2:] == [
        "| SIGKILL of driver | 2 | 1.5, 2.0 | 5.0, 5.0 | none | 40.0, 50.0 | 2 | App, none |",
        "| SIGKILL of operator | 1 | none | none | none | 4.0, 4.0 | 0 | none |",
    ]


@pytest.mark.parametrize(
    ("moment", "problems"), [(Moment.IDLE, []), (Moment.TRAINING, ["not injected: no head pod"])]
)
def test_a_suspended_run_may_have_given_up_what_was_to_be_struck(
    monkeypatch: pytest.MonkeyPatch, moment: Moment, problems: list[str]
) -> None:
    def nothing(*_: Any) -> None:
        raise LookupError("no head pod")

    monkeypatch.setattr(soak, "aim", nothing)
    job: Any = SimpleNamespace(cfg=None, name="j", status=dict)
    outcome = Outcome(1, "j", "force-delete of head pod", moment, "", "", 0)
    soak._inject(job, Fault(How.FORCE, Target.HEAD, moment), outcome)
    assert outcome.problems == problems
