"""The chart on the real API server, by the real Helm: every render is taken, a release is upgraded, rolled back,
removed and made again under jobs that run, and a team installs one without any right beyond its namespace."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack import generate
from hack.bench.nodes import stamp, trained
from hack.kubectl import OPERATOR_NAMESPACE, Kube, Refused
from rlhf_api.progress import DRIVER_FIELD_MANAGER
from tests.charts.test_chart import VALUES
from tests.cluster.jobs import pods, sample, status, wait_for_condition
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
Object = dict[str, Any]
CHART = str(generate.CHART)
IMAGE = "image.repository=rlhf-operator,image.tag=dev"
RAY_CLUSTER = Path(__file__).with_name("raycluster.json")
MONITORING = "monitoring.coreos.com/v1"  # whose CRDs are not installed here; promtool reads the alerts


def helm(kube: Kube, *arguments: str) -> str:
    done = subprocess.run([kube.helm, *arguments], env=kube.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_helms_test_passes_beside_a_policy_that_lets_it_in(operator: Kube) -> None:
    told = helm(operator, "test", "rlhf-operator", "--namespace", OPERATOR_NAMESPACE, "--logs", "--timeout", "2m")
    assert "ready, and one replica leads" in told
    operator.run("delete", "pod", "rlhf-operator-test", "-n", OPERATOR_NAMESPACE, "--wait=false")


@pytest.mark.parametrize("name", ["defaults", *VALUES])
def test_the_api_server_takes_every_render_to_the_letter(
    operator: Kube, namespace: str, name: str, tmp_path: Path,
) -> None:
    """With fieldValidation Strict: what no schema declares is refused, as is what no validation lets through."""
    values = VALUES.get(name, {})
    values = {**values, "watchNamespace": namespace} if "watchNamespace" in values else values
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    objects = generate.render("--values", str(tmp_path / "values.yaml"))
    known = {"apiVersion": "v1", "kind": "List", "items": [o for o in objects if o["apiVersion"] != MONITORING]}
    strictly = ("--dry-run=server", "--server-side", "--force-conflicts", "--validate=strict", "--field-manager=helm")
    operator.apply(known, *strictly)
    wrong = json.loads(json.dumps(known).replace('"automountServiceAccountToken"', '"automountServiceAccountTokens"'))
    with pytest.raises(Refused, match="automountServiceAccountTokens"):
        operator.apply(wrong, *strictly)


def documents(text: str) -> Iterator[Object]:
    """JSON objects one after another, as kubectl prints those of a dry run."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        one, end = decoder.raw_decode(text)
        yield one
        text = text[end:]


def test_kustomize_gives_the_charts_objects(cluster: Kube) -> None:
    def by_name(objects: list[Object]) -> dict[tuple[str, str, str], Object]:
        return {(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]): o for o in objects}

    # read as kubectl reads it: kustomize writes 1e-06, which is no number in YAML 1.1
    read = ("create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-")
    made = by_name(list(documents(cluster.run(*read, text=cluster.run("kustomize", "manifests/default")))))
    assert made.pop(("Namespace", "", OPERATOR_NAMESPACE))
    chart = [o for o in generate.render() if "helm.sh/hook" not in o["metadata"].get("annotations", {})]
    for one in chart:
        if one["metadata"].get("annotations", {}).pop("helm.sh/resource-policy", None):
            del one["metadata"]["annotations"]
        if "labels" in one["metadata"]:
            generate.without_helm(one)
    assert made == by_name(chart)


# --- a release under jobs that run --------------------------------------------------------------------------------

RUNNING = ("one", "two", "three")
RELEASE = ("rlhf-operator", "--namespace", OPERATOR_NAMESPACE)


@pytest.fixture
def jobs(operator: Kube, namespace: str) -> str:
    """The namespace of three jobs that Run, by what is written of their pods and drivers: no node has room for them."""
    for name in RUNNING:
        job = sample("tiny-colocated.yaml", name, namespace)
        for kind in ("head", "trainer"):
            job["spec"]["pods"].setdefault(kind, {})["nodeSelector"] = {"rlhf.test/nowhere": "true"}
        operator.apply(job)
    for name in RUNNING:
        begins(operator, namespace, name)
    for name in RUNNING:
        wait_for_condition(operator, namespace, name, "Running", 60)
    return namespace


