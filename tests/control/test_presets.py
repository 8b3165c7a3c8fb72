"""What a job inherits from its platform, and what of it is the job's own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_operator.decide import Want
from rlhf_operator.kinds import JOBS
from rlhf_operator.names import EDITION_ANNOTATION
from rlhf_operator.observed import read_job
from rlhf_operator.plan import plan
from rlhf_operator.presets import InvalidPresets, Presets
from rlhf_operator.settings import read_presets
from rlhf_operator.store import Store
from tests.api.specs import a_job
from tests.control.world import World

Raw = dict[str, Any]
CACHE = {"name": "cache", "hostPath": {"path": "/cache"}}
POD: Raw = {
    "env": [{"name": "HF_HOME", "value": "/cache"}, {"name": "PROXY", "value": "http://p"}],
    "volumes": [CACHE], "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"pool": "rl", "zone": "a"},
    "resources": {"limits": {"memory": "64Gi"}},
}
PLATFORM = Presets("registry/worker:1", {"head": {"env": POD["env"]}, "trainer": POD, "rollout": POD})


def job(**changes: Any) -> Raw:
    raw = a_job(**changes)
    raw["metadata"] |= {"namespace": "default", "uid": "the-uid"}
    return raw


def worker(raw: Raw, presets: Presets = PLATFORM) -> Raw:
    """The PodSpec of the trainer's pods."""
    (cluster,) = [o for o in plan(read_job(raw, presets), Want(cluster=1), "home").create if o["kind"] == "RayCluster"]
    spec: Raw = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    return spec


def test_a_job_without_an_image_and_without_pods_has_the_platform_s() -> None:
    spec = worker(job(image=None))
    (ray,) = spec["containers"]
    assert ray["image"] == "registry/worker:1"
    assert {one["name"]: one.get("value") for one in ray["env"]}["HF_HOME"] == "/cache"
    assert CACHE in spec["volumes"] and {"name": "cache", "mountPath": "/cache"} in ray["volumeMounts"]
    assert (spec["tolerations"], spec["nodeSelector"]) == (POD["tolerations"], POD["nodeSelector"])
    assert ray["resources"]["limits"]["memory"] == "64Gi"


def test_the_job_s_own_comes_before_the_platform_s() -> None:
    own = {
        "env": [{"name": "HF_HOME", "value": "/mine"}], "tolerations": [{"key": "team", "operator": "Exists"}],
        "nodeSelector": {"zone": "b"}, "resources": {"limits": {"memory": "8Gi", "cpu": "4"}},
    }
    spec = worker(job(image="mine:2", pods={"trainer": own}))
    (ray,) = spec["containers"]
    env = {one["name"]: one.get("value") for one in ray["env"]}
    assert (ray["image"], env["HF_HOME"], env["PROXY"]) == ("mine:2", "/mine", "http://p")
    assert spec["tolerations"] == [*POD["tolerations"], *own["tolerations"]]
    assert spec["nodeSelector"] == {"pool": "rl", "zone": "b"}
    assert {"memory": "8Gi", "cpu": "4"}.items() <= ray["resources"]["limits"].items()


def test_pods_of_engines_are_for_jobs_that_have_such_pods() -> None:
    assert read_job(job(), PLATFORM).problems == ()
    separated = read_job(job(placement__mode="Separated"), PLATFORM)
    assert separated.parsed is not None and separated.parsed.spec.pods.rollout.env


def test_without_an_image_anywhere_the_job_is_told_so() -> None:
    assert read_job(job(image=None)).problems == (
        "spec.image: set it: this operator has no image for jobs without one (jobs.image of its chart)",
    )
    assert read_job(job(image=None), PLATFORM).problems == ()


def test_other_presets_make_no_job_another_one() -> None:
    """A RayCluster that runs is not made anew for them."""
    before, after = read_job(job()), read_job(job(), PLATFORM)
    assert before.edition == after.edition != ""
    (cluster,) = [o for o in plan(after, Want(cluster=1), "home").create if o["kind"] == "RayCluster"]
    assert cluster["metadata"]["annotations"][EDITION_ANNOTATION] == before.edition


def begun(presets: Presets) -> World:
    """A job without an image, whose pods are up, under an operator that started with these."""
    world = World(image=None)
    world.api.presets = presets
    world.api.restart()
    world.settle()
    world.up()
    world.settle()
    return world


def test_a_job_without_an_image_lives_in_one_cluster_also_when_the_platform_has_another() -> None:
    w = begun(PLATFORM)
    assert (w.status["phase"], w.clusters()) == ("Starting", ["sample-1"])
    w.api.presets = Presets("registry/worker:2", {"trainer": {"nodeSelector": {"pool": "other"}}})
    w.api.restart()
    w.settle()
    w.report(step=3)
    w.settle()
    assert (w.status["phase"], w.clusters(), w.status["restarts"]["total"]) == ("Running", ["sample-1"], 0)


def test_a_running_job_whose_platform_has_no_image_any_more_goes_on() -> None:
    w = begun(PLATFORM)
    w.api.presets = Presets()
    w.api.restart()
    w.settle()
    w.report(step=3)
    w.settle()
    assert (w.status["phase"], w.clusters()) == ("Running", ["sample-1"])


def test_what_a_preset_breaks_is_a_problem_of_the_job_that_inherits_it() -> None:
    wrong = Presets(None, {"trainer": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}})
    (problem,) = read_job(job(), wrong).problems
    assert problem.startswith("spec.pods.trainer.resources: remove nvidia.com/gpu")


@pytest.mark.parametrize("spec", [None, [], {"pods": []}, {"pods": {"trainer": "x"}}, {"placement": 3},
    {"pods": {"trainer": {"env": ["x"], "volumes": {}}}}])  # fmt: skip
def test_a_spec_that_is_none_is_left_to_the_schema(spec: Any) -> None:
    assert read_job({**job(), "spec": spec}, PLATFORM).parsed is None


def test_the_store_reads_jobs_with_them() -> None:
    store, raw = Store(presets=PLATFORM), job(image=None)
    raw["metadata"]["resourceVersion"] = "1"
    store.put(JOBS, raw)
    found = store.job(("default", raw["metadata"]["name"]))
    assert found is not None and found.parsed is not None and found.parsed.spec.image == "registry/worker:1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image: ''", "image: String should have at least 1"),
        ("images: x", "images: Extra inputs"),
        ("pods: {workers: {}}", "pods.workers: Extra inputs"),
        ("pods: {trainer: {env: 3}}", "pods.trainer.env"),
        ("pods: {trainer: {tolerations: {}}}", "spec.pods.trainer"),
        ("pods: {driver: {resources: {limits: {cpu: [1]}}}}", "spec.pods.driver.resources"),
        ("- a", "the file"),
        ("{", "not YAML"),
    ],
)
def test_presets_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "presets.yaml").write_text(text)
    with pytest.raises(InvalidPresets) as caught:
        read_presets(tmp_path / "presets.yaml")
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_file_that_is_not_there_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidPresets, match="No such file"):
        read_presets(tmp_path / "presets.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert not read_presets(None) and not read_presets(tmp_path / "empty.yaml")


def test_the_operator_does_not_start_with_them(tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text("images: x")
    command = [sys.executable, "-m", "rlhf_operator", "--presets", str(tmp_path / "presets.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "presets.yaml: images: Extra inputs are not permitted" in done.stderr) == (2, True)
