"""What dies while a job runs, on a real kubelet: the status says what, no step that a checkpoint held is lost, and
nothing stays behind."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hack.cluster import settings
from hack.cluster.kube import Api
from hack.faults import How, Target, inject, left_behind
from hack.incident import broken_promises, goes_on, saved_of, step_of
from hack.kubectl import Kube
from tests.cluster.conftest import make_model, numbers
from tests.cluster.jobs import (
    Undisturbed,
    condition,
    pod_of,
    pods,
    released,
    rewards,
    sample,
    status,
    step,
    wait_for_condition,
)
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS, TRAINED = 72, 20  # as many as six faults leave time for
RESTRICTED = {
    "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    "container": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}
Object = dict[str, Any]


class Watched:
    """The job under test, and every status that it had since `mark`."""

    def __init__(self, kube: Kube, job: Object) -> None:
        self.kube, self.job = kube, job
        self.namespace, self.name = job["metadata"]["namespace"], job["metadata"]["name"]
        self.before: Object = {}
        self.seen: list[Object] = []

    def status(self) -> Object:
        self.seen.append(status(self.kube, self.namespace, self.name))
        return self.seen[-1]

    def mark(self) -> None:
        """From here on. A whole checkpoint and a step after it are there."""
        base = step(self.kube, self.namespace, self.name)
        wait_for(
            lambda: step_of(self.status()) >= base + 2 and saved_of(self.status()) > 0, 120, "steps, and a checkpoint"
        )
        self.before, self.seen = self.status(), []

    def strike(self, how: How, target: Target) -> None:
        inject(settings.from_environment(), self.namespace, self.name, how, target)

    def until_trained(self, seconds: float) -> Object:
        """The first status with a step that is new. No status in between forgot what is known."""
        found = self.until("a new step", lambda now: goes_on(now, step_of(self.before), told=True), seconds)
        assert broken_promises(self.before, self.seen) == []
        return found

    def until(self, what: str, holds: Any, seconds: float) -> Object:
        found: Object = wait_for(
            lambda: now if holds(now := self.status()) else None, seconds, lambda: f"{what}: {self.seen[-1:]}"
        )
        return found

    def charged(self, failure: str, seconds: float = 60) -> Object:
        """status.failures[0], once one more restart is counted; it is of this class."""
        counted = self.before["restarts"]["total"]
        now = self.until(
            f"{failure} is charged", lambda now: now.get("restarts", {}).get("total", 0) > counted, seconds
        )
        newest: Object = now["failures"][0]
        assert newest["class"] == failure, newest
        assert now["restarts"]["total"] == counted + 1, "an incident is charged once"
        return newest


@pytest.fixture(scope="module")
def watched(operator: Kube, volumes: Path) -> Iterator[Watched]:
    namespace, name = f"faults-{next(numbers)}", "struck"
    operator.run("create", "namespace", namespace)
    job = sample(
        "tiny-colocated.yaml", name, namespace, trainer__steps=STEPS, checkpoint__everySteps=2, checkpoint__export=False
    )
    job["spec"]["runPolicy"] = {"stallTimeoutSeconds": 300}
    operator.apply(job)
    wait_for_condition(operator, namespace, name, "Running", 240)
    yield Watched(operator, job)
    operator.run("delete", "namespace", namespace, "--wait=false")


def test_a_killed_driver_says_its_signal_and_resumes_in_its_pods_on_the_same_curve(
    watched: Watched, undisturbed: Undisturbed, volumes: Path
) -> None:
    watched.mark()
    uids = {pod["metadata"]["uid"] for pod in pods(watched.kube, watched.namespace, watched.name)}
    watched.strike(How.KILL, Target.DRIVER)
    newest = watched.charged("App")
    assert (newest["exitCode"], newest["signal"]) == (137, 9), newest
    after = watched.until_trained(180)
    assert {pod["metadata"]["uid"] for pod in pods(watched.kube, watched.namespace, watched.name)} == uids, (
        "no pod is new"
    )
    steps = range(1, step_of(after) + 1)
    curve = rewards(volumes, watched.job)
    assert {n: curve[n] for n in steps} == pytest.approx({n: undisturbed.curve[n] for n in steps}, abs=1e-6)


def test_a_hung_engine_is_replaced_and_no_step_is_lost(watched: Watched) -> None:
    watched.mark()
    watched.strike(How.STOP, Target.ENGINE)
    watched.until("EngineRestarting", lambda now: _reason(now, "Degraded") == "EngineRestarting", 30)
    after = watched.until_trained(150)
    assert after["restarts"] == watched.before["restarts"], "an engine is not the run"
    assert after["progress"].get("resumedFromStep") == watched.before["progress"].get("resumedFromStep")


@pytest.mark.parametrize(("target", "failure"), [(Target.GCS, "HeadLost"), (Target.RAYLET, "NodeLost")])
def test_ray_is_killed_and_the_run_resumes_from_its_checkpoint(watched: Watched, target: Target, failure: str) -> None:
    watched.mark()
    watched.strike(How.KILL, target)
    watched.charged(failure, 90)
    watched.until_trained(240)


def test_a_head_that_is_deleted_by_force_while_the_operator_dies(watched: Watched) -> None:
    watched.mark()
    other = threading.Thread(target=watched.strike, args=(How.KILL, Target.OPERATOR))
    other.start()
    watched.strike(How.FORCE, Target.HEAD)
    other.join()
    watched.charged("HeadLost", 90)
    watched.until_trained(240)
    attempts = {pod["metadata"]["uid"] for pod in pods(watched.kube, watched.namespace, watched.name)}
    assert watched.status()["record"]["attempt"]["podUid"] in attempts, (
        "the driver of the new pod has a number of its own"
    )


def test_a_drained_worker_saves_first_and_costs_nothing(watched: Watched) -> None:
    watched.mark()
    watched.strike(How.DRAIN, Target.WORKER)
    newest = watched.charged("Preempted", 150)
    after = watched.until_trained(240)
    assert after["progress"]["resumedFromStep"] >= step_of(watched.before), (
        f"nothing but the running step may be lost: {newest}"
    )
    assert after["record"]["restartsSinceProgress"] == 0, "a preemption is free"


def test_the_struck_job_succeeds_and_leaves_nothing(watched: Watched, volumes: Path) -> None:
    kube, namespace, name = watched.kube, watched.namespace, watched.name
    wait_for_condition(kube, namespace, name, "Complete", 300)
    ended = status(kube, namespace, name)
    assert len(ended["failures"]) == min(5, ended["restarts"]["total"]), "the last five are kept"
    assert ended["startTime"] < ended["completionTime"]
    assert 0 < float(ended["goodput"]) < 1
    curve = rewards(volumes, watched.job)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] > 0.9
    wait_for(lambda: released(kube, namespace, name), 90, "pods and RayCluster gone")
    assert orphans() == []


def _reason(now: Object, kind: str) -> str | None:
    return next((c["reason"] for c in now.get("conditions", []) if c["type"] == kind), None)


def orphans() -> list[str]:
    """Processes of pods that are no more."""
    cfg = settings.from_environment()
    living = {pod["metadata"]["uid"] for pod in Api.from_kubeconfig(cfg.kubeconfig).get("/api/v1/pods")["items"]}
    return [" ".join(process.arguments) for process in left_behind(cfg, living)]


# --- a namespace that is restricted, a claim, a stranger, and another number of GPUs -----------------------------


@pytest.fixture
def restricted(operator: Kube, namespace: str) -> str:
    operator.run("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    return namespace


def test_a_restricted_job_on_a_claim_is_closed_to_strangers_and_resumes_on_two_gpus(
    operator: Kube, restricted: str, volumes: Path
) -> None:
    namespace, name = restricted, "claimed"
    make_model(volumes / "claims" / f"{namespace}-{name}-checkpoints" / "models" / "tiny")
    operator.apply(on_a_claim(name, namespace))
    strange(operator, namespace)
    wait_for_condition(operator, namespace, name, "ClusterReady", 120)  # the run still loads models
    trainer, head = pod_of(operator, namespace, name, "trainer"), pod_of(operator, namespace, name, "head")
    address = (operator.find("pod", head, "-n", namespace) or {})["status"]["podIP"]
    wait_for(lambda: reachable(operator, namespace, trainer, address) == list(PORTS), 60, "the job's own pods")
    assert reachable(operator, namespace, "stranger", address) == []
    wait_for_condition(operator, namespace, name, "Running", 240)
    assert condition(operator, namespace, name, "CheckpointAvailable")["reason"] != "Ephemeral"
    wait_for(lambda: step(operator, namespace, name) >= 2, 120, "two steps")

    patch(operator, namespace, name, '{"spec":{"suspend":true}}')
    wait_for_condition(operator, namespace, name, "Suspended", 120)
    wait_for(lambda: released(operator, namespace, name), 60, "pods and RayCluster gone")
    saved = step(operator, namespace, name)
    assert 2 <= saved < TRAINED
    assert saved_of(status(operator, namespace, name)) == saved, "nothing but the running step may be lost"
    patch(operator, namespace, name, '{"spec":{"suspend":false,"trainer":{"gpus":2},"rollout":{"engines":2}}}')
    wait_for_condition(operator, namespace, name, "Complete", 400)
    ended = status(operator, namespace, name)
    assert (ended["gpus"], ended["progress"]["resumedFromStep"], ended["record"]["clusters"]) == (2, saved, 2)
    assert ended["restarts"]["total"] == 0, "a suspension is no failure"

    operator.run("delete", "rlhfjob", name, "-n", namespace, "--wait")
    assert operator.find("persistentvolumeclaim", f"{name}-checkpoints", "-n", namespace), (
        "onDelete: Keep is the default"
    )


def on_a_claim(name: str, namespace: str) -> Object:
    """The tiny job without a host path, which a restricted namespace refuses; model and prompts lie on the claim."""
    model = {"path": "/checkpoints/models/tiny", "dtype": "float32"}
    job = sample(
        "tiny-colocated.yaml", name, namespace, model=model, trainer__steps=TRAINED, placement__gpusPerNode=2, pods={}
    )
    job["spec"]["data"]["jsonl"]["path"] = "/checkpoints/models/tiny/prompts.jsonl"
    job["spec"]["checkpoint"] = {"path": "/checkpoints", "everySteps": 100, "claim": {"size": "1Gi"}}
    return job


def patch(kube: Kube, namespace: str, name: str, body: str) -> None:
    kube.run("patch", "rlhfjob", name, "-n", namespace, "--type=merge", "-p", body)


PORTS = (6379, 8265, 10001, 8266)
TRY = """import socket, sys
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=2).close()
        print(port)
    except OSError:
        pass
"""


def strange(kube: Kube, namespace: str) -> None:
    """A pod that is of no job."""
    container: Object = {
        "name": "c",
        "image": settings.WORKER_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "600"],
    }
    container["securityContext"] = RESTRICTED["container"]
    spec = {"securityContext": RESTRICTED["securityContext"], "containers": [container]}
    kube.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger", "namespace": namespace}, "spec": spec}
    )
    kube.run("wait", "pod/stranger", "-n", namespace, "--for=condition=Ready", "--timeout=60s")


def reachable(kube: Kube, namespace: str, pod: str, address: str) -> list[int]:
    """The ports of the head to which a connection from the pod comes about."""
    return [
        int(port)
        for port in kube.run("exec", pod, "-n", namespace, "--", "python", "-c", TRY, address, *map(str, PORTS)).split()
    ]
