"""Whole jobs on the embedded cluster: real pods, real Ray, real vLLM, real training. Tiny model, 2 cores."""

from pathlib import Path

import pytest

from hack.kubectl import Kube
from tests.cluster.jobs import Undisturbed, condition, pods, released, rewards, sample, status, wait_for_condition
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_colocated_learns_and_outlives_its_operator(operator: Kube, undisturbed: Undisturbed) -> None:
    job, ended, curve = undisturbed.job, undisturbed.status, undisturbed.curve
    namespace = job["metadata"]["namespace"]
    assert ended["phase"] == "Succeeded"
    assert ended["record"]["clusters"] == 1, "the new operator took over the RayCluster of the old one"
    assert ended["restarts"]["total"] == 0
    assert sorted(curve) == list(range(1, job["spec"]["trainer"]["steps"] + 1))
    assert curve[1] < 0.1
    assert curve[max(curve)] > 0.9
    assert ended["progress"]["sync"]["verifiedVersion"] is not None
    assert ended["progress"]["speed"]["advice"].startswith(ended["progress"]["speed"]["bottleneck"])
    assert condition(operator, namespace, "tiny", "CheckpointAvailable")["status"] == "True"
    assert condition(operator, namespace, "tiny", "WeightsInSync")["status"] == "True"
    wait_for(lambda: released(operator, namespace, "tiny"), 60, "pods and RayCluster gone")
    wait_for_condition(operator, namespace, "tiny", "ResourcesReleased", 30)


def test_separated(operator: Kube, namespace: str, volumes: Path) -> None:
    job = sample("tiny-separated.yaml", "apart", namespace, trainer__steps=12)
    operator.apply(job)
    wait_for_condition(operator, namespace, "apart", "Running", 240)
    roles = sorted(p["metadata"]["labels"]["rlhf.dev/role"] for p in pods(operator, namespace, "apart"))
    assert roles == ["head", "rollout", "trainer"]
    wait_for_condition(operator, namespace, "apart", "Complete", 300)
    ended = status(operator, namespace, "apart")
    assert (ended["mode"], ended["gpus"]) == ("Separated", 2)
    assert ended["progress"]["step"] == job["spec"]["trainer"]["steps"] == max(rewards(volumes, job))


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
        wait_for(
            lambda: (
                operator.find("rlhfjob", "waits", "-n", namespace) or {}
            )["metadata"]["resourceVersion"] != version,
            8, "a write",
        )
