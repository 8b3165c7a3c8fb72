"""Jobs of the cluster tests: the tiny samples, changed; what became of them; what they left on disk."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hack.kubectl import Kube
from tests.cluster.waiting import wait_for

Object = dict[str, Any]
CLONE = Path(__file__).resolve().parents[2]
SAMPLES = CLONE / "manifests" / "samples"


@dataclass(frozen=True)
class Undisturbed:
    """A job that nothing happened to: what it was, its last status, and the reward of each step."""

    job: Object
    status: Object
    curve: dict[int, float]


def sample(file: str, name: str, namespace: str, **changes: Any) -> Object:
    """A sample manifest under another name, with its own checkpoint directory. Changes as in tests/api/specs.py."""
    (found,) = [d for d in yaml.safe_load_all((SAMPLES / file).read_text()) if d and d["kind"] == "RLHFJob"]
    job: Object = copy.deepcopy(found)
    job["metadata"] = {"name": name, "namespace": namespace}
    changes.setdefault("checkpoint__path", f"/var/lib/rlhf/checkpoints/{namespace}-{name}")
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = job["spec"]
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return job


def status(kube: Kube, namespace: str, name: str) -> Object:
    found: Object = (kube.find("rlhfjob", name, "-n", namespace) or {}).get("status", {})
    return found


def condition(kube: Kube, namespace: str, name: str, kind: str) -> Object:
    return next((c for c in status(kube, namespace, name).get("conditions", []) if c["type"] == kind), {})


def step(kube: Kube, namespace: str, name: str) -> int:
    return int(status(kube, namespace, name).get("progress", {}).get("step", 0))


def wait_for_condition(kube: Kube, namespace: str, name: str, kind: str, seconds: float, value: str = "True") -> Object:
    """The condition once it has this value; a job that ends in another way fails the test at once with its status."""

    def probe() -> Object | None:
        now = status(kube, namespace, name)
        by_type = {c["type"]: c for c in now.get("conditions", [])}
        ended = {kind for kind in ("Complete", "Failed") if by_type.get(kind, {}).get("status") == "True"}
        assert not ended - {kind} or kind not in ("Complete", "Failed"), f"ended as {ended}: {now.get('message')}"
        return by_type.get(kind) if by_type.get(kind, {}).get("status") == value else None

    return wait_for(
        probe, seconds, lambda: f"{kind}={value} of {name}: {yaml.safe_dump(status(kube, namespace, name))}"
    )


def pods(kube: Kube, namespace: str, name: str) -> list[Object]:
    found: list[Object] = (kube.find("pods", "-n", namespace, "-l", f"rlhf.dev/job={name}") or {}).get("items", [])
    return found


def pod_of(kube: Kube, namespace: str, name: str, role: str) -> str:
    """The name of the job's first pod of this role."""
    found = pods(kube, namespace, name)
    return next(str(p["metadata"]["name"]) for p in found if p["metadata"]["labels"]["rlhf.dev/role"] == role)


def released(kube: Kube, namespace: str, name: str) -> bool:
    """No RayCluster and no pod is left of the job."""
    clusters = (kube.find("rayclusters", "-n", namespace, "-l", f"rlhf.dev/job={name}") or {}).get("items", [])
    return not clusters and not pods(kube, namespace, name)


def rewards(volumes: Path, job: Object) -> dict[int, float]:
    """Reward of each step from the run's TensorBoard files; of a step done twice, the later one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = volumes / Path(job["spec"]["checkpoint"]["path"]).relative_to("/var/lib/rlhf") / "tensorboard"
    found: dict[int, float] = {}
    for file in sorted(directory.glob("events.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file))
        events.Reload()
        found.update({event.step: event.value for event in events.Scalars("reward/mean")})
    return found
