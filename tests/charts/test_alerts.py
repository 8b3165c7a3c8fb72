"""Alerts fire on what they are for, and each has its page; dashboards ask for metrics that exist."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, CollectorRegistry

from hack.cluster import binaries, settings
from hack.dashboards import dashboards
from hack.generate import CHART, ROOT, render
from rlhf_operator import metrics
from rlhf_operator.store import Store
from tests.charts.test_chart import one, sets

RULES, CASES = CHART / "files/alerts.yaml", Path(__file__).with_name("alerts_test.yaml")
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\brlhf_[a-z_]+")
NEWEST = re.compile(r"_(bucket|count|sum|total)$")


@pytest.fixture(scope="module")
def promtool() -> str:
    return str(binaries.promtool(settings.from_environment()))


def test_each_alert_fires_on_what_it_is_for_and_is_quiet_otherwise(promtool: str, tmp_path: Path) -> None:
    for path in (RULES, CASES):
        shutil.copy(path, tmp_path)
    done = subprocess.run([promtool, "test", "rules", CASES.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_both_ways_and_has_its_section() -> None:
    tried = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in tried if "exp_alerts" in case} == names
    assert {case["alertname"] for case in tried if "exp_alerts" not in case} == names
    page = (ROOT / "docs/alerts.md").read_text()
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == names


def known() -> set[str]:
    """Of the operator what its process serves; of a run what the page on telemetry lists."""
    stored = CollectorRegistry()
    stored.register(metrics.StoreCollector(Store(), metrics.WatchAges()))
    operator = {family.name for registry in (REGISTRY, stored) for family in registry.collect()}
    page = (ROOT / "docs/telemetry.md").read_text()
    rows = re.findall(r"^\| (`[a-z]+/[^|]*) \|", page, re.MULTILINE)
    runs = {"rlhf_" + name.replace("/", "_") for row in rows for name in re.findall(r"`([^`<]+)`", row)}
    phases = {f"rlhf_seconds_{phase}" for phase in ("step", "generate", "score", "train", "sync")}
    return operator | runs | phases | {"rlhf_step"}


def asked() -> dict[str, str]:
    """Each metric that is asked for, and where."""
    lines = {
        target["expr"]: f"{name}: {panel['title']}"
        for name, content in dashboards().items()
        for panel in content["panels"]
        for target in panel.get("targets", [])
    } | {rule["expr"]: rule["alert"] for rule in ALERTS}
    return {metric: where for expression, where in lines.items() for metric in METRIC.findall(expression)}


def test_what_alerts_and_dashboards_ask_for_exists() -> None:
    names = known()
    assert [(metric, where) for metric, where in asked().items() if not {metric, NEWEST.sub("", metric)} & names] == []


def test_the_panels_expressions_are_prometheus_own(promtool: str, tmp_path: Path) -> None:
    expressions = [
        target["expr"].replace("$namespace", ".*").replace("$rlhfjob", ".*")
        for content in dashboards().values()
        for panel in content["panels"]
        for target in panel.get("targets", [])
    ]
    rules = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(expressions)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", tmp_path / "panels.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap() -> None:
    for content in dashboards().values():
        cells = [
            (x, y)
            for panel in content["panels"]
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_chart_installs_them_as_they_are_with_the_users_labels() -> None:
    objects = render(*sets("metrics.alerts.enabled=true", "metrics.alerts.labels.release=prometheus",
        "metrics.dashboards.enabled=true"))
    rule: dict[str, Any] = one(objects, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    maps = [o for o in objects if o["kind"] == "ConfigMap"]
    assert {name: text for o in maps for name, text in o["data"].items()} == {
        path.name: path.read_text().rstrip("\n") for path in (CHART / "files/dashboards").iterdir()
    }
    assert all(o["metadata"]["labels"]["grafana_dashboard"] == "1" for o in maps)
