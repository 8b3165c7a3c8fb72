"""Faults for the jobs of the embedded cluster: what dies or freezes, how, and at which moment of the run.

Processes of pods are found in this machine's own /proc, by their pod's cgroup: a signal then costs no `kubectl exec`,
and reaches what has no shell.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from threading import Thread, Timer
from typing import Any

from hack.cluster.kube import Api, ApiError
from hack.cluster.settings import Settings
from hack.kubectl import OPERATOR_NAMESPACE

Object = dict[str, Any]
JOB_LABEL, ROLE_LABEL = "rlhf.dev/job", "rlhf.dev/role"
PAUSE_SECONDS = 20.0  # of a SIGSTOP of what nothing watches, until its SIGCONT
_DRAIN_SECONDS = 180.0  # after which a node is given back whatever is still on it: a pod's grace period, and more
_PROCESS_SECONDS = 120.0  # how long a process is waited for that is being started again


class Target(StrEnum):
    GCS = "gcs_server"
    RAYLET = "raylet"
    DRIVER = "driver"
    ENGINE = "engine core"
    RANK = "trainer rank"
    HEAD = "head pod"
    WORKER = "worker pod"
    NODE = "node"
    CLUSTER = "RayCluster"
    OPERATOR = "operator"
    API = "API server"


class How(StrEnum):
    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    SEGV = "SIGSEGV"
    DELETE = "delete"
    FORCE = "force-delete"
    DRAIN = "drain"  # the eviction API, as kubectl drain uses it


class Moment(StrEnum):
    STARTING = "starting"
    GENERATING = "generating"
    TRAINING = "training"
    SYNCING = "syncing"
    SAVING = "saving"
    IDLE = "idle"


@dataclass(frozen=True)
class Fault:
    how: How
    target: Target
    moment: Moment
    unattended: bool = False  # the operator is replaced at the same time

    def __str__(self) -> str:
        return f"{self.how} of {self.target}{_UNATTENDED if self.unattended else ''}"


@dataclass(frozen=True)
class Process:
    pid: int  # this machine's number for it
    arguments: tuple[str, ...]


PROCESSES = (Target.GCS, Target.RAYLET, Target.DRIVER, Target.ENGINE, Target.RANK, Target.OPERATOR, Target.API)
PODS = (Target.HEAD, Target.WORKER)
_UNATTENDED = ", operator replaced"
SIGNALS = {How.KILL: signal.SIGKILL, How.STOP: signal.SIGSTOP, How.SEGV: signal.SIGSEGV}
# A stopped engine, rank or driver is found and ended; what else is stopped goes on after a while, as on a machine that
# was frozen.
_STAYS_STOPPED = (Target.ENGINE, Target.RANK, Target.DRIVER)
# Ray's names for its processes; "ray::" is how it titles an actor's, vLLM titles its engines' own.
_NAMES: dict[Target, Callable[[str], bool]] = {
    Target.GCS: lambda line: line.partition(" ")[0].endswith("/gcs_server"),
    Target.RAYLET: lambda line: line.partition(" ")[0].endswith("/raylet"),
    Target.DRIVER: lambda line: "rlhf_worker run" in line,
    Target.ENGINE: lambda line: line.startswith("VLLM::EngineCore"),
    Target.RANK: lambda line: line.startswith("ray::Policy"),
    Target.OPERATOR: lambda line: "-m rlhf_operator" in line,
}


def possible() -> list[tuple[How, Target]]:
    """Each fault that there is, whatever the moment."""
    signals = [(how, target) for target in PROCESSES for how in SIGNALS]
    return [
        *signals,
        *[(how, target) for target in PODS for how in (How.DELETE, How.FORCE, How.DRAIN)],
        (How.DRAIN, Target.NODE),
        (How.DELETE, Target.CLUSTER),
        (How.DELETE, Target.OPERATOR),
    ]


def named(text: str) -> Fault:
    """As a fault prints itself, with its moment: "SIGKILL of raylet@training". Raises ValueError for one there is not.
    """
    what, _, moment = text.partition("@")
    how, _, target = what.removesuffix(_UNATTENDED).partition(" of ")
    fault = Fault(How(how), Target(target), Moment(moment or Moment.TRAINING), what.endswith(_UNATTENDED))
    if (fault.how, fault.target) not in possible():
        raise ValueError(f"there is no {fault.how} of {fault.target}")
    return fault


# --- moments ----------------------------------------------------------------------------------------------------

# Ray titles the process of an actor with the call that it is in.
_DOING = {
    Moment.GENERATING: ("ray::Engine.generate",),
    Moment.TRAINING: ("ray::Policy.train", "ray::Policy.logprobs"),
    Moment.SYNCING: (
        "ray::Policy.send",
        "ray::Policy.probe",
        "ray::Engine.pause",
        "ray::Engine.adopt",
        "ray::Engine.probe",
    ),
    Moment.SAVING: ("ray::Policy.save",),
}


def moment_of(progress: Object) -> Moment | None:
    """What the driver says that it does, where that is a moment: the phases of a step are too short to be reported."""
    match progress.get("state"):
        case "Starting":
            return Moment.STARTING
        case "Draining":
            return Moment.SAVING
        case "Drained" | "Done":
            return Moment.IDLE
    return None


def moment_in(titles: list[str]) -> Moment | None:
    """What the actors do, by the titles of their processes. A save or a sync shows beside generation that goes on."""
    order = (Moment.SAVING, Moment.SYNCING, Moment.TRAINING, Moment.GENERATING)
    return next((moment for moment in order if any(title in _DOING[moment] for title in titles)), None)


def catch(pods: list[Object], moment: Moment, seconds: float) -> str:
    """Wait until the actors in these pods are at the moment; returns their titles then, empty when it did not come."""
    deadline = time.monotonic() + seconds
    found = [process for pod in pods for process in processes(pod["metadata"]["uid"])]
    actors = [Path("/proc") / str(process.pid) for process in found if process.arguments[0].startswith("ray::")]
    while time.monotonic() < deadline:
        titles = [title for actor in actors if (title := _title(actor))]
        if moment_in(titles) is moment:
            return ", ".join(title for title in titles if "." in title)
        time.sleep(0.002)
    return ""


def _title(directory: Path) -> str:
    try:
        return _line(directory)
    except OSError:
        return ""


# --- processes --------------------------------------------------------------------------------------------------


def processes(pod_uid: str) -> list[Process]:
    """Those of a pod, in the order of their numbers."""
    return sorted(_processes(lambda cgroup: f"pod{pod_uid}" in cgroup), key=lambda process: process.pid)


def _processes(belongs: Callable[[str], bool]) -> Iterator[Process]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if belongs((directory / "cgroup").read_text()):
                yield Process(int(directory.name), tuple(_line(directory).split("\0")))
        except OSError:
            continue  # it ended meanwhile


def _line(directory: Path) -> str:
    """NUL-separated; a title that a process gave itself is padded with them."""
    return (directory / "cmdline").read_text(errors="replace").rstrip("\0")


def left_behind(cfg: Settings, living: set[str]) -> list[Process]:
    """Processes of pods of this cluster that are not among the uids `living`."""

    def orphaned(cgroup: str) -> bool:
        return cfg.cgroup in cgroup and "/pod" in cgroup and not any(f"pod{uid}" in cgroup for uid in living)

    return list(_processes(orphaned))


def find(target: Target, pods: list[Object]) -> Process | None:
    """The target's first process in these pods."""
    found = (process for pod in pods for process in processes(pod["metadata"]["uid"]))
    return next((process for process in found if _NAMES[target](" ".join(process.arguments))), None)


