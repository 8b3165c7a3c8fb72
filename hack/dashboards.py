"""Grafana's dashboards from tables of panels: title, unit, and the expressions with their legends."""

import json
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 24  # of a panel, of a row; Grafana's grid


@dataclass(frozen=True)
class Panel:
    """unit: one of Grafana's; lines: expression -> legend."""

    title: str
    unit: str
    lines: dict[str, str]


JOB, RUN = 'namespace=~"$namespace"', 'rlhfjob=~"$rlhfjob"'


def quantile(metric: str, share: float) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket[10m])))"


FLEET = {
    "Jobs": [
        Panel("Jobs by phase", "short", {"max by (phase) (rlhf_operator_jobs)": "{{phase}}"}),
        Panel("Ended", "short", {"sum by (result) (increase(rlhf_operator_jobs_ended_total[1h]))": "{{result}}"}),
        Panel("Restarts by class", "short", {
            "sum by (class) (increase(rlhf_operator_job_restarts_total[1h]))": "{{class}}",
        }),
        Panel("Jobs by reason", "short", {
            "max by (phase, reason) (rlhf_operator_jobs_by_reason)": "{{phase}} {{reason}}",
        }),
        Panel("From a driver's end to its status", "s", {
            quantile("rlhf_operator_job_detect_seconds", share): f"p{share * 100:.0f}" for share in (0.5, 0.95)
        }),
        Panel("Goodput", "percentunit", {
            f"max by (namespace, name) (rlhf_operator_job_goodput{{{JOB}}})": "{{namespace}}/{{name}}",
        }),
        Panel("From creation to admission", "s", {
            quantile("rlhf_operator_job_queue_seconds", share): f"p{share * 100:.0f}" for share in (0.5, 0.95)
        }),
        Panel("From admission to all pods", "s", {
            quantile("rlhf_operator_job_provisioning_seconds", share): f"p{share * 100:.0f}" for share in (0.5, 0.95)
        }),
    ],
    "Operator": [
        Panel("Passes", "ops", {"sum by (outcome) (rate(rlhf_operator_reconciles_total[5m]))": "{{outcome}}"}),
        Panel("Seconds of a pass", "s", {
            quantile("rlhf_operator_reconcile_seconds", share): f"p{share * 100:.0f}" for share in (0.5, 0.95)
        }),
        Panel("Jobs with a next pass", "short", {
            "max(rlhf_operator_queue_depth)": "due now or later", "max(rlhf_operator_active_passes)": "under way",
        }),
        Panel("API writes", "ops", {
            "sum by (verb, kind) (rate(rlhf_operator_api_writes_total[5m]))": "{{verb}} {{kind}}",
        }),
        Panel("Watch events", "ops", {"sum by (kind) (rate(rlhf_operator_watch_events_total[5m]))": "{{kind}}"}),
        Panel("Objects in memory", "short", {"max by (kind) (rlhf_operator_store_objects)": "{{kind}}"}),
    ],
}  # fmt: skip
RUNS = {
    "Learning": [
        Panel("Reward", "short", {f"rlhf_reward_mean{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("Step", "short", {f"rlhf_step{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("Completion tokens", "short", {
            f"rlhf_rollout_length{{{RUN}}}": "{{rlhfjob}}",
        }),
        Panel("Entropy", "short", {f"rlhf_train_entropy{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("KL", "short", {
            f"rlhf_train_policy_kl{{{RUN}}}": "{{rlhfjob}} to the step's first policy",
            f"rlhf_train_kl{{{RUN}}}": "{{rlhfjob}} to the reference",
        }),
        Panel("Gradient norm, loss", "short", {
            f"rlhf_train_grad_norm{{{RUN}}}": "{{rlhfjob}} norm", f"rlhf_train_loss{{{RUN}}}": "{{rlhfjob}} loss",
        }),
    ],
    "Speed": [
        Panel("Seconds of a step", "s", {
            f"rlhf_seconds_{phase}{{{RUN}}}": f"{{{{rlhfjob}}}} {phase}"
            for phase in ("step", "generate", "score", "train", "sync")
        }),
        Panel("Tokens a second", "short", {f"rlhf_rollout_tokens_per_second{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("MFU of the training, idle GPUs", "percentunit", {
            f"rlhf_train_mfu{{{RUN}}}": "{{rlhfjob}} MFU",
            f"rlhf_idle_trainer{{{RUN}}}": "{{rlhfjob}} trainer idle",
            f"rlhf_idle_engines{{{RUN}}}": "{{rlhfjob}} engines idle",
        }),
        Panel("Tokens a second and GPU", "short", {
            f"rlhf_{phase}_tokens_per_second_per_gpu{{{RUN}}}": f"{{{{rlhfjob}}}} {phase}"
            for phase in ("rollout", "train")
        }),
        Panel("Weight sync", "s", {f"rlhf_sync_seconds{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("Weight sync, GB/s", "short", {f"rlhf_sync_gigabytes_per_second{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("Memory of a trainer's GPU, GiB", "short", {f"rlhf_memory_trainer_gib{{{RUN}}}": "{{rlhfjob}}"}),
    ],
    "Health": [
        Panel("Engines that answer", "short", {f"rlhf_engines_answering{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("Engine against trainer: KL", "short", {f"rlhf_mismatch_kl{{{RUN}}}": "{{rlhfjob}}"}),
        Panel("Staleness, steps", "short", {
            f"rlhf_rollout_staleness{{{RUN}}}": "{{rlhfjob}} mean",
            f"rlhf_rollout_staleness_max{{{RUN}}}": "{{rlhfjob}} most",
        }),
        Panel("Groups that failed, were dropped, were tried again", "short", {
            f"rlhf_rollout_{name}_groups{{{RUN}}}": f"{{{{rlhfjob}}}} {name}"
            for name in ("failed", "dropped", "retried")
        }),
    ],
}  # fmt: skip


def dashboards() -> dict[str, Json]:
    """By file name, without its ending."""
    return {
        "fleet": dashboard("rlhf-fleet", "RLHF jobs", FLEET, "namespace", "rlhf_operator_job_goodput"),
        "run": dashboard("rlhf-run", "RLHF run", RUNS, "rlhfjob", "rlhf_step"),
    }


def dashboard(uid: str, title: str, rows: dict[str, list[Panel]], variable: str, metric: str) -> Json:
    """variable: the label to choose by, with the values that `metric` has."""
    choice = {
        "name": variable, "type": "query", "datasource": SOURCE, "query": f"label_values({metric}, {variable})",
        "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
        "multi": True, "refresh": 2,
    }  # fmt: skip
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": uid, "title": title, "tags": ["rlhf"], "timezone": "browser", "editable": True, "refresh": "30s",
        "schemaVersion": 39, "time": {"from": "now-6h", "to": "now"}, "templating": {"list": [source, choice]},
        "panels": laid_out(rows),
    }  # fmt: skip


def laid_out(rows: dict[str, list[Panel]]) -> list[Json]:
    """Each row's title over its panels, three abreast."""
    panels: list[Json] = []
    top = 0
    for title, row in rows.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}})
        top += 1
        for index, panel in enumerate(row):
            line, place = divmod(index, COLUMNS // WIDTH)
            at = {"x": place * WIDTH, "y": top + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(drawn(panel, len(panels) + 1, at))
        top += -(-len(row) * WIDTH // COLUMNS) * HEIGHT
    return panels


def drawn(panel: Panel, number: int, at: dict[str, int]) -> Json:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(panel.lines.items())
    ]
    return {
        "id": number, "type": "timeseries", "title": panel.title, "gridPos": at, "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"spanNulls": False}}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
    }  # fmt: skip


def printed(content: Json) -> str:
    return json.dumps(content, indent=1) + "\n"
