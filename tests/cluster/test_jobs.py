"""Whole jobs on the embedded cluster: real pods, real Ray, real vLLM, real training. Tiny model, 2 cores."""

from pathlib import Path

import pytest

from hack.cluster import settings
from hack.faults import How, Target, inject
from hack.kubectl import OPERATOR_NAMESPACE, Kube
from tests.cluster.conftest import wait_for
from tests.cluster.jobs import condition, pods, released, rewards, sample, status, step, wait_for_condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def curves() -> dict[str, dict[int, float]]:
    """Reward curves by the name of their job, for the test that compares two."""
    return {}


def test_colocated_learns_and_outlives_its_operator(
    operator: Kube, namespace: str, volumes: Path, curves: dict[str, dict[int, float]]
) -> None:
    job = sample("tiny-colocated.yaml", "tiny", namespace)
    operator.apply(job)
    wait_for_condition(operator, namespace, "tiny", "Running", 240)
    wait_for(lambda: step(operator, namespace, "tiny") >= 3, 120, "three steps")
    operator.run("delete", "pod", "-n", OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/name=rlhf-operator", "--force", "--grace-period=0")
    wait_for_condition(operator, namespace, "tiny", "Complete", 300)

    ended = status(operator, namespace, "tiny")
    assert ended["phase"] == "Succeeded"
    assert ended["record"]["clusters"] == 1, "the new operator took over the RayCluster of the old one"
    assert ended["restarts"]["total"] == 0
    curve = curves["tiny"] = rewards(volumes, job)
    assert sorted(curve) == list(range(1, job["spec"]["trainer"]["steps"] + 1))
    assert curve[1] < 0.1
    assert curve[max(curve)] > 0.9
    assert ended["progress"]["sync"]["verifiedVersion"] is not None
    assert condition(operator, namespace, "tiny", "CheckpointAvailable")["status"] == "True"
    assert condition(operator, namespace, "tiny", "WeightsInSync")["status"] == "True"
    wait_for(lambda: released(operator, namespace, "tiny"), 60, "pods and RayCluster gone")
    wait_for_condition(operator, namespace, "tiny", "ResourcesReleased", 30)


def test_a_killed_driver_resumes_from_its_checkpoint_on_the_same_curve(
    operator: Kube, namespace: str, volumes: Path, curves: dict[str, dict[int, float]]
) -> None:
    job = sample("tiny-colocated.yaml", "tiny", namespace, checkpoint__everySteps=3)
    operator.apply(job)
    wait_for_condition(operator, namespace, "tiny", "Running", 240)
    wait_for(lambda: step(operator, namespace, "tiny") >= 5, 120, "five steps")
    workers = {p["metadata"]["uid"] for p in pods(operator, namespace, "tiny")}
    inject(settings.from_environment(), namespace, "tiny", How.KILL, Target.DRIVER)
    wait_for(lambda: status(operator, namespace, "tiny").get("restarts", {}).get("total") == 1, 60, "the restart is counted")
    newest = status(operator, namespace, "tiny")["failures"][0]
    assert (newest["class"], newest["exitCode"], newest["signal"]) == ("App", 137, "SIGKILL")
    resumed = wait_for(lambda: status(operator, namespace, "tiny").get("progress", {}).get("resumedFromStep"), 180, "resumed")
    assert resumed >= 3
    assert {p["metadata"]["uid"] for p in pods(operator, namespace, "tiny")} == workers, "restarted in place: no pod is new"
    wait_for_condition(operator, namespace, "tiny", "Complete", 300)

    curve, undisturbed = rewards(volumes, job), curves["tiny"]
    assert sorted(curve) == sorted(undisturbed)
    assert curve == pytest.approx(undisturbed, abs=1e-6)


def test_separated(operator: Kube, namespace: str, volumes: Path) -> None:
    job = sample("tiny-separated.yaml", "apart", namespace)
    operator.apply(job)
    wait_for_condition(operator, namespace, "apart", "Running", 240)
    roles = sorted(p["metadata"]["labels"]["rlhf.dev/role"] for p in pods(operator, namespace, "apart"))
    assert roles == ["head", "rollout", "trainer"]
    wait_for_condition(operator, namespace, "apart", "Complete", 300)
    ended = status(operator, namespace, "apart")
    assert (ended["mode"], ended["gpus"]) == ("Separated", 2)
    assert ended["progress"]["step"] == job["spec"]["trainer"]["steps"] == max(rewards(volumes, job))


def test_suspend_releases_every_pod_and_resume_goes_on(operator: Kube, namespace: str, volumes: Path) -> None:
    job = sample("tiny-colocated.yaml", "nap", namespace, trainer__steps=12, checkpoint__everySteps=100)
    operator.apply(job)
    wait_for_condition(operator, namespace, "nap", "Running", 240)
    wait_for(lambda: step(operator, namespace, "nap") >= 2, 120, "two steps")
    operator.run("patch", "rlhfjob", "nap", "-n", namespace, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    wait_for_condition(operator, namespace, "nap", "Suspended", 120)
    wait_for(lambda: released(operator, namespace, "nap"), 60, "pods and RayCluster gone")
    saved = step(operator, namespace, "nap")
    assert 2 <= saved < 12
    assert status(operator, namespace, "nap")["progress"]["checkpoint"]["step"] == saved, "nothing but the running step may be lost"

    operator.run("patch", "rlhfjob", "nap", "-n", namespace, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    wait_for_condition(operator, namespace, "nap", "Complete", 300)
    ended = status(operator, namespace, "nap")
    assert ended["progress"]["resumedFromStep"] == saved
    assert ended["record"]["clusters"] == 2
    assert ended["restarts"]["total"] == 0, "a suspension is no failure"
    assert sorted(rewards(volumes, job)) == list(range(1, 13))


def test_nothing_is_written_while_nothing_changes(operator: Kube, namespace: str) -> None:
    """A job that waits for its queue changes nothing, and the operator, woken by another writer, writes nothing."""
    job = sample("tiny-colocated.yaml", "waits", namespace, queue={"name": "no-such-queue"})
    operator.apply(job)
    refused = wait_for_condition(operator, namespace, "waits", "Accepted", 30, value="False")
    assert refused["reason"] == "MissingReference"
    assert "no-such-queue" in refused["message"]
    before = operator.find("rlhfjob", "waits", "-n", namespace) or {}
    operator.run("annotate", "rlhfjob", "waits", "-n", namespace, "test/wake=1")
    annotated = operator.find("rlhfjob", "waits", "-n", namespace) or {}
    assert annotated["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]
    version = annotated["metadata"]["resourceVersion"]
    with pytest.raises(pytest.fail.Exception, match="a write"):
        wait_for(lambda: (operator.find("rlhfjob", "waits", "-n", namespace) or {})["metadata"]["resourceVersion"] != version, 8, "a write")
