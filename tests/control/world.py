"""The world around one job: KubeRay, the kubelet, the driver and the clock, each moved by hand. And the operator, which
runs until it rests.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from rlhf_operator.client import ApiError
from rlhf_operator.clock import stamp
from rlhf_operator.cluster import ClusterIO
from rlhf_operator.kinds import EVENTS, JOBS, LOCAL_QUEUES, PODS, RAYCLUSTERS, WORKLOADS
from rlhf_operator.names import DRIVER_CONTAINER, JOB_LABEL, RAY_CONTAINER, ROLE_LABEL, WORKLOAD_UID_LABEL
from rlhf_operator.observed import owner_uid
from rlhf_operator.reconcile import reconcile
from tests.api.specs import a_job
from tests.control.memory_api import Killed, MemoryApi

Raw = dict[str, Any]
START = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
MOST_PASSES = 30
LOW_ON_MEMORY = "The node was low on resource: memory."
RUNNER = asyncio.Runner()


class World:
    def __init__(self, **changes: Any) -> None:
        self.api = MemoryApi(START)
        self.job_raw = self.api.put(
            JOBS, a_job(**{"name": "sample", "checkpoint": {"path": "s3://bucket/run"}, **changes}),
        )
        self.job_raw["metadata"]["generation"] = 1
        self.errors: list[str] = []
        self.wake: datetime | None = None  # when the operator wants to look again
        self._pods = 0

    # the operator

    def settle(self) -> None:
        """Passes until one changes nothing and asks for none. A killed operator starts again."""
        for _ in range(MOST_PASSES):
            before = len(self.api.writes)
            try:
                wake = self.wake = RUNNER.run(
                    reconcile(ClusterIO(self.api, self.api.store), ("default", "sample"), lambda: self.api.now)
                )
            except Killed:
                self.api.dead, self.api.kill_at = False, None
                continue
            except ApiError as error:
                self.errors.append(str(error))
                return
            if len(self.api.writes) == before and (wake is None or wake > self.api.now):
                return
        raise AssertionError(f"the operator does not come to rest: {self.api.writes[-6:]}")

    # what is there

    @property
    def status(self) -> Raw:
        found: Raw = self.job_raw.get("status", {})
        return found

    @property
    def record(self) -> Raw:
        found: Raw = self.status.get("record", {})
        return found

    def condition(self, kind: str) -> tuple[str, str]:
        return next((c["status"], c["reason"]) for c in self.status["conditions"] if c["type"] == kind)

    def clusters(self) -> list[str]:
        return [c["metadata"]["name"] for c in self.api.of(RAYCLUSTERS)]

    def events(self) -> list[str]:
        return [f"{e['type']} {e['reason']}: {e['message']}" for e in self.api.of(EVENTS)]

    def pods(self, role: str = "") -> list[Raw]:
        return [p for p in self.api.of(PODS) if role in ("", p["metadata"]["labels"].get(ROLE_LABEL))]

    def head(self) -> Raw:
        """The newest."""
        return max(self.pods("head"), key=lambda p: p["metadata"]["creationTimestamp"] + p["metadata"]["name"])

    # the user and the clock

    def later(self, seconds: float) -> None:
        self.api.now += timedelta(seconds=seconds)

    def edit(self, **spec: Any) -> None:
        self.job_raw["spec"].update(spec)
        self.job_raw["metadata"]["generation"] += 1

    def delete(self) -> None:
        """The job, as kubectl does: a finalizer holds it."""
        self.api.vanish(JOBS, self.job_raw)

    # KubeRay and the kubelet

    def kuberay(self) -> None:
        """Pods for every RayCluster that may have some and lacks them; none for one that is suspended."""
        for cluster in self.api.of(RAYCLUSTERS):
            cluster["status"] = {"head": {"serviceName": f"{cluster['metadata']['name']}-head-svc"}}
            mine = [p for p in self.pods() if owner_uid(p) == cluster["metadata"]["uid"]]
            if cluster["spec"].get("suspend"):
                for pod in mine:
                    pod["metadata"].setdefault("deletionTimestamp", stamp(self.api.now))
                continue
            alive = [p["metadata"]["labels"][ROLE_LABEL] for p in mine if "deletionTimestamp" not in p["metadata"]]
            for role, wanted in {
                "head": 1, **{g["groupName"]: g["replicas"] for g in cluster["spec"]["workerGroupSpecs"]}
            }.items():
                for _ in range(wanted - alive.count(role)):
                    self._pod(cluster, role)

    def _pod(self, cluster: Raw, role: str) -> None:
        self._pods += 1
        names = [RAY_CONTAINER, DRIVER_CONTAINER] if role == "head" else [RAY_CONTAINER]
        waiting = {"state": {"waiting": {"reason": "ContainerCreating"}}, "ready": False, "restartCount": 0}
        meta = cluster["metadata"]
        owner = {
            "apiVersion": "ray.io/v1", "kind": "RayCluster", "name": meta["name"], "uid": meta["uid"],
            "controller": True,
        }
        self.api.put(PODS, {
            "metadata": {
                "name": f"{cluster['metadata']['name']}-{role}-{self._pods}",
                "labels": {JOB_LABEL: "sample", ROLE_LABEL: role},
                "ownerReferences": [owner],
            },
            "status": {
                "phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}],
                "containerStatuses": [{"name": name, **waiting} for name in names],
            },
        })

    def start_pods(self) -> None:
        """Every container of every pod that stays runs and is ready."""
        for pod in self.pods():
            if "deletionTimestamp" not in pod["metadata"]:
                self.start(pod)

    def start(self, pod: Raw) -> None:
        pod["status"]["phase"] = "Running"
        for container in pod["status"]["containerStatuses"]:
            if "running" not in container["state"]:
                self._run(container)

    def up(self) -> None:
        self.kuberay()
        self.start_pods()

    def reap(self) -> None:
        """Pods that were told to go are gone."""
        for pod in self.pods():
            if "deletionTimestamp" in pod["metadata"]:
                self.api.remove(PODS, pod["metadata"]["name"])

    def reap_workers(self) -> None:
        for pod in self.pods("trainer"):
            self.api.remove(PODS, pod["metadata"]["name"])

    def container(self, pod: Raw, name: str) -> Raw:
        return next(c for c in pod["status"]["containerStatuses"] if c["name"] == name)

    def _run(self, container: Raw) -> None:
        container.update(state={"running": {"startedAt": stamp(self.api.now)}}, ready=True)

    def ends(self, pod: Raw, name: str, code: int, message: str = "", reason: str = "") -> None:
        """The container's run ends; it waits for its restart."""
        container = self.container(pod, name)
        ended = {
            "exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "message": message,
            "startedAt": container["state"].get("running", {}).get("startedAt"), "finishedAt": stamp(self.api.now),
        }
        container.update(state={"terminated": ended}, ready=False)

    def restarts(self, pod: Raw, name: str) -> None:
        container = self.container(pod, name)
        container["lastState"] = container["state"]
        container["restartCount"] += 1
        self._run(container)

    def waits(self, pod: Raw, name: str, reason: str, message: str = "") -> None:
        self.container(pod, name).update(state={"waiting": {"reason": reason, "message": message}}, ready=False)

    def waits_after_crash(self) -> None:
        """The driver's back-off: the kubelet moves the end to lastState and counts no restart yet."""
        container = self.container(self.head(), DRIVER_CONTAINER)
        container["lastState"] = container["state"]
        container["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed "
            "container"}}

    def disrupt(self, pod: Raw, reason: str, message: str) -> None:
        condition = {
            "type": "DisruptionTarget", "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": stamp(self.api.now),
        }
        pod["status"]["conditions"].append(condition)
        pod["metadata"]["deletionTimestamp"] = stamp(self.api.now)

    def evict(self, pod: Raw) -> None:
        """By the kubelet, for want of memory on the node: the pod stays as Failed until somebody deletes it."""
        condition = {
            "type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": LOW_ON_MEMORY,
        }
        pod["status"]["conditions"].append(condition | {"lastTransitionTime": stamp(self.api.now)})
        pod["status"] |= {"phase": "Failed", "reason": "Evicted", "message": LOW_ON_MEMORY}
        for container in pod["status"]["containerStatuses"]:
            if "running" in container["state"]:
                self.ends(pod, container["name"], 137)

    def delete_cluster(self) -> None:
        (cluster,) = self.api.of(RAYCLUSTERS)
        self.api.vanish(RAYCLUSTERS, cluster)

    # Kueue

    def kueue(self, queue: str | None) -> None:
        """Installed, with this LocalQueue."""
        self.api.absent -= {"localqueues", "workloads"}
        if queue:
            self.api.put(LOCAL_QUEUES, {"metadata": {"name": queue}})

    def workload(self, kind: str, status: str, reason: str, message: str) -> None:
        (cluster,) = self.api.of(RAYCLUSTERS)
        condition = {"type": kind, "status": status, "reason": reason, "message": message}
        labels = {WORKLOAD_UID_LABEL: cluster["metadata"]["uid"]}
        self.api.put(
            WORKLOADS, {"metadata": {"name": "workload", "labels": labels}, "status": {"conditions": [condition]}},
        )

    def admit(self, admitted: bool) -> None:
        (cluster,) = self.api.of(RAYCLUSTERS)
        cluster["spec"]["suspend"] = not admitted

    # the driver

    def driver_ends(self, code: int, message: str = "", reason: str = "") -> None:
        self.ends(self.head(), DRIVER_CONTAINER, code, message, reason)

    def driver_restarts(self) -> None:
        self.restarts(self.head(), DRIVER_CONTAINER)

    def report(self, state: str = "Training", step: int = 0, **more: Any) -> None:
        """As the driver does: status.progress and nothing else."""
        now = stamp(self.api.now)
        told = {
            "state": state, "step": step, "totalSteps": 10, "reportTime": now, **({"stepTime": now} if step else {}),
            **more,
        }
        whose = {"podUid": self.head()["metadata"]["uid"]} if self.pods("head") else {}
        self.job_raw.setdefault("status", {})["progress"] = {**whose, **told}

    def warn(self, uid: str, reason: str, message: str) -> None:
        name = f"event-{len(self.events())}"
        self.api.put(
            EVENTS,
            {
                "metadata": {"name": name}, "involvedObject": {"uid": uid}, "type": "Warning", "reason": reason,
                "message": message,
            },
        )


def running(**changes: Any) -> World:
    """A job in its third step."""
    world = World(**changes)
    world.settle()
    world.up()
    world.later(10)
    world.settle()
    world.later(10)
    world.report(step=3)
    world.settle()
    assert world.status["phase"] == "Running", world.status
    return world
