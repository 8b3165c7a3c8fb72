"""Objects from jobs: golden files of the samples, and the facts that must hold in each."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.cluster.kuberay_standin.pods import head_pod, worker_pod
from rlhf_api.job import RLHFJob
from rlhf_api.progress import DRIVER_PORT
from rlhf_api.run import RunConfig
from rlhf_api.status import RLHFJobStatus
from rlhf_cli.init import Plain
from rlhf_operator.decide import Want
from rlhf_operator.edition import edition
from rlhf_operator.merge import deep_merge, merge_named
from rlhf_operator.names import EDITION_ANNOTATION, EPHEMERAL_ANNOTATION
from rlhf_operator.observed import Cluster, Job, Pod, read_job
from rlhf_operator.plan import Deletion, plan
from tests.api.specs import a_job
from tests.control.golden import check

Raw = dict[str, Any]
ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
OPERATOR_PEER = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "rlhf-system"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "rlhf-operator"}},
}
SEPARATED: dict[str, Any] = {
    "placement__mode": "Separated", "rollout__engines": 2, "trainer__gpus": 2, "placement__gpusPerNode": 2,
}


def planned(raw: Raw, number: int = 1) -> dict[str, Raw]:
    """Of any overrides: which are refused is tested with the contract."""
    raw["metadata"] = {"namespace": "default", "uid": "the-uid", **raw["metadata"]}
    parsed = RLHFJob.model_validate(raw)
    job = Job(parsed.metadata, RLHFJobStatus(), parsed, edition=edition(parsed.spec))
    found = plan(job, Want(cluster=number), "rlhf-system")
    return {o["kind"]: o for o in (*found.ensure, *found.create)}


def made_pods(cluster: Raw) -> list[Raw]:
    """As KubeRay makes them, with the container that it puts before a worker's."""
    cluster = {**cluster, "metadata": {**cluster["metadata"], "uid": "cluster-uid"}}
    return [head_pod(cluster), *(worker_pod(cluster, group, "head") for group in cluster["spec"]["workerGroupSpecs"])]


def containers(pod: Raw) -> list[Raw]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def pods_of(cluster: Raw) -> dict[str, Raw]:
    groups = {g["groupName"]: g["template"]["spec"] for g in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"]["template"]["spec"], **groups}


@pytest.mark.parametrize("sample", SAMPLES, ids=[s.stem for s in SAMPLES])
def test_a_sample_is_planned_as_before(sample: Path) -> None:
    (raw,) = [d for d in yaml.safe_load_all(sample.read_text()) if d]
    objects = planned(raw)
    check(
        f"plans/{sample.stem}.yaml",
        "---\n".join(yaml.dump(o, Dumper=Plain, sort_keys=False, width=160) for o in objects.values())
    )


def test_everything_is_owned_and_labelled() -> None:
    objects = planned(a_job(checkpoint={"claim": {"size": "1Gi", "onDelete": "Delete"}}))
    assert len(objects) == 7
    for made in objects.values():
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
    changes = {
        **SEPARATED, "algorithm__name": "ppo", "critic": {"gpus": 1}, "rewards": [model],
        "checkpoint__path": "s3://bucket/run",
    }
    groups = planned(a_job(**changes))["RayCluster"]["spec"]["workerGroupSpecs"]
    assert [
        (g["groupName"], g["replicas"], g["rayStartParams"]["num-gpus"]) for g in groups
    ] == [("trainer", 2, "2"), ("rollout", 1, "2")]
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


def test_a_process_learns_from_its_pod_which_pod_it_is() -> None:
    pods = pods_of(planned(a_job())["RayCluster"])
    asked = pods["head"]["containers"][1], pods["trainer"]["containers"][0]
    driver, worker = ({e["name"]: e for e in c["env"]} for c in asked)
    assert driver["RLHF_POD_UID"]["valueFrom"]["fieldRef"] == {"fieldPath": "metadata.uid"}
    assert worker["RLHF_POD_NAME"]["valueFrom"]["fieldRef"] == {"fieldPath": "metadata.name"}


def test_the_drivers_port_is_one_of_the_heads_service() -> None:
    ray, driver = pods_of(planned(a_job())["RayCluster"])["head"]["containers"]
    assert {"name": "driver", "containerPort": DRIVER_PORT} in ray["ports"]
    assert "ports" not in driver


def test_every_container_leaves_its_last_words() -> None:
    for pod in pods_of(planned(a_job(**SEPARATED))["RayCluster"]).values():
        assert {c["terminationMessagePolicy"] for c in pod["containers"]} == {"FallbackToLogsOnError"}


def test_every_process_notices_a_lost_gcs_within_seconds() -> None:
    for pod in pods_of(planned(a_job())["RayCluster"]).values():
        for container in pod["containers"]:
            env = {e["name"]: e.get("value") for e in container["env"]}
            assert int(env["RAY_gcs_rpc_server_reconnect_timeout_s"]) <= 15
            assert int(env["RAY_raylet_liveness_self_check_interval_ms"]) <= 1000


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


@pytest.mark.parametrize("lock", ["worker-cpu.txt", "worker-gpu.txt"])
def test_the_images_ray_is_no_older_than_what_kuberay_is_told(lock: str) -> None:
    (pinned,) = re.findall(r"^ray==([0-9.]+)", (ROOT / "requirements" / lock).read_text(), re.MULTILINE)
    told = planned(a_job())["RayCluster"]["spec"]["rayVersion"]
    assert [int(part) for part in pinned.split(".")] >= [int(part) for part in told.split(".")] >= [2, 53, 0]


def test_a_queue_is_a_label_and_the_cluster_waits_for_it() -> None:
    cluster = planned(a_job(queue={"name": "team-a"}))["RayCluster"]
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert cluster["spec"]["suspend"] is True


def test_checkpoints_lie_where_the_user_mounts_or_in_the_pod() -> None:
    own = pods_of(planned(a_job())["RayCluster"])["trainer"]
    assert {"name": "rlhf-checkpoints", "mountPath": "/checkpoints"} in own["containers"][0]["volumeMounts"]
    data = {
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "c"}}],
        "volumeMounts": [{"name": "data", "mountPath": "/checkpoints"}],
    }
    theirs = pods_of(planned(a_job(pods={"trainer": data}))["RayCluster"])["trainer"]
    assert theirs["volumes"] == data["volumes"]
    remote = pods_of(planned(a_job(checkpoint__path="s3://bucket/run"))["RayCluster"])["trainer"]
    assert "rlhf-checkpoints" not in str(remote)