def begins(kube: Kube, namespace: str, name: str) -> None:
    wait_for(lambda: len(pods(kube, namespace, name)) == 2, 60, f"the pods of {name}")
    for pod in pods(kube, namespace, name):
        patch = json.dumps({"status": running(pod)})
        where = ("-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
        kube.run("patch", "pod", pod["metadata"]["name"], *where)
    reports(kube, namespace, name, 5)


def running(pod: Object) -> Object:
    """A pod's status in which every container runs."""
    now = stamp()
    containers = [
        {"name": c["name"], "image": c["image"], "imageID": "", "restartCount": 0, "ready": True,
            "state": {"running": {"startedAt": now}}}
        for c in pod["spec"]["containers"]
    ]
    conditions = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("PodScheduled", "Ready")]
    return {"phase": "Running", "conditions": conditions, "containerStatuses": containers, "startTime": now}


def reports(kube: Kube, namespace: str, name: str, step: int) -> None:
    """As the job's driver does, after this step."""
    (head,) = [p for p in pods(kube, namespace, name) if p["metadata"]["labels"]["rlhf.dev/role"] == "head"]
    told = {"podUid": head["metadata"]["uid"], "attempt": 1, "totalSteps": 1000, "reportTime": stamp(), **trained(step)}
    body = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": name},
        "status": {"progress": told}}
    how = ("--server-side", "--subresource=status", f"--field-manager={DRIVER_FIELD_MANAGER}")
    kube.apply(body, "-n", namespace, *how)


def lives(kube: Kube, namespace: str) -> dict[str, Object]:
    """What no upgrade may change: phase, restarts, the RayCluster and the pods themselves."""
    return {name: {
        "phase": (now := status(kube, namespace, name))["phase"],
        "restarts": now["restarts"]["total"],
        "clusters": now["record"]["clusters"],
        "pods": sorted(pod["metadata"]["uid"] for pod in pods(kube, namespace, name)),
    } for name in RUNNING}


def leads(kube: Kube) -> bool:
    lease = kube.find("lease", "rlhf-operator", "-n", OPERATOR_NAMESPACE) or {}
    held = pods_of_operator(kube)
    return any(name in lease.get("spec", {}).get("holderIdentity", "") for name in held)


def pods_of_operator(kube: Kube) -> list[str]:
    selector = "app.kubernetes.io/name=rlhf-operator"
    found = (kube.find("pods", "-n", OPERATOR_NAMESPACE, "-l", selector) or {}).get("items", [])
    return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]


def older_chart(folder: Path) -> Path:
    """This chart with a CRD that lacks the last column."""
    chart = folder / "rlhf-operator"
    shutil.copytree(CHART, chart)
    crd = yaml.safe_load((chart / "files/crd.yaml").read_text())
    crd["spec"]["versions"][0]["additionalPrinterColumns"].pop()
    (chart / "files/crd.yaml").write_text(generate.dump(crd))
    return chart


def columns(kube: Kube) -> int:
    crd = kube.find("crd", "rlhfjobs.rlhf.dev") or {}
    return len(crd["spec"]["versions"][0]["additionalPrinterColumns"])


def test_jobs_that_run_notice_nothing_of_a_release(operator: Kube, jobs: str, tmp_path: Path) -> None:
    """Whose CRD gets older, which is upgraded with other values, rolled back, removed, and made again."""
    before, step, all_columns = lives(operator, jobs), 5, columns(operator)
    assert [life["phase"] for life in before.values()] == ["Running"] * 3
    upgrade = ("upgrade", *RELEASE, "--reset-then-reuse-values", "--wait")
    changes: list[tuple[Callable[[], object], int]] = [
        (lambda: helm(operator, *upgrade, str(older_chart(tmp_path))), all_columns - 1),
        (lambda: helm(operator, *upgrade, CHART, "--set", "verbose=true"), all_columns),
        (lambda: helm(operator, "rollback", *RELEASE, "--wait"), all_columns - 1),
        (lambda: helm(operator, "uninstall", *RELEASE, "--wait"), all_columns - 1),
        (operator.install_operator, all_columns),
    ]
    for change, left in changes:
        change()
        assert columns(operator) == left
        step += 1
        for name in RUNNING:
            reports(operator, jobs, name, step)
        if pods_of_operator(operator):
            wait_for(lambda: leads(operator), 60, "one of the new replicas leads")
        assert lives(operator, jobs) == before
    for name in RUNNING:
        operator.run("delete", "rlhfjob", name, "-n", jobs, "--wait=false")


