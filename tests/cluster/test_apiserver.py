"""The contract on a real API server: schema, CEL, defaults, columns, and what a driver's ServiceAccount may do."""

from typing import Any

import pytest

from hack.kubectl import Kube, Refused
from rlhf_api.progress import DRIVER_FIELD_MANAGER
from tests.api.specs import BROKEN, FREE, FROZEN, HELD, LIVING, a_job, edited, rule

pytestmark = pytest.mark.cluster


def put(kube: Kube, namespace: str, job: dict[str, Any], *options: str) -> None:
    body = {**job, "metadata": {**job["metadata"], "namespace": namespace}}
    kube.apply(body, *options)


@pytest.mark.parametrize(("part", "raw"), BROKEN, ids=[part.strip("<=> ") for part, _ in BROKEN])
def test_a_broken_rule_is_refused_at_apply_with_the_fix(
    operator: Kube, namespace: str, part: str, raw: dict[str, Any],
) -> None:
    with pytest.raises(Refused) as refused:
        put(operator, namespace, raw, "--dry-run=server")
    assert rule(part).message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer__stepps": 3}, 'unknown field "spec.trainer.stepps"'),
        ({"algorithm__name": "grpoo"}, 'spec.algorithm.name: Unsupported value: "grpoo"'),
        ({"placement__mode": "colocated"}, "spec.placement.mode: Unsupported value"),
        ({"trainer__steps": 0}, "spec.trainer.steps"),
        ({"trainer__learningRate": 1.5}, "spec.trainer.learningRate"),
        ({"model": None}, "spec.model: Required value"),
        ({"rollout__samplesPerPrompt": 0}, "spec.rollout.samplesPerPrompt"),
        ({"checkpoint__path": "relative"}, "spec.checkpoint.path"),
        ({"queue": {"name": "team-a/b"}}, "spec.queue.name"),
        ({"checkpoint__claim": {"size": "0Gi"}}, "spec.checkpoint.claim.size"),
        (
            {"checkpoint__claim": {"size": "1Gi", "storageClassName": "fast disk"}},
            "spec.checkpoint.claim.storageClassName",
        ),
    ],
)
def test_the_schema_names_the_field(operator: Kube, namespace: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as refused:
        put(operator, namespace, a_job(**changes), "--dry-run=server")
    assert words in str(refused.value)


@pytest.mark.parametrize(("field", "value"), FROZEN, ids=[field for field, _ in FROZEN])
def test_what_a_run_is_made_of_never_changes(operator: Kube, namespace: str, field: str, value: Any) -> None:
    put(operator, namespace, a_job(**LIVING, suspend=True))
    with pytest.raises(Refused) as refused:
        put(operator, namespace, edited(field, value, suspend=True), "--dry-run=server")
    assert f"{field} can never change" in str(
        refused.value
    ) or "rewards keep their names and types" in str(refused.value)


@pytest.mark.parametrize(("field", "value"), HELD, ids=[field for field, _ in HELD])
def test_what_changes_only_while_the_job_is_suspended(operator: Kube, namespace: str, field: str, value: Any) -> None:
    put(operator, namespace, a_job(**LIVING, suspend=True))
    put(operator, namespace, edited(field, value), "--dry-run=server")
    put(operator, namespace, a_job(**LIVING, image="no-such-image:ever", imagePullPolicy="Never"))
    with pytest.raises(Refused) as refused:
        put(operator, namespace, edited(field, value), "--dry-run=server")
    assert f"{field} can change only while the job is suspended" in str(refused.value)


@pytest.mark.parametrize(("field", "value"), FREE, ids=[field for field, _ in FREE])
def test_what_changes_at_any_time(operator: Kube, namespace: str, field: str, value: Any) -> None:
    put(operator, namespace, a_job(**LIVING, image="no-such-image:ever", imagePullPolicy="Never"))
    put(
        operator, namespace, edited(field, value, image="no-such-image:ever", imagePullPolicy="Never"),
        "--dry-run=server",
    )


def test_defaults_are_visible_and_overrides_keep_unknown_fields(operator: Kube, namespace: str) -> None:
    put(
        operator, namespace,
        a_job(suspend=True, pods={"trainer": {"nodeSelector": {"pool": "a"}, "tolerations": [{"operator": "Exists"}]}})
    )
    spec = (operator.find("rlhf", "sample", "-n", namespace) or {})["spec"]
    assert spec["placement"] == {
        "mode": "Colocated",
        "gpusPerNode": 8,
        "resourceName": "nvidia.com/gpu",
        "fractions": {"trainer": 0.9, "rollout": 0.78},
    }
    assert spec["runPolicy"]["cleanup"] == {"onSuccess": "Delete", "onFailure": "Delete"}
    assert spec["pods"]["trainer"]["nodeSelector"] == {"pool": "a"}
    assert "reasoningGym" not in spec["data"]
    assert "queue" not in spec


def test_columns(operator: Kube, namespace: str) -> None:
    put(operator, namespace, a_job(suspend=True))
    narrow = operator.run("get", "rlhfjobs", "-n", namespace).splitlines()[0].split()
    assert narrow == ["NAME", "PHASE", "REASON", "STEP", "REWARD", "TOK/S", "ETA", "RESTARTS", "GPUS", "AGE"]
    wide = operator.run("get", "rlhf", "-n", namespace, "-o", "wide").splitlines()[0].split()
    assert wide[len(narrow) :] == ["QUEUE", "CLUSTER", "CHECKPOINT", "MODE", "GOODPUT"]
    assert "rlhfjob.rlhf.dev/sample" in operator.run("get", "all", "-n", namespace, "-o", "name")


def progress_of(name: str, **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "RLHFJob",
        "metadata": {"name": name},
        "status": status or {"progress": {"step": 3, "display": "3/10"}},
    }


def apply_as_driver(kube: Kube, namespace: str, driver_of: str, body: dict[str, Any], *options: str) -> None:
    user = f"system:serviceaccount:{namespace}:{driver_of}-driver"
    kube.apply(
        body,
        "-n",
        namespace,
        "--server-side",
        "--subresource=status",
        f"--field-manager={DRIVER_FIELD_MANAGER}",
        f"--as={user}",
        "--as-group=system:serviceaccounts",
        *options,
    )


@pytest.fixture
def two_jobs(operator: Kube, namespace: str) -> str:
    """Two jobs whose driver accounts and roles the operator has made; their pods need an image that is not there."""
    for name in ("one", "two"):
        put(operator, namespace, a_job(name, image="no-such-image:ever"))
        operator.run("wait", f"rlhfjob/{name}", "-n", namespace, "--for=create", "--timeout=30s")
        operator.run("wait", f"rolebinding/{name}-driver", "-n", namespace, "--for=create", "--timeout=60s")
    return namespace


def test_a_driver_may_write_its_own_progress_and_nothing_else(operator: Kube, two_jobs: str) -> None:
    apply_as_driver(operator, two_jobs, "one", progress_of("one"))
    job = operator.find("rlhfjob", "one", "-n", two_jobs) or {}
    assert job["status"]["progress"]["step"] == 3
    assert job["status"]["phase"], "the operator's own fields stay"
    with pytest.raises(Refused, match="forbidden"):
        apply_as_driver(operator, two_jobs, "one", progress_of("two"))
    with pytest.raises(Refused, match=r"(?i)conflict"):
        apply_as_driver(operator, two_jobs, "one", progress_of("one", phase="Succeeded"))
    with pytest.raises(Refused, match="progress"):
        apply_as_driver(operator, two_jobs, "one", progress_of("one", phase="Succeeded"), "--force-conflicts")
    with pytest.raises(Refused, match=r"(?i)forbidden"):
        operator.run("get", "secrets", "-n", two_jobs, f"--as=system:serviceaccount:{two_jobs}:one-driver")
