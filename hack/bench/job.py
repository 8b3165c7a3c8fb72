"""The life of the tiny colocated job on the embedded cluster: when each phase came, what the operator cost.

    python -m hack.cluster up && python -m hack.bench.job

Prints seconds from `kubectl apply` to each phase and to what the driver was at in between, beside a start of vLLM alone
with the same model on the idle machine; the reward, the operator's resident memory with one job, and the API writes of
the operator in a minute in which nothing changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from hack.cluster import settings
from hack.cluster.kube import Api
from hack.kubectl import OPERATOR_NAMESPACE, Kube, kube

MANIFEST = Path("manifests/samples/tiny-colocated.yaml")
OPERATOR_USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:"
Object = dict[str, Any]


def phases(api: Api, name: str, seconds: float) -> tuple[dict[str, float], list[tuple[float, Object]]]:
    """Seconds from now at which each phase was first seen, and every progress report with its time."""
    start, seen, reports = time.monotonic(), dict[str, float](), list[tuple[float, Object]]()
    while time.monotonic() - start < seconds:
        status = (api.find(f"/apis/rlhf.dev/v1alpha1/namespaces/default/rlhfjobs/{name}") or {}).get("status", {})
        seen.setdefault(status.get("phase", "Pending"), time.monotonic() - start)
        if (progress := status.get("progress")) and (not reports or reports[-1][1] != progress):
            reports.append((time.monotonic() - start, progress))
        if status.get("phase") in ("Succeeded", "Failed"):
            break
        time.sleep(0.25)
    return seen, reports


ALONE = """
import sys, time
start = time.monotonic()
from vllm import LLM
LLM(sys.argv[1], dtype="float32", kv_cache_memory_bytes=1 << 28, enforce_eager=True, max_model_len=64)
print("ready", time.monotonic() - start)
"""


def vllm_alone(model: Path, cache: str) -> float:
    """Seconds from a process's first line to an engine that is ready. cache: vLLM's directory; empty, as a new pod's
    is, it looks at the model's class in a further process.
    """
    command, environment = [sys.executable, "-c", ALONE, str(model)], {**os.environ, "VLLM_CACHE_ROOT": cache}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(next(line for line in told.stdout.splitlines() if line.startswith("ready")).split()[1])


def operator_memory_mib() -> float:
    """Resident memory of the operator's process, from /proc of this machine."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            status = (entry / "status").read_text()
        except OSError:
            continue
        if b"rlhf_operator" in command and b"-m" in command:
            (line,) = [row for row in status.splitlines() if row.startswith("VmRSS")]
            return int(line.split()[1]) / 1024
    sys.exit("no operator runs here: make cluster-up, and install the chart")


def writes(log: Path, since: float) -> int:
    """The operator's writes in the API server's audit log after this time, leases of the leader election left out."""
    count = 0
    for line in log.read_text().splitlines():
        event = json.loads(line)
        stamp = time.mktime(time.strptime(event["requestReceivedTimestamp"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
        ours = event["user"]["username"].startswith(OPERATOR_USER)
        count += ours and stamp >= since and event["objectRef"].get("resource") != "leases" and event["verb"] not in (
            "get", "list", "watch",
        )
    return count


def idle_writes(cluster: Kube, cfg: settings.Settings, seconds: float) -> int:
    """Writes while one job waits for a queue that does not exist, and nothing else happens."""
    job = next(d for d in yaml.safe_load_all(MANIFEST.read_text()) if d)
    job["metadata"]["name"] = "waits"
    job["spec"]["queue"] = {"name": "no-such-queue"}
    cluster.apply(job)
    cluster.run("wait", "rlhfjob/waits", "--for=condition=Accepted=False", "--timeout=60s")
    time.sleep(5)  # let the last events be posted: what follows is the measurement
    start = time.time()
    time.sleep(seconds)
    found = writes(cfg.state / "audit.log", start)
    cluster.run("delete", "rlhfjob", "waits")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle-seconds", type=float, default=60)
    arguments = parser.parse_args()
    cfg = settings.from_environment()
    cluster = kube(cfg)
    cluster.install_operator()
    subprocess.run([sys.executable, "-m", "hack.tiny_model", str(cfg.volumes / "models" / "tiny")], check=True)
    idle = idle_writes(cluster, cfg, arguments.idle_seconds)
    with tempfile.TemporaryDirectory() as used, tempfile.TemporaryDirectory() as new:
        vllm_alone(cfg.volumes / "models" / "tiny", used)  # reads all files once
        alone = {name: vllm_alone(cfg.volumes / "models" / "tiny", cache) for name, cache in (
            ("with its look at the model's class cached", used), ("with an empty cache, as in a new pod", new),
        )}
    name = next(d for d in yaml.safe_load_all(MANIFEST.read_text()) if d)["metadata"]["name"]
    cluster.run("delete", "rlhfjob", name, "--ignore-not-found", "--wait", "--cascade=foreground")
    subprocess.run(["rm", "-rf", str(cfg.volumes / "checkpoints" / name)], check=True)
    cluster.run("apply", "-f", str(MANIFEST))
    seen, reports = phases(Api.from_kubeconfig(cfg.kubeconfig), name, 900)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| from apply to | seconds |\n|---|---|")
    print("\n".join(f"| {phase} | {at:.1f} |" for phase, at in seen.items()))
    told = dict[str, float]()
    for at, report in reports:
        told.setdefault(report.get("detail", ""), at)
    print("\n".join(f"| driver: {detail} | {at:.1f} |" for detail, at in told.items() if at <= seen["Running"]))
    rewards = [(at, float(p["reward"]), p["step"]) for at, p in reports if p.get("reward")]
    print(f"| reward > 0.9 (step {next((s for _, r, s in rewards if r > 0.9), None)}) | "
        f"{next((f'{at:.1f}' for at, r, _ in rewards if r > 0.9), 'never')} |")
    for name, took in alone.items():
        print(f"\nvLLM alone, the same model, {name}, until it is ready: {took:.1f} s; apply to first step "
            f"{seen['Running'] / took:.2f} times that")
    print(f"operator: {operator_memory_mib():.0f} MiB resident with one job; {idle} API writes in "
        f"{arguments.idle_seconds:.0f} s without change")


if __name__ == "__main__":
    main()
