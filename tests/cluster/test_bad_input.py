"""Bad input that only a running job can find: a clear error in the status, nothing retried in vain, nothing left
behind.
"""

from pathlib import Path
from typing import Any

import pytest

from hack.kubectl import Kube
from tests.cluster.conftest import make_model
from tests.cluster.jobs import condition, released, sample, status, wait_for_condition
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

FINAL: list[tuple[str, dict[str, Any], list[str]]] = [
    ("model", {"model": {"path": "/var/lib/rlhf/models/nowhere"}}, ["spec.model.path", "/var/lib/rlhf/models/nowhere"]),
    ("jsonl", {"data__jsonl": {"path": "/var/lib/rlhf/broken.jsonl"}}, ["/var/lib/rlhf/broken.jsonl", "line 3"]),
    (
        "code",
        {"rewards": [{"name": "typo", "type": "python", "code": "def rewrd(prompt, completion, **row):\n    return "
            "1.0\n"}]},
        ["typo", "reward"],
    ),
]


@pytest.mark.parametrize(("name", "changes", "words"), FINAL, ids=[case[0] for case in FINAL])
def test_a_wrong_input_fails_at_once_and_says_which(
    operator: Kube, namespace: str, volumes: Path, name: str, changes: dict[str, Any], words: list[str]
) -> None:
    (volumes / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    operator.apply(sample("tiny-colocated.yaml", name, namespace, **changes))
    failed = wait_for_condition(operator, namespace, name, "Failed", 180)
    assert all(word in failed["message"] for word in words), failed["message"]
    ended = status(operator, namespace, name)
    assert ended["phase"] == "Failed"
    assert ended["failures"][0]["exitCode"] in (64, 65)
    assert all(word in operator.run("describe", "rlhfjob", name, "-n", namespace) for word in words)
    wait_for(lambda: released(operator, namespace, name), 60, "pods and RayCluster gone, no GPU held")


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


def test_a_checkpoint_of_another_model_is_refused(operator: Kube, namespace: str, volumes: Path) -> None:
    directory = f"/var/lib/rlhf/checkpoints/{namespace}-shared"
    first = sample("tiny-colocated.yaml", "first", namespace, trainer__steps=1, checkpoint__path=directory)
    operator.apply(first)
    wait_for_condition(operator, namespace, "first", "Complete", 300)
    other = sample(
        "tiny-colocated.yaml",
        "other",
        namespace,
        checkpoint__path=directory,
        model={**first["spec"]["model"], "path": "/var/lib/rlhf/models/tiny-wide"},
    )
    make_model(volumes / "models" / "tiny-wide", "--hidden-size", "128")
    operator.apply(other)
    failed = wait_for_condition(operator, namespace, "other", "Failed", 300)
    assert directory in failed["message"]
    assert status(operator, namespace, "other")["failures"][0]["exitCode"] == 65
