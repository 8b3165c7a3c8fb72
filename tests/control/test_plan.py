"""Objects from jobs: golden files of the samples, and the facts that must hold in each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_api.run import RunConfig
from rlhf_operator.decide import Want
from rlhf_operator.observed import read_job
from rlhf_operator.plan import plan
from rlhf_operator.plan.merge import deep_merge, merge_named
from tests.api.specs import a_job
from tests.control.golden import check

Raw = dict[str, Any]
SAMPLES = sorted((Path(__file__).parents[2] / "manifests" / "samples").glob("*.yaml"))
SEPARATED: dict[str, Any] = {"placement__mode": "Separated", "rollout__engines": 2, "trainer__gpus": 2, "placement__gpusPerNode": 2}


class Plain(yaml.SafeDumper):
    """Without aliases, and with texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


Plain.add_representer(str, Plain.represent_str)


def planned(raw: Raw, number: int = 1) -> dict[str, Raw]:
    raw["metadata"] = {"namespace": "default", "uid": "the-uid", **raw["metadata"]}
    found = plan(read_job(raw), Want(cluster=number), "rlhf-system")
    return {o["kind"]: o for o in (*found.ensure, *found.create)}


def pods_of(cluster: Raw) -> dict[str, Raw]:
    groups = {g["groupName"]: g["template"]["spec"] for g in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"]["template"]["spec"], **groups}


@pytest.mark.parametrize("sample", SAMPLES, ids=[s.stem for s in SAMPLES])
def test_a_sample_is_planned_as_before(sample: Path) -> None:
    (raw,) = [d for d in yaml.safe_load_all(sample.read_text()) if d]
    objects = planned(raw)
    check(f"plans/{sample.stem}.yaml", "---\n".join(yaml.dump(o, Dumper=Plain, sort_keys=False, width=160) for o in objects.values()))


def test_everything_is_owned_and_labelled() -> None:
    for made in planned(a_job()).values():
        (owner,) = made["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("the-uid", True, False)
        assert made["metadata"]["labels"]["rlhf.dev/job"] == "sample"


def test_groups_and_gpus_when_separated() -> None:
    groups = planned(a_job(**SEPARATED))["RayCluster"]["spec"]["workerGroupSpecs"]
    assert [g["groupName"] for g in groups] == ["trainer", "rollout"]
    for group in groups:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 1
        ray = group["template"]["spec"]["containers"][0]
        assert ray["resources"]["limits"] == {"nvidia.com/gpu": "2"} == ray["resources"]["requests"]
        assert group["rayStartParams"]["num-gpus"] == "2"
        assert yaml.safe_load(group["rayStartParams"]["resources"].strip("'")) == {f"rlhf-{group['groupName']}": 2}


def test_roles_with_gpus_of_their_own_are_counted_into_the_trainers_pods() -> None:
    model = {"name": "rm", "type": "model", "model": {"path": "/rm"}, "gpus": 1}
    changes = {**SEPARATED, "algorithm__name": "ppo", "critic": {"gpus": 1}, "rewards": [model], "checkpoint__path": "s3://bucket/run"}
    groups = planned(a_job(**changes))["RayCluster"]["spec"]["workerGroupSpecs"]
    assert [(g["groupName"], g["replicas"], g["rayStartParams"]["num-gpus"]) for g in groups] == [("trainer", 2, "2"), ("rollout", 1, "2")]
    assert yaml.safe_load(groups[0]["rayStartParams"]["resources"].strip("'")) == {"rlhf-trainer": 2}


def test_the_head_has_ray_first_then_the_driver_and_no_gpu() -> None:
    cluster = planned(a_job())["RayCluster"]
    head = pods_of(cluster)["head"]
    assert [c["name"] for c in head["containers"]] == ["ray", "driver"]
    assert head["shareProcessNamespace"] is True
    assert head["restartPolicy"] == "OnFailure"
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert "limits" not in head["containers"][0]["resources"]
    for container in head["containers"]:
        assert {"/tmp/ray", "/dev/shm"} <= {m["mountPath"] for m in container["volumeMounts"]}


def test_every_container_has_the_token_of_its_own_cluster() -> None:
    for pod in pods_of(planned(a_job(), number=3)["RayCluster"]).values():
        for container in pod["containers"]:
            env = {e["name"]: e for e in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "sample-3"


def test_the_driver_is_told_who_it_is_and_not_where_ray_is() -> None:
    env = {e["name"]: e.get("value") for e in pods_of(planned(a_job())["RayCluster"])["head"]["containers"][1]["env"]}
    assert (env["RLHF_JOB_NAME"], env["RLHF_JOB_NAMESPACE"]) == ("sample", "default")
    assert "RAY_ADDRESS" not in env


def test_the_driver_may_touch_its_own_job_only() -> None:
    rules = planned(a_job())["Role"]["rules"]
    assert [(r["resources"], r["verbs"], r["resourceNames"]) for r in rules] == [
        (["rlhfjobs"], ["get"], ["sample"]), (["rlhfjobs/status"], ["patch"], ["sample"]),
    ]  # fmt: skip


def test_workers_have_no_token_of_the_api_server() -> None:
    assert pods_of(planned(a_job())["RayCluster"])["trainer"]["automountServiceAccountToken"] is False


def test_the_run_config_is_read_back_as_it_was_resolved() -> None:
    text = planned(a_job())["ConfigMap"]["data"]["run.yaml"]
    read = RunConfig.model_validate(yaml.safe_load(text))
    assert (read.job.name, read.job.uid, read.trainer.steps) == ("sample", "the-uid", 10)


def test_a_queue_is_a_label_and_the_cluster_waits_for_it() -> None:
    cluster = planned(a_job(queue={"name": "team-a"}))["RayCluster"]
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert cluster["spec"]["suspend"] is True


def test_checkpoints_lie_where_the_user_mounts_or_in_the_pod() -> None:
    own = pods_of(planned(a_job())["RayCluster"])["trainer"]
    assert {"name": "rlhf-checkpoints", "mountPath": "/checkpoints"} in own["containers"][0]["volumeMounts"]
    data = {"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "c"}}], "volumeMounts": [{"name": "data", "mountPath": "/checkpoints"}]}
    theirs = pods_of(planned(a_job(pods={"trainer": data}))["RayCluster"])["trainer"]
    assert theirs["volumes"] == data["volumes"]
    remote = pods_of(planned(a_job(checkpoint__path="s3://bucket/run"))["RayCluster"])["trainer"]
    assert "rlhf-checkpoints" not in str(remote)


def test_overrides_are_merged_by_name_and_unknown_fields_pass() -> None:
    user = {
        "labels": {"team": "a"}, "annotations": {"note": "b"}, "nodeSelector": {"gpu": "h200"}, "terminationGracePeriodSeconds": 600,
        "env": [{"name": "HF_HOME", "value": "/hf"}, {"name": "PYTHONUNBUFFERED", "value": "0"}],
        "envFrom": [{"secretRef": {"name": "wandb"}}], "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "64Gi"}},
        "volumes": [{"name": "hf", "emptyDir": {}}], "volumeMounts": [{"name": "hf", "mountPath": "/hf"}],
    }  # fmt: skip
    cluster = planned(a_job(pods={"head": user}))["RayCluster"]
    template, head = cluster["spec"]["headGroupSpec"]["template"], pods_of(cluster)["head"]
    assert template["metadata"] == {"labels": {"team": "a", "rlhf.dev/job": "sample", "rlhf.dev/role": "head"}, "annotations": {"note": "b"}}
    assert (head["nodeSelector"], head["terminationGracePeriodSeconds"]) == ({"gpu": "h200"}, 600)
    assert head["containers"][0]["resources"] == {"requests": {"cpu": "8", "memory": "1Gi"}, "limits": {"memory": "64Gi"}}
    for container in head["containers"]:
        env = {e["name"]: e.get("value") for e in container["env"]}
        assert (env["HF_HOME"], env["PYTHONUNBUFFERED"]) == ("/hf", "0")
        assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
        assert "/hf" in {m["mountPath"] for m in container["volumeMounts"]}
    assert [v["name"] for v in head["volumes"]] == ["rlhf-ray", "rlhf-shm", "rlhf-run", "hf"]


@pytest.mark.parametrize(("cpu", "told"), [(None, "4"), ("8", "8"), (3, "3"), ("2500m", "2"), ("100m", "1"), (1.5, "1")])
def test_rays_cpus_are_whole_cores_of_the_pod(cpu: Any, told: str) -> None:
    pods = {"trainer": {"resources": {"requests": {"cpu": cpu}}}} if cpu is not None else {}
    (group,) = planned(a_job(pods=pods))["RayCluster"]["spec"]["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == told


def test_merging_changes_nothing_in_place() -> None:
    base: Raw = {"a": {"b": 1}, "c": [1]}
    assert deep_merge(base, {"a": {"d": 2}, "c": [2]}) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert base == {"a": {"b": 1}, "c": [1]}
    assert merge_named([{"n": 1, "x": 1}, {"n": 2}], [{"n": 3}, {"n": 1}], "n") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_nothing_is_planned_for_nothing() -> None:
    found = plan(read_job(a_job()), Want(), "rlhf-system")
    assert (found.ensure, found.create, found.delete) == ((), (), ())
