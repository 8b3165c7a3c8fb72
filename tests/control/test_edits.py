"""What an edit of the spec does to the RayCluster that there is."""

from typing import Any

import pytest
import yaml

from rlhf_api.job import RLHFJobSpec
from rlhf_operator.edition import edition
from rlhf_operator.kinds import CONFIG_MAPS, RAYCLUSTERS
from rlhf_operator.names import EDITION_ANNOTATION
from tests.api.specs import a_job
from tests.control.world import World, running

TWO_GPUS: dict[str, Any] = {"trainer": {"steps": 10, "gpus": 2}, "rollout": {"engines": 2}}


def resume_with(w: World, **spec: Any) -> None:
    """Edit, resume, and let the pods come and the run go on."""
    w.edit(suspend=False, **spec)
    w.settle()
    w.reap()
    w.settle()
    w.up()
    w.settle()


def is_made_anew(w: World, gpus: int) -> None:
    assert (w.clusters(), w.status["gpus"], w.status["restarts"]["total"]) == (["sample-2"], gpus, 0)
    assert w.status["phase"] == "Starting"


def test_an_edit_counts_though_the_job_resumes_before_its_old_cluster_is_gone() -> None:
    w = running()
    w.edit(suspend=True)
    w.settle()
    w.report("Draining", step=3)
    w.settle()
    assert (w.status["phase"], w.clusters()) == ("Suspending", ["sample-1"])
    resume_with(w, **TWO_GPUS)
    is_made_anew(w, gpus=2)


def test_an_edit_counts_though_nobody_saw_the_job_suspended() -> None:
    w = running()
    resume_with(w, **TWO_GPUS)
    is_made_anew(w, gpus=2)


def test_the_driver_of_the_next_cluster_reads_the_edit() -> None:
    w = running()
    resume_with(w, trainer={"steps": 77})
    (config,) = w.api.of(CONFIG_MAPS)
    assert yaml.safe_load(next(iter(config["data"].values())))["trainer"]["steps"] == 77


def test_a_resume_without_an_edit_keeps_the_cluster_that_is_still_there() -> None:
    w = running()
    w.edit(suspend=True)
    w.settle()
    w.edit(suspend=False)
    w.settle()
    assert (w.status["phase"], w.clusters()) == ("Running", ["sample-1"])


@pytest.mark.parametrize(
    "spec",
    [
        {"runPolicy": {"backoffLimit": 7}},
        {"pods": {"trainer": {"nodeSelector": {"pool": "b"}}}},
        {"networkPolicy": {"enabled": False}},
        {"checkpoint": {"path": "s3://bucket/run", "ephemeral": True}},
        {"placement": {"mode": "Colocated"}},  # the default, now said
        {"surprise": 1},
    ],
)
def test_what_may_change_at_any_time_takes_no_pods_from_a_run(spec: dict[str, Any]) -> None:
    w = running()
    w.edit(**spec)
    w.settle()
    assert (w.status["phase"], w.clusters()) == ("Running", ["sample-1"])


@pytest.mark.parametrize("spec", [{"trainer": {"gpus": "many"}}, {"trainer": {"steps": 10, "gpus": 3}}])
def test_a_spec_that_cannot_be_right_takes_no_pods_from_a_run(spec: dict[str, Any]) -> None:
    w = running()
    w.edit(**spec)
    w.settle()
    assert w.clusters() == ["sample-1"]


def test_a_cluster_of_which_nobody_wrote_its_edition_down_stays() -> None:
    w = running()
    (cluster,) = w.api.of(RAYCLUSTERS)
    del cluster["metadata"]["annotations"][EDITION_ANNOTATION]
    w.edit(**TWO_GPUS)
    w.settle()
    assert w.clusters() == ["sample-1"]


@pytest.mark.parametrize("spec", [{"suspend": True}, TWO_GPUS])
def test_a_driver_that_succeeded_needs_no_other_cluster(spec: dict[str, Any]) -> None:
    w = running()
    w.driver_ends(0)
    w.edit(**spec)
    w.settle()
    assert (w.status["phase"], w.record["result"]) == ("Succeeded", "Complete")


def test_an_edit_that_would_lose_the_checkpoints_waits_until_that_is_meant() -> None:
    w = running(checkpoint={"path": "/checkpoints"})
    w.edit(**TWO_GPUS)
    w.settle()
    assert (w.status["phase"], w.clusters()) == ("Running", ["sample-1"])
    assert w.condition("Suspended") == ("False", "WouldLoseCheckpoint")
    resume_with(w, checkpoint={"path": "/checkpoints", "ephemeral": True})
    is_made_anew(w, gpus=2)


def test_a_volume_in_the_spec_keeps_nothing_for_pods_that_were_made_without_it() -> None:
    volume = {"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}
    mount = {"volumes": [volume], "volumeMounts": [{"name": "disk", "mountPath": "/checkpoints"}]}
    w = running(checkpoint={"path": "/checkpoints"})
    w.edit(pods={"trainer": mount, "driver": mount}, suspend=True)
    w.settle()
    assert (w.status["phase"], w.clusters()) == ("Running", ["sample-1"])
    assert w.condition("CheckpointAvailable") == ("False", "Ephemeral")


def test_an_edition_stays_what_it_is_from_version_to_version() -> None:
    """Another number here would restart every running job at an upgrade of the operator."""
    assert edition(RLHFJobSpec.model_validate(a_job(**TWO_GPUS)["spec"])) == "0c7ae8e7c4493416"
