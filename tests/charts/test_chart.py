"""The chart as Helm renders it: what it installs, what it refuses. No cluster."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack import generate
from hack.generate import render
from hack.release import the_version
from rlhf_api.crd import crd
from rlhf_operator.names import OPERATOR_LABELS
from rlhf_operator.plan.pods import METRICS_PORT
from rlhf_operator.presets import Presets
from rlhf_operator.rbac import rules
from rlhf_operator.settings import Settings, parse, read_presets
from tests.control.golden import check

Object = dict[str, Any]


GOLDEN = Path(__file__).parent / "golden"
# Values that change much of what is rendered, beside the defaults, whose render is manifests/.
VALUES: dict[str, Object] = {
    "one-namespace": {"watchNamespace": "team-a", "replicas": 1, "crds": {"install": False}},
    "observed": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "alerts": {"enabled": True, "labels": {"role": "alert-rules"}},
            "dashboards": {"enabled": True},
        },
        "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    },
    "platform": {
        "image": {"repository": "registry/rlhf-operator", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccount": {"create": False, "name": "rlhf"},
        "userRoles": {"create": False},
        "driverPolicy": {"enabled": False},
        "jobs": {"image": "registry/rlhf-worker:1.2.3", "pods": {"trainer": {"nodeSelector": {"gpu": "h200"}}}},
        "verbose": True,
        "podLabels": {"team": "platform"},
        "podAnnotations": {"note": "kept"},
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "priorityClassName": "system-cluster-critical",
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "volumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
    },
}


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and (not name or o["metadata"]["name"] == name)]
    return found


def refusal(*pairs: str) -> str:
    """What Helm says when it does not render."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        render(*sets(*pairs))
    return str(caught.value.stderr)


def rendered(values: Object, folder: Path) -> list[Object]:
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    return render("--values", str(file))


def outlined(one: Object) -> Object:
    """Without what other tests compare: the CRD, the alerts and the dashboards."""
    long = {"CustomResourceDefinition": "spec", "PrometheusRule": "spec"}.get(one["kind"], "")
    data = {name: "..." if name.endswith(".json") else text for name, text in one.get("data", {}).items()}
    return {**one, **({long: "..."} if long else {}), **({"data": data} if data else {})}


@pytest.mark.parametrize("name", VALUES)
def test_a_render_is_as_before(name: str, tmp_path: Path) -> None:
    text = generate.dump(*map(outlined, rendered(VALUES[name], tmp_path)))
    check(str(GOLDEN / f"{name}.yaml"), text.replace(the_version(generate.ROOT), "VERSION"))


