"""Bad input that only a running job can find: a clear error in the status, nothing retried in vain, nothing left
behind.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hack.kubectl import Kube
from tests.cluster.conftest import make_model, numbers
from tests.cluster.jobs import Undisturbed, condition, released, sample, status, wait_for_condition
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

WIDE = "/var/lib/rlhf/models/tiny-wide"
FINAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "model": ({"model": {"path": "/var/lib/rlhf/models/nowhere"}}, ["spec.model.path", "/var/lib/rlhf/models/nowhere"]),
    "two-things": (
        {"data__jsonl": {"path": "/var/lib/rlhf/broken.jsonl"}, "rewards": [{
            "name": "typo", "type": "python", "code": "def rewrd(prompt, completion, **row):\n    return 1.0\n",
        }]},
        ["2 things are wrong", "/var/lib/rlhf/broken.jsonl", "line 3", "rewards[typo]", "reward"],
    ),
    "checkpoint": (
        {"checkpoint__path": "/var/lib/rlhf/checkpoints/of-another", "model__path": WIDE},
        ["/var/lib/rlhf/checkpoints/of-another"],
    ),
}


@pytest.fixture(scope="module")
def wrong(operator: Kube, undisturbed: Undisturbed, volumes: Path) -> Iterator[str]:
    """The namespace of the jobs of FINAL, and the files that they name."""
    (volumes / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    make_model(volumes / "models" / "tiny-wide", "--hidden-size", "128")
    left = Path(undisturbed.job["spec"]["checkpoint"]["path"]).relative_to("/var/lib/rlhf")
    subprocess.run(["cp", "-a", volumes / left, volumes / "checkpoints" / "of-another"], check=True)  # with its owner
    namespace = f"wrong-{next(numbers)}"
    operator.run("create", "namespace", namespace)
    yield namespace
    operator.run("delete", "namespace", namespace, "--wait=false")


@pytest.mark.parametrize("name", FINAL)
def test_a_wrong_input_fails_at_once_and_says_which(operator: Kube, wrong: str, name: str) -> None:
    changes, words = FINAL[name]
    operator.apply(sample("tiny-colocated.yaml", name, wrong, **changes))
    failed = wait_for_condition(operator, wrong, name, "Failed", 300)
    assert all(word in failed["message"] for word in words), failed["message"]
    ended = status(operator, wrong, name)
    assert ended["phase"] == "Failed"
    assert ended["failures"][0]["exitCode"] in ((65,) if name == "checkpoint" else (64, 65))
    assert all(word in operator.run("describe", "rlhfjob", name, "-n", wrong) for word in words)
    wait_for(lambda: released(operator, wrong, name), 120, "pods and RayCluster gone, no GPU held")


def test_a_reward_that_raises_is_retried_then_ends_the_job_with_its_words(
    operator: Kube, namespace: str, volumes: Path,
) -> None:
    code = "def reward(prompt, completion, **row):\n    raise ValueError('the judge is asleep')\n"
    job = sample(
        "tiny-colocated.yaml",
        "raises",
        namespace,
        runPolicy={"backoffLimit": 0},
        rewards=[{"name": "judge", "type": "python", "code": code, "retries": 1}],
    )
    operator.apply(job)
    failed = wait_for_condition(operator, namespace, "raises", "Failed", 300)
    assert failed["reason"] == "BackoffLimitExceeded" or "judge" in failed["message"]
    assert "the judge is asleep" in failed["message"]
    wait_for(lambda: released(operator, namespace, "raises"), 60, "pods and RayCluster gone")


def test_a_missing_image_is_told_and_ends_at_the_provisioning_deadline(operator: Kube, namespace: str) -> None:
    operator.apply(
        sample(
            "tiny-colocated.yaml", "noimage", namespace, image="no-such-image:ever",
            runPolicy={"provisioningDeadlineSeconds": 40},
        )
    )

    def refused() -> dict[str, str] | None:
        """Asked once: between two tries of the kubelet a pod only waits."""
        ready = condition(operator, namespace, "noimage", "ClusterReady")
        return ready if ready.get("reason") == "ImagePullFailed" else None

    assert "no-such-image:ever" in wait_for(refused, 40, "ImagePullFailed")["message"]
    failed = wait_for_condition(operator, namespace, "noimage", "Failed", 90)
    assert failed["reason"] == "ProvisioningDeadlineExceeded"
    assert "no-such-image:ever" in failed["message"]
    wait_for(lambda: released(operator, namespace, "noimage"), 60, "pods and RayCluster gone")


def test_more_gpus_than_the_node_has_is_told_in_the_schedulers_words(operator: Kube, namespace: str) -> None:
    job = sample(
        "tiny-colocated.yaml", "big", namespace, trainer__gpus=16, rollout__engines=16, placement__gpusPerNode=16,
    )
    operator.apply(job)
    wait_for(
        lambda: condition(operator, namespace, "big", "ClusterReady").get("reason") == "Unschedulable", 60,
        "Unschedulable",
    )
    assert "Insufficient nvidia.com/gpu" in condition(operator, namespace, "big", "ClusterReady")["message"]
    operator.run("delete", "rlhfjob", "big", "-n", namespace, "--wait")
    wait_for(lambda: released(operator, namespace, "big"), 60, "deletion leaves nothing")