def test_overrides_are_merged_by_name_and_unknown_fields_pass() -> None:
    user = {
        "labels": {"team": "a"}, "annotations": {"note": "b"}, "nodeSelector": {"gpu": "h200"},
        "terminationGracePeriodSeconds": 600,
        "env": [{"name": "HF_HOME", "value": "/hf"}, {"name": "PYTHONUNBUFFERED", "value": "0"}],
        "envFrom": [{"secretRef": {"name": "wandb"}}],
        "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "64Gi"}},
        "volumes": [{"name": "hf", "emptyDir": {}}], "volumeMounts": [{"name": "hf", "mountPath": "/hf"}],
    }  # fmt: skip
    cluster = planned(a_job(pods={"head": user}))["RayCluster"]
    template, head = cluster["spec"]["headGroupSpec"]["template"], pods_of(cluster)["head"]
    assert template["metadata"] == {
        "labels": {"team": "a", "rlhf.dev/job": "sample", "rlhf.dev/role": "head"}, "annotations": {"note": "b"},
    }
    assert (head["nodeSelector"], head["terminationGracePeriodSeconds"]) == ({"gpu": "h200"}, 600)
    assert head["containers"][0]["resources"] == {"requests": {"cpu": "8"}, "limits": {"memory": "64Gi"}}
    for container in head["containers"]:
        env = {e["name"]: e.get("value") for e in container["env"]}
        assert (env["HF_HOME"], env["PYTHONUNBUFFERED"]) == ("/hf", "0")
        assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
        assert "/hf" in {m["mountPath"] for m in container["volumeMounts"]}
    assert [v["name"] for v in head["volumes"]] == ["rlhf-ray", "rlhf-shm", "rlhf-run", "hf"]


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({}, "4"),
        ({"requests": {"cpu": "8"}}, "8"),
        ({"requests": {"cpu": 3}}, "3"),
        ({"requests": {"cpu": "2500m"}}, "2"),
        ({"requests": {"cpu": "100m"}}, "1"),
        ({"requests": {"cpu": 1.5}}, "1"),
        ({"requests": {"cpu": "2k"}}, "2000"),
        ({"limits": {"cpu": "16"}, "requests": {"cpu": "8"}}, "16"),
        ({"limits": {"memory": "1Gi"}, "requests": {"cpu": "8"}}, "8"),
        ({"limits": {"memory": "1Gi"}}, "4"),
    ],
)
def test_rays_cpus_are_whole_cores_of_the_pod(resources: Raw, told: str) -> None:
    (group,) = planned(a_job(pods={"trainer": {"resources": resources}}))["RayCluster"]["spec"]["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == told


@pytest.mark.parametrize(
    ("user", "resources"),
    [
        ({}, {"requests": {"cpu": "100m", "memory": "512Mi"}}),
        ({"requests": {"memory": "4Gi"}}, {"requests": {"cpu": "100m", "memory": "4Gi"}}),
        ({"limits": {"cpu": "50m", "memory": "256Mi"}}, {"requests": {}, "limits": {"cpu": "50m", "memory": "256Mi"}}),
        ({"limits": {"memory": "8Gi"}}, {"requests": {"cpu": "100m"}, "limits": {"memory": "8Gi"}}),
    ],
)
def test_the_drivers_resources_are_a_field(user: Raw, resources: Raw) -> None:
    driver = pods_of(planned(a_job(pods={"driver": {"resources": user}}))["RayCluster"])["head"]["containers"][1]
    assert driver["resources"] == resources


def test_a_quota_on_limits_can_be_met() -> None:
    """KubeRay's own container brings limits; every other one takes them from a field."""
    limits = {"limits": {"cpu": "1", "memory": "2Gi"}}
    pods = {kind: {"resources": limits} for kind in ("head", "driver", "trainer", "rollout")}
    cluster = planned(a_job(**SEPARATED, pods=pods))["RayCluster"]
    for container in (one for pod in made_pods(cluster) for one in containers(pod)):
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]), container["name"]