# --- one namespace ------------------------------------------------------------------------------------------------


def test_a_team_needs_no_right_beyond_its_namespace(operator: Kube, namespace: str) -> None:
    everything = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "everything"}}
    operator.apply({**role, "rules": everything}, "-n", namespace)
    operator.run("create", "rolebinding", "everything", "-n", namespace, "--role=everything", "--user=team")
    where, who = ("--namespace", namespace), ("--kube-as-user", "team", "--kube-as-group", "system:authenticated")
    values = f"watchNamespace={namespace},crds.install=false,replicas=1,{IMAGE}"
    with pytest.raises(AssertionError, match=r"(?i)forbidden"):
        helm(operator, "install", "team", CHART, *where, *who, "--set", f"{values},driverPolicy.enabled=true")
    operator.run("delete", "secrets", "-n", namespace, "-l", "owner=helm")
    helm(operator, "install", "team", CHART, *where, *who, "--set", values, "--wait", "--timeout", "2m")
    helm(operator, "uninstall", "team", *where, *who, "--wait")

    def gone() -> bool:
        left = operator.run("get", "all,roles,serviceaccounts", "-n", namespace, "-o", "name")
        return "team" not in left

    wait_for(gone, 60, "everything of the release, its pod the last")


# --- KubeRay that is too old --------------------------------------------------------------------------------------

FIELD = "properties/spec/properties/authOptions"


@pytest.fixture
def old_kuberay(operator: Kube, namespace: str) -> Iterator[Callable[[], None]]:
    """The RayCluster CRD lacks a field that is set, until what is given is called."""
    crd = operator.find("crd", "rayclusters.ray.io") or {}
    (index,) = [i for i, version in enumerate(crd["spec"]["versions"]) if version["name"] == "v1"]
    schema = crd["spec"]["versions"][index]["schema"]["openAPIV3Schema"]
    field = schema["properties"]["spec"]["properties"]["authOptions"]
    path = f"/spec/versions/{index}/schema/openAPIV3Schema/{FIELD}"

    def patch(**operation: Any) -> None:
        body = json.dumps([{"path": path, **operation}])
        operator.run("patch", "crd", "rayclusters.ray.io", "--type=json", "-p", body)

    def known() -> bool:
        cluster = json.loads(RAY_CLUSTER.read_text())
        try:
            operator.apply(cluster, "-n", namespace, "--dry-run=server", "--validate=strict")
        except Refused:
            return False
        return True

    patch(op="remove")
    wait_for(lambda: not known(), 30, "the field is gone")
    try:
        yield lambda: patch(op="add", value=field)
    finally:
        if not known():
            patch(op="add", value=field)
        wait_for(known, 30, "the field is there again")


def test_a_kuberay_that_is_too_old_is_named_and_waited_for(
    operator: Kube, namespace: str, old_kuberay: Callable[[], None],
) -> None:
    job = sample("tiny-colocated.yaml", "waits", namespace)
    job["spec"]["pods"].setdefault("head", {})["nodeSelector"] = {"rlhf.test/nowhere": "true"}
    operator.apply(job)
    told = wait_for_condition(operator, namespace, "waits", "Accepted", 30, value="False")
    assert told["reason"] == "KubeRayTooOld"
    assert "has no spec.authOptions: upgrade KubeRay" in told["message"]
    old_kuberay()
    edit = json.dumps({"spec": {"runPolicy": {"backoffLimit": 3}}})  # without one it looks again within a minute
    operator.run("patch", "rlhfjob", "waits", "-n", namespace, "--type=merge", "-p", edit)
    wait_for_condition(operator, namespace, "waits", "Accepted", 90)
    operator.run("delete", "rlhfjob", "waits", "-n", namespace, "--wait=false")
