"""What spec.pods may not say: field and fix, each."""

from typing import Any

import pytest

from rlhf_api.job import RLHFJob, RLHFJobSpec
from rlhf_api.overrides import ephemeral, override_problems
from tests.api.specs import a_job

DATA = {"volumes": [{"name": "data", "emptyDir": {}}], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}
TWO_PODS = {"trainer__gpus": 2, "rollout__engines": 2, "placement__gpusPerNode": 1}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"pods": {"trainer": {"containers": []}}}, "spec.pods.trainer.containers: remove it"),
    ({"pods": {"head": {"restartPolicy": "Never"}}}, "spec.pods.head.restartPolicy: remove it"),
    ({"pods": {"head": {"serviceAccountName": "mine"}}}, "spec.pods.head.serviceAccountName: remove it"),
    ({"pods": {"head": {"shareProcessNamespace": False}}}, "spec.pods.head.shareProcessNamespace: remove it"),
    ({"pods": {"trainer": {"volumes": [{"name": "rlhf-shm"}]}}}, "spec.pods.trainer.volumes: rename rlhf-shm"),
    ({"pods": {"head": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}}}, "no volume named 'data' in spec.pods.head.volumes"),
    ({"pods": {"head": {"volumes": [{"name": "d"}], "volumeMounts": [{"name": "d", "mountPath": "/tmp/ray/"}]}}}, "remove /tmp/ray/"),
    ({"pods": {"head": {"env": [{"name": "RAY_ADDRESS", "value": "x"}]}}}, "spec.pods.head.env: remove RAY_ADDRESS"),
    ({"pods": {"trainer": {"env": [{"name": "RLHF_JOB_NAME", "value": "x"}]}}}, "spec.pods.trainer.env: remove RLHF_JOB_NAME"),
    ({"pods": {"trainer": {"labels": {"ray.io/cluster": "x"}}}}, "spec.pods.trainer.labels: remove ray.io/cluster"),
    ({"pods": {"trainer": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}}, "spec.pods.trainer.resources: remove nvidia.com/gpu"),
    ({"pods": {"rollout": DATA}}, "spec.pods.rollout: remove it: when Colocated"),
    (TWO_PODS, "spec.pods.trainer.volumes: 2 trainer pods save into /checkpoints"),
    ({**TWO_PODS, "pods": {"trainer": DATA}}, "spec.pods.trainer.volumes: 2 trainer pods"),
]
GOOD: list[dict[str, Any]] = [
    {},
    {"pods": {"head": DATA, "trainer": {**DATA, "tolerations": [{"operator": "Exists"}], "serviceAccountName": "reader"}}},
    {"pods": {"trainer": {"volumes": [{"name": "s"}], "volumeMounts": [{"name": "s", "mountPath": "/dev/shm"}]}}},
    {"pods": {"rollout": {}}},
    {**TWO_PODS, "checkpoint__path": "/data/run", "pods": {"trainer": DATA}},
    {**TWO_PODS, "checkpoint__path": "s3://bucket/run"},
]


def spec(**changes: Any) -> RLHFJobSpec:
    return RLHFJob.model_validate(a_job(**changes)).spec


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_an_override_that_would_break_the_run_is_refused(changes: dict[str, Any], words: str) -> None:
    (problem,) = override_problems(spec(**changes))
    assert words in problem


@pytest.mark.parametrize("changes", GOOD)
def test_every_other_override_is_taken(changes: dict[str, Any]) -> None:
    assert override_problems(spec(**changes)) == ()


def on(source: dict[str, Any], path: str = "/checkpoints") -> dict[str, Any]:
    mounts = [{"name": "data", "mountPath": "/"}, {"name": "saved", "mountPath": path}]
    return {"pods": {"trainer": {"volumes": [{"name": "data", "nfs": {}}, {"name": "saved", **source}], "volumeMounts": mounts}}}


CLAIM = {"persistentVolumeClaim": {"claimName": "c"}}
PLACES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"checkpoint__path": "s3://bucket/run"}, False),
    ({"checkpoint__claim": {"size": "1Gi"}}, False),
    (on(CLAIM), False),
    (on({"hostPath": {"path": "/srv"}}, "/checkpoints/"), False),
    ({**on(CLAIM), "checkpoint__path": "file:///checkpoints/run"}, False),
    ({**on(CLAIM, "/elsewhere"), "pods": {"trainer": {}}}, True),
    ({**on(CLAIM), "checkpoint__path": "/checkpoints/../other", "pods__trainer__volumeMounts": [{"name": "saved", "mountPath": "/checkpoints"}]}, True),
    (on({}), True),
    (on({"emptyDir": {}}), True),
    (on({"ephemeral": {"volumeClaimTemplate": {}}}), True),
    (on({"configMap": {"name": "c"}}), True),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "dies"), PLACES, ids=str)
def test_checkpoints_that_die_with_the_trainers_pod(changes: dict[str, Any], dies: bool) -> None:
    assert ephemeral(spec(**changes)) is dies