THEIRS = (
    "rlhf.dev/job", "ray.io/cluster", "app.kubernetes.io/name", "helm.sh/chart", "meta.helm.sh/release-name",
    "kubectl.kubernetes.io/x", "argocd.argoproj.io/instance", "kustomize.toolkit.fluxcd.io/name",
    "kopf.zalando.org/last",
    "kopf.dev/x",
)  # fmt: skip
OURS = ("team", "example.com/cost", "topology.kubernetes.io/zone", "notray.io/x", "kueue.x-k8s.io/priority-class")


def test_the_jobs_labels_and_annotations_reach_cluster_and_pods() -> None:
    raw = a_job(pods={"trainer": {"labels": {"team": "b"}, "annotations": {"example.com/cost": "2"}}})
    raw["metadata"] |= {field: dict.fromkeys((*THEIRS, *OURS), "a") for field in ("labels", "annotations")}
    cluster = planned(raw)["RayCluster"]
    (group,), head = cluster["spec"]["workerGroupSpecs"], cluster["spec"]["headGroupSpec"]
    given, pods = dict.fromkeys(OURS, "a"), dict.fromkeys(OURS[:-1], "a")
    ours, worker = {"rlhf.dev/job": "sample"}, group["template"]["metadata"]
    assert cluster["metadata"]["labels"] == given | ours
    assert cluster["metadata"]["annotations"].keys() == given.keys() | {EDITION_ANNOTATION, EPHEMERAL_ANNOTATION}
    assert head["template"]["metadata"]["labels"] == pods | ours | {"rlhf.dev/role": "head"}
    assert worker["labels"] == pods | ours | {"team": "b", "rlhf.dev/role": "trainer"}
    assert worker["annotations"] == given | {"example.com/cost": "2"}