def test_helms_lint_has_nothing_to_say() -> None:
    command = [generate.helm(), "lint", "--strict", str(generate.CHART)]
    linted = subprocess.run(command, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
    assert [line for line in linted.stdout.splitlines() if line.startswith(("[WARNING]", "[ERROR]"))] == []


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render()


@pytest.fixture(scope="module")
def pod(objects: list[Object]) -> Object:
    spec: Object = one(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Object) -> Object:
    (only,) = pod["containers"]
    return dict(only)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("replicas=0", ["replicas", "minimum"]),
        ("image.pullPolicy=Sometimes", ["pullPolicy", "IfNotPresent"]),
        ("image.repository=", ["repository"]),
        ("image.tagg=1", ["tagg"]),
        ("crds.install=maybe", ["install", "boolean"]),
        ("watchNamespace=Team_A", ["watchNamespace"]),
        ("verbose=yes", ["verbose", "boolean"]),
        ("jobs.pods.workers.x=1", ["workers"]),
        ("metrics.serviceMonitor.interval=soon", ["interval"]),
        ("metrics.podMonitor.interval=soon", ["interval"]),
        ("metrics.alerts.enabled=yes", ["enabled", "boolean"]),
        ("metrics.dashboards.label.a=b", ["label"]),
        ("networkPolicy.metricsFrom=all", ["metricsFrom", "array"]),
        ("env[0].value=x", ["env", "name"]),
        ("podLabels.a.b=c", ["podLabels", "string"]),
        ("serviceAccount.name=team-driver", ["team-driver", "serviceAccount.name"]),
        ("serviceAccount.create=false", ["serviceAccount.name is empty"]),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(pair: str, words: list[str]) -> None:
    said = refusal(pair)
    assert [word for word in words if word not in said] == []


def test_a_monitor_without_its_service_is_refused() -> None:
    assert "needs metrics.service.enabled" in refusal(
        "metrics.serviceMonitor.enabled=true", "metrics.service.enabled=false",
    )


def test_a_release_named_like_a_driver_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        render(release="x-driver")
    assert "belong to the jobs' drivers" in caught.value.stderr


def test_the_crd_is_the_generated_one_and_stays(objects: list[Object]) -> None:
    installed = one(objects, "CustomResourceDefinition")
    assert installed["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert installed == crd()


def test_the_crd_can_be_left_out() -> None:
    assert "CustomResourceDefinition" not in {o["kind"] for o in render(*sets("crds.install=false"))}


def test_two_replicas_one_of_which_is_there_at_any_time(objects: list[Object], pod: Object) -> None:
    spec, budget = one(objects, "Deployment")["spec"], one(objects, "PodDisruptionBudget")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (2, "RollingUpdate")
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    (apart,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert apart["podAffinityTerm"]["labelSelector"] == budget["selector"]


def test_a_single_replica_holds_no_drain_up() -> None:
    objects = render(*sets("replicas=1"))
    assert one(objects, "Deployment")["spec"]["replicas"] == 1
    assert "PodDisruptionBudget" not in {o["kind"] for o in objects}


def test_an_affinity_takes_the_place_of_the_charts() -> None:
    given = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchFields[0].key=k"
    spec = one(render(*sets(given)), "Deployment")["spec"]["template"]["spec"]
    assert list(spec["affinity"]) == ["nodeAffinity"]


def test_the_jobs_network_policy_lets_the_operator_in(objects: list[Object]) -> None:
    assert OPERATOR_LABELS.items() <= one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()


def test_the_operator_runs_as_nobody_on_a_read_only_root(pod: Object, container: Object) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_platform_with_user_ranges_of_its_own_gives_the_user() -> None:
    objects = render(*sets("podSecurityContext.runAsUser=null", "podSecurityContext.runAsGroup=null"))
    pods = [one(objects, "Deployment")["spec"]["template"]["spec"], one(objects, "Pod")["spec"]]
    assert [sorted(pod["securityContext"]) for pod in pods] == [["runAsNonRoot", "seccompProfile"]] * 2


def test_the_operator_is_probed_and_bounded(container: Object) -> None:
    probes = {key: probe["httpGet"]["path"] for key, probe in container.items() if key.endswith("Probe")}
    assert probes == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert container["resources"]["requests"]["memory"] == "128Mi"
    assert container["resources"]["limits"]["memory"]
    assert container["command"] == ["python", "-m", "rlhf_operator"]
    assert container["imagePullPolicy"] == "IfNotPresent"


def test_the_selectors_find_the_pod(objects: list[Object]) -> None:
    deployment = one(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert one(objects, "Service")["spec"]["selector"].items() <= labels.items()


def test_pod_labels_cannot_break_the_selector() -> None:
    template = one(
        render(*sets("podLabels.team=a", "podLabels.app\\.kubernetes\\.io/name=other")), "Deployment",
    )["spec"]["template"]
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "rlhf-operator"
    assert template["metadata"]["labels"]["team"] == "a"


def test_every_binding_names_a_role_and_an_account_that_exist(objects: list[Object]) -> None:
    account = one(objects, "ServiceAccount")["metadata"]
    for binding in (o for o in objects if o["kind"].endswith("RoleBinding")):
        one(objects, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
        ]


def test_the_operator_has_no_wildcard_and_reads_no_secrets(objects: list[Object]) -> None:
    granted = [rule for o in objects if o["kind"] in {"Role", "ClusterRole"} for rule in o["rules"]]
    assert [rule for rule in granted if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]] == []
    assert [rule for rule in granted if "secrets" in rule["resources"]] == []


def flags(*pairs: str) -> Settings:
    """What the operator makes of the container's arguments."""
    (container,) = one(render(*sets(*pairs)), "Deployment")["spec"]["template"]["spec"]["containers"]
    return parse(container["args"])


def test_the_operator_understands_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAMESPACE", "rlhf-system")
    assert flags() == Settings(
        namespace=None, kubeconfig=None, health_port=8080, lease_namespace="rlhf-system", verbose=False,
    )
    assert flags("watchNamespace=team-a", "verbose=true") == Settings("team-a", None, 8080, "rlhf-system", verbose=True)


def test_with_one_namespace_nothing_but_the_crd_is_cluster_wide() -> None:
    observed = ("metrics.serviceMonitor.enabled=true", "metrics.podMonitor.enabled=true", "metrics.alerts.enabled=true",
        "metrics.dashboards.enabled=true", "jobs.image=worker")
    objects = render(*sets("watchNamespace=team-a", *observed))
    assert {o["kind"] for o in objects if "namespace" not in o["metadata"]} == {"CustomResourceDefinition"}
    assert {o["metadata"]["namespace"] for o in objects if o["kind"] == "Role"} == {"team-a", generate.NAMESPACE}


def test_a_cluster_admin_may_add_the_policy_of_one_namespace() -> None:
    objects = render(*sets("watchNamespace=team-a", "driverPolicy.enabled=true"))
    binding = one(objects, "ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "team-a"
    }
    without = render(*sets("driverPolicy.enabled=false"))
    assert "ValidatingAdmissionPolicy" not in {o["kind"] for o in without}


def test_the_rules_are_those_of_the_operators_kinds(objects: list[Object]) -> None:
    wide, lease = one(objects, "ClusterRole", "rlhf-system-rlhf-operator")["rules"], one(objects, "Role")["rules"]
    assert sorted(map(str, wide + lease)) == sorted(map(str, rules()))
    assert [rule["resources"] for rule in lease] == [["leases"]]
    (narrow,) = [
        o for o in render(*sets("watchNamespace=team-a"))
        if o["kind"] == "Role" and o["metadata"]["namespace"] == "team-a"
    ]
    assert narrow["rules"] == [rule for rule in wide if rule["resources"] != ["customresourcedefinitions"]]


def test_users_get_their_rights_by_aggregation_and_never_the_status(objects: list[Object]) -> None:
    roles = {o["metadata"]["name"].rpartition("-")[2]: o for o in objects if o["kind"] == "ClusterRole"}
    aggregated = {
        name: {label.rpartition("-")[2] for label in role["metadata"]["labels"] if "aggregate-to" in label}
        for name, role in roles.items()
    }
    assert aggregated["view"] == {"view", "edit", "admin"}
    assert aggregated["edit"] == {"edit", "admin"}
    assert [rule["resources"] for rule in roles["edit"]["rules"]] == [["rlhfjobs"]]
    assert roles["view"]["rules"][0]["verbs"] == ["get", "list", "watch"]


def test_the_policy_binds_drivers_only_and_denies(objects: list[Object]) -> None:
    policy, binding = one(objects, "ValidatingAdmissionPolicy"), one(objects, "ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    assert binding["spec"]["validationActions"] == ["Deny"]
    assert "-driver$" in policy["spec"]["matchConditions"][0]["expression"]
    assert policy["spec"]["failurePolicy"] == "Fail"


def test_a_monitor_selects_the_service() -> None:
    objects = render(*sets("metrics.serviceMonitor.enabled=true", "metrics.serviceMonitor.labels.release=prometheus"))
    monitor, service = one(objects, "ServiceMonitor"), one(objects, "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"

def test_a_monitor_of_runs_asks_for_the_port_that_a_run_names() -> None:
    monitor = one(render(*sets("metrics.podMonitor.enabled=true")), "PodMonitor")["spec"]
    assert monitor["namespaceSelector"] == {"any": True}
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == [METRICS_PORT]
    named = one(render(*sets("metrics.podMonitor.enabled=true", "watchNamespace=team-a")), "PodMonitor")["spec"]
    assert named["namespaceSelector"] == {"matchNames": ["team-a"]}


def test_nothing_but_the_port_of_metrics_reaches_the_operator(objects: list[Object], container: Object) -> None:
    policy = one(objects, "NetworkPolicy")["spec"]
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [{"ports": [{"port": container["ports"][0]["containerPort"]}]}]
    some = sets("networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring")
    (rule,) = one(render(*some), "NetworkPolicy")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]
    assert "NetworkPolicy" not in {o["kind"] for o in render(*sets("networkPolicy.enabled=false"))}


def test_helms_test_asks_the_service_and_stays_out_of_kustomize(objects: list[Object]) -> None:
    pod, service = one(objects, "Pod"), one(objects, "Service")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    variable = service["metadata"]["name"].upper().replace("-", "_") + "_SERVICE"
    assert container["command"][-2:] == ["rlhf_operator.smoke", f"http://$({variable}_HOST):$({variable}_PORT)"]
    assert not [path for path in generate.manifests(objects) if "test" in path.name]


def test_what_jobs_inherit_reaches_the_operator(tmp_path: Path) -> None:
    values = {"jobs": {"image": "registry/worker:1", "pods": {"trainer": {"tolerations": [{"operator": "Exists"}]}}}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    objects = render("--values", str(tmp_path / "values.yaml"))
    told = one(objects, "ConfigMap")["data"]["presets.yaml"]
    (tmp_path / "presets.yaml").write_text(told)
    pods: Object = {"trainer": {"tolerations": [{"operator": "Exists"}]}}
    assert read_presets(tmp_path / "presets.yaml") == Presets("registry/worker:1", pods)
    template = one(objects, "Deployment")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert str(parse(container["args"]).presets) == f"{container['volumeMounts'][0]['mountPath']}/presets.yaml"
    assert template["spec"]["volumes"] == [
        {"name": "presets", "configMap": {"name": one(objects, "ConfigMap")["metadata"]["name"]}}
    ]
    other = one(render("--set", "jobs.image=registry/worker:2"), "Deployment")["spec"]["template"]["metadata"]
    assert other["annotations"] != template["metadata"]["annotations"], "a change needs another start"