def api_server(cfg: Settings) -> Process | None:
    mark = f"--token-auth-file={cfg.state / 'credentials' / 'tokens.csv'}"
    return next((process for process in _processes(lambda _: True) if mark in process.arguments), None)


# --- pods -------------------------------------------------------------------------------------------------------


def pods_of(api: Api, namespace: str, job: str) -> list[Object]:
    found: list[Object] = api.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={JOB_LABEL}%3D{job}")["items"]
    return found


def operator_pods(api: Api) -> list[Object]:
    """The leader's first, by its Lease."""
    selector = "app.kubernetes.io%2Fname%3Drlhf-operator"
    found: list[Object] = api.get(f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/pods?labelSelector={selector}")["items"]
    lease = api.find(f"/apis/coordination.k8s.io/v1/namespaces/{OPERATOR_NAMESPACE}/leases/rlhf-operator") or {}
    leader = str(lease.get("spec", {}).get("holderIdentity") or "")
    return sorted(found, key=lambda pod: not leader.startswith(pod["metadata"]["name"]))


def holders(api: Api, target: Target, namespace: str, job: str) -> list[Object]:
    """The pods in which the target is, or which it is."""
    if target is Target.OPERATOR:
        return operator_pods(api)
    pods = [pod for pod in pods_of(api, namespace, job) if not pod["metadata"].get("deletionTimestamp")]
    in_head = target in (Target.GCS, Target.DRIVER, Target.HEAD)
    return [pod for pod in pods if (pod["metadata"]["labels"].get(ROLE_LABEL) == "head") is in_head]


# --- injecting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """A fault that is aimed at its victim. A pause ends by itself."""

    victim: str
    fire: Callable[[], None]


def inject(cfg: Settings, namespace: str, job: str, how: How, target: Target) -> str:
    """Aim and fire at once; returns the victim. Raises LookupError when the target is not there in time."""
    shot = aim(cfg, namespace, job, how, target)
    shot.fire()
    return shot.victim


def aim(cfg: Settings, namespace: str, job: str, how: How, target: Target) -> Shot:
    """Find the victim, so that firing takes no time. Raises LookupError when the target is not there in time."""
    api = Api.from_kubeconfig(cfg.kubeconfig)
    if target is Target.CLUSTER:
        path = _cluster(api, namespace, job)
        return Shot(path.rpartition("/")[2], lambda: api.delete(path))
    if target is Target.NODE:
        return _drain(api, namespace, job)
    if how not in SIGNALS:
        pod = _first(holders(api, target, namespace, job), target)
        return Shot(str(pod["metadata"]["name"]), lambda: _end_pod(api, pod, how))
    process = _await_process(cfg, api, namespace, job, target)
    line = f"{process.pid} {' '.join(process.arguments)[:60]}"
    return Shot(line, lambda: _signal(process, how, stays=target in _STAYS_STOPPED))


def _drain(api: Api, namespace: str, job: str) -> Shot:
    """The node takes nothing new while this job's pods are evicted from it, and is given back when they are gone."""
    pods = pods_of(api, namespace, job)
    node = str(_first(pods, Target.NODE)["spec"]["nodeName"])

    def fire() -> None:
        _cordon(api, node, True)
        uids = {pod["metadata"]["uid"] for pod in pods}
        Thread(target=_give_back, args=(api, node, uids), name="node").start()
        for pod in pods:
            _end_pod(api, pod, How.DRAIN)

    return Shot(node, fire)


def _give_back(api: Api, node: str, evicted: set[str]) -> None:
    deadline, cordoned = time.monotonic() + _DRAIN_SECONDS, True
    while cordoned:
        time.sleep(0.5)
        with suppress(ApiError):  # the API server may be struck meanwhile
            left = evicted & {pod["metadata"]["uid"] for pod in api.get("/api/v1/pods")["items"]}
            if not left or time.monotonic() > deadline:
                _cordon(api, node, False)
                cordoned = False


def _cordon(api: Api, node: str, value: bool) -> None:
    api.patch(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": value}})


def _signal(process: Process, how: How, *, stays: bool) -> None:
    os.kill(process.pid, SIGNALS[how])
    if how is How.STOP and not stays:
        Timer(PAUSE_SECONDS, _continue, [process]).start()


def _continue(process: Process) -> None:
    with suppress(ProcessLookupError):  # something has killed it meanwhile
        os.kill(process.pid, signal.SIGCONT)


def _await_process(cfg: Settings, api: Api, namespace: str, job: str, target: Target) -> Process:
    deadline = time.monotonic() + _PROCESS_SECONDS
    while time.monotonic() < deadline:
        found = api_server(cfg) if target is Target.API else find(target, holders(api, target, namespace, job))
        if found:
            return found
        time.sleep(0.2)
    raise LookupError(f"no process of the {target} within {_PROCESS_SECONDS:.0f} s")


def _first(pods: list[Object], target: Target) -> Object:
    if not pods:
        raise LookupError(f"no {target}")
    return pods[0]


def _end_pod(api: Api, pod: Object, how: How) -> None:
    meta = {"name": pod["metadata"]["name"], "namespace": pod["metadata"]["namespace"]}
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
    if how is How.DRAIN:
        api.create(f"{path}/eviction", {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta})
    else:
        api.delete(path, {"gracePeriodSeconds": 0} if how is How.FORCE else None)


def _cluster(api: Api, namespace: str, job: str) -> str:
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters"
    found = api.get(f"{path}?labelSelector={JOB_LABEL}%3D{job}")["items"]
    if not found:
        raise LookupError("no RayCluster")
    return f"{path}/{found[0]['metadata']['name']}"


def job_status(api: Api, namespace: str, job: str) -> Object:
    """Of the RLHFJob; empty where it has none, or the API server does not answer."""
    try:
        found: Object = api.get(f"/apis/rlhf.dev/v1alpha1/namespaces/{namespace}/rlhfjobs/{job}").get("status") or {}
    except ApiError:
        return {}
    return found