def test_the_queue_is_the_specs() -> None:
    raw = a_job(queue={"name": "team-a"})
    raw["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team-b"}
    assert planned(raw)["RayCluster"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_only_the_jobs_pods_the_operator_and_the_named_reach_the_pods() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    policy = planned(a_job(networkPolicy={"allowFrom": [peer]}))["NetworkPolicy"]
    (rule,) = policy["spec"]["ingress"]
    assert policy["metadata"]["name"] == "sample-pods"
    own = {"matchLabels": {"rlhf.dev/job": "sample"}}
    assert (policy["spec"]["podSelector"], policy["spec"]["policyTypes"]) == (own, ["Ingress"])
    assert rule == {"from": [{"podSelector": own}, OPERATOR_PEER, peer]}


def test_a_policy_that_is_turned_off_selects_no_pod() -> None:
    objects = planned(a_job(networkPolicy={"enabled": False}))
    selected = objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    groups = objects["RayCluster"]["spec"]["workerGroupSpecs"]
    templates = [objects["RayCluster"]["spec"]["headGroupSpec"]["template"], *(group["template"] for group in groups)]
    assert [t for t in templates if selected.items() <= t["metadata"]["labels"].items()] == []
    assert not selected.items() & planned(a_job())["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()


@pytest.mark.parametrize(("observed", "clusters", "kinds"), [(1, 1, ["NetworkPolicy"]), (2, 1, []), (1, 0, [])])
def test_an_edit_reaches_the_policy_of_pods_that_run(observed: int, clusters: int, kinds: list[str]) -> None:
    raw = a_job()
    raw["metadata"] |= {"generation": 2, "uid": "the-uid"}
    raw["status"] = {"observedGeneration": observed, "record": {"clusters": clusters}}
    found = plan(read_job(raw), Want(), "rlhf-system")
    assert [o["kind"] for o in found.ensure] == kinds
    assert found.create == ()


CLAIM = {"size": "200Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany", "onDelete": "Delete"}


def test_a_claim_is_made_once_and_mounted_where_the_trainers_save() -> None:
    raw = a_job(**SEPARATED, checkpoint={"path": "/data/run", "claim": CLAIM})
    objects = planned(raw)
    assert objects["PersistentVolumeClaim"]["metadata"]["name"] == "sample-checkpoints"
    assert objects["PersistentVolumeClaim"]["spec"] == {
        "accessModes": ["ReadWriteMany"], "storageClassName": "fast", "resources": {"requests": {"storage": "200Gi"}},
    }  # fmt: skip
    pods, source = pods_of(objects["RayCluster"]), {"persistentVolumeClaim": {"claimName": "sample-checkpoints"}}
    assert pods["trainer"]["volumes"] == [{"name": "rlhf-checkpoints", **source}]
    assert {"name": "rlhf-checkpoints", "mountPath": "/data/run"} in pods["trainer"]["containers"][0]["volumeMounts"]
    assert "sample-checkpoints" not in str((pods["head"], pods["rollout"]))
    made = plan(read_job(raw), Want(cluster=2), "home").create
    assert [o["kind"] for o in made] == ["PersistentVolumeClaim", "RayCluster"]


@pytest.mark.parametrize(("on_delete", "owners"), [("Delete", ["the-uid"]), ("Keep", [])])
def test_a_claim_that_is_kept_has_no_owner(on_delete: str, owners: list[str]) -> None:
    claim = planned(a_job(checkpoint={"claim": {"size": "1Gi", "onDelete": on_delete}}))["PersistentVolumeClaim"]
    assert [o["uid"] for o in claim["metadata"].get("ownerReferences", [])] == owners
    assert claim["metadata"]["labels"] == {"rlhf.dev/job": "sample"}
    assert "storageClassName" not in claim["spec"]


def test_deletions_are_bound_to_a_uid_and_end_a_dead_nodes_pod_at_once() -> None:
    pod, cluster = Pod("head", "pod-uid", "head", "cluster-uid"), Cluster("sample-1", "cluster-uid")
    wanted = Want(delete_clusters=(cluster,), delete_pods=(pod,), kill_pods=(pod,), delete_job=True, finalizer=False)
    raw = a_job()
    raw["metadata"]["uid"] = "the-uid"
    found = plan(read_job(raw), wanted, "home")
    assert found.delete == (
        Deletion("RayCluster", "sample-1", "cluster-uid"), Deletion("Pod", "head", "pod-uid"),
        Deletion("Pod", "head", "pod-uid", grace_seconds=0), Deletion("RLHFJob", "sample", "the-uid"),
    )  # fmt: skip
    assert found.finalizer is False


def test_merging_changes_nothing_in_place() -> None:
    base: Raw = {"a": {"b": 1}, "c": [1]}
    assert deep_merge(base, {"a": {"d": 2}, "c": [2]}) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert base == {"a": {"b": 1}, "c": [1]}
    assert merge_named([{"n": 1, "x": 1}, {"n": 2}], [{"n": 3}, {"n": 1}], "n") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_nothing_is_planned_for_nothing() -> None:
    found = plan(read_job(a_job()), Want(), "rlhf-system")
    assert (found.ensure, found.create, found.delete) == ((), (), ())


@pytest.mark.parametrize("mode", ["Colocated", "Separated"])
def test_a_run_that_serves_metrics_names_its_port_where_it_serves_them(mode: str) -> None:
    options = SEPARATED if mode == "Separated" else {}
    spec = planned(a_job(**options, telemetry__prometheusPort=9090))["RayCluster"]["spec"]
    ports = {
        group["groupName"]: [(port["name"], port["containerPort"]) for port in container.get("ports", [])]
        for group in spec["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    }
    assert ports.pop("trainer") == [("run-metrics", 9090)]
    assert not any(ports.values())
    without = planned(a_job(**options))["RayCluster"]["spec"]["workerGroupSpecs"]
    assert all("ports" not in group["template"]["spec"]["containers"][0] for group in without)
