"""Lives of a job. Each is a generator that changes the world and then yields what happened in words; after each word
the operator settles. The same stories are told (golden logs) and survived (killed after, and before, every single
write).
"""

from collections.abc import Callable, Iterator

from rlhf_operator.client import ApiError
from rlhf_operator.kinds import RAYCLUSTERS
from tests.control.world import World

Story = Callable[[World], Iterator[str]]
QUEUED = {"queue": {"name": "team-a"}}


def _training(w: World, step: int = 3) -> Iterator[str]:
    yield "the job is applied"
    w.kuberay()
    yield "KubeRay makes the pods"
    w.start_pods()
    yield "every container runs"
    w.later(5)
    w.report("Starting")
    yield "the driver reports that it starts"
    w.later(5)
    w.report(step=step)
    yield f"step {step} is finished"


def success(w: World) -> Iterator[str]:
    yield from _training(w)
    w.later(30)
    w.report(
        step=10, checkpoint={"step": 10, "path": "/c/10", "time": "2026-01-01T12:00:40Z"},
        sync={"version": 10, "seconds": "0.1", "backend": "gloo", "verifiedVersion": 10},
    )
    yield "the last step is finished"
    w.driver_ends(0)
    yield "the driver ends with 0"
    w.reap()
    yield "the pods are gone"


def driver_crash(w: World) -> Iterator[str]:
    yield from _training(w)
    w.later(5)
    w.driver_ends(1, "ValueError: advantages are not finite")
    yield "the driver crashes"
    w.waits_after_crash()
    yield "it backs off"
    w.later(10)
    w.driver_restarts()
    yield "it restarts"
    w.later(5)
    w.report("Starting", step=3, resumedFromStep=3)
    yield "it loads its checkpoint"
    w.later(5)
    w.report(step=4)
    yield "step 4 is finished"
    w.driver_ends(0)
    w.reap()
    yield "it ends with 0"


def head_lost(w: World) -> Iterator[str]:
    yield from _training(w)
    w.later(5)
    w.ends(w.head(), "ray", 137)
    w.later(2)
    w.restarts(w.head(), "ray")
    yield "Ray in the head is killed and restarts in place"
    w.later(8)
    w.driver_ends(1, "RaySystemError: the GCS is gone")
    yield "the driver ends of it"
    w.later(10)
    w.driver_restarts()
    yield "the driver restarts"
    w.later(5)
    w.report(step=4)
    yield "step 4 is finished"


def preempted(w: World) -> Iterator[str]:
    yield from _training(w)
    w.later(5)
    w.disrupt(w.head(), "PreemptionByScheduler", "preempted to make room for a pod of higher priority")
    yield "the scheduler preempts the head pod"
    w.driver_ends(143, "SIGTERM: saved at step 3")
    w.reap()
    w.kuberay()
    yield "it is gone, KubeRay makes another"
    w.later(20)
    w.start_pods()
    yield "it runs"
    w.later(5)
    w.report(step=4)
    yield "step 4 is finished"


def stalled(w: World) -> Iterator[str]:
    yield from _training(w)
    w.later(3601)
    yield "an hour without a step"
    w.reap()
    w.up()
    yield "the head pod is replaced"
    w.later(5)
    w.report(step=4)
    yield "step 4 is finished"


def too_many_crashes(w: World) -> Iterator[str]:
    w.edit(runPolicy={"backoffLimit": 1, "cleanup": {"onFailure": "Keep"}})
    yield from _training(w)
    for attempt in (1, 2):
        w.later(5)
        w.driver_ends(1, "ValueError: advantages are not finite")
        yield f"crash {attempt}"
        w.driver_restarts()
        yield "it restarts"


def refused_by_driver(w: World) -> Iterator[str]:
    yield from _training(w)
    w.driver_ends(64, "InvalidSpec: model.path: /models/none does not exist: mount a volume that has it "
        "(pods.trainer.volumes)")
    yield "the driver ends with 64"
    w.reap()
    yield "the pods are gone"


def suspend_and_resume(w: World) -> Iterator[str]:
    yield from _training(w)
    w.edit(suspend=True)
    yield "spec.suspend: true"
    w.later(5)
    w.report("Draining", step=4)
    yield "the driver saves"
    w.later(5)
    w.report("Drained", step=4)
    yield "the driver has drained"
    w.reap()
    yield "the pods are gone"
    w.later(3600)
    w.edit(suspend=False)
    yield "spec.suspend: false"
    w.later(5)
    w.up()
    yield "the pods run"
    w.later(5)
    w.report(step=5)
    yield "step 5 is finished"


def cluster_deleted(w: World) -> Iterator[str]:
    yield from _training(w)
    w.delete_cluster()
    yield "somebody deletes the RayCluster"
    w.reap()
    yield "the pods are gone"
    w.later(5)
    w.up()
    yield "the pods run"
    w.later(5)
    w.report(step=4)
    yield "step 4 is finished"


def queued_and_evicted(w: World) -> Iterator[str]:
    w.edit(**QUEUED)
    w.kueue(queue=None)
    yield "the job is applied, without its queue"
    w.kueue(queue="team-a")
    w.later(60)
    yield "the queue is made"
    w.workload("QuotaReserved", "False", "Pending", "couldn't assign flavors: insufficient quota for nvidia.com/gpu")
    yield "there is no quota"
    w.admit(True)
    w.up()
    w.later(5)
    w.report(step=3)
    yield "the queue admits the job; it trains"
    w.admit(False)
    w.workload("Evicted", "True", "Preempted", "preempted by a job of higher priority")
    w.kuberay()
    yield "the queue takes the quota back"
    w.reap()
    w.later(600)
    yield "the pods are gone"
    w.admit(True)
    w.up()
    yield "the queue admits the job again"
    w.later(5)
    w.report(step=4)
    yield "step 4 is finished"


def worker_preempted(w: World) -> Iterator[str]:
    yield from _training(w)
    w.later(5)
    w.disrupt(w.pods("trainer")[0], "PreemptionByScheduler", "preempted to make room for a pod of higher priority")
    yield "the scheduler preempts the trainer's pod, which tells the driver"
    w.later(20)
    w.driver_ends(143, "Terminated: pod sample-1-trainer-2 goes: saved after step 3")
    yield "the driver has saved and ends"
    w.reap()
    w.kuberay()
    w.driver_restarts()
    yield "the pod is gone, KubeRay makes another"
    w.later(7200)
    yield "for two hours there is no room"
    w.start_pods()
    w.later(5)
    w.report(step=4, resumedFromStep=3)
    yield "there is room again; step 4 is finished"


def suspend_refused(w: World) -> Iterator[str]:
    w.edit(checkpoint={"path": "/checkpoints"})
    yield from _training(w)
    w.edit(suspend=True)
    yield "spec.suspend: true, with checkpoints in the trainer's pod"
    w.later(5)
    w.report(step=4)
    yield "the run goes on: step 4 is finished"
    w.edit(checkpoint={"path": "/checkpoints", "ephemeral": True})
    yield "spec.checkpoint.ephemeral: true"
    w.report("Drained", step=4)
    yield "the driver has drained"
    w.reap()
    yield "the pods are gone"


def stuck_head(w: World) -> Iterator[str]:
    yield from _training(w)
    w.disrupt(w.head(), "DeletionByTaintManager", "the node does not answer")
    yield "the node is cut off; its pod is to go"
    w.later(290)
    yield "no kubelet ends it"
    w.later(11)
    yield "it is overdue by five minutes"
    w.up()
    w.later(5)
    w.report(step=4)
    yield "another head runs; step 4 is finished"


def kept_for_a_look(w: World) -> Iterator[str]:
    w.edit(runPolicy={"backoffLimit": 0, "cleanup": {"onFailure": "Keep"}})
    yield from _training(w)
    w.driver_ends(1, "ValueError: advantages are not finite")
    yield "the driver crashes once too often"
    w.later(10)
    w.driver_restarts()
    yield "the kubelet restarts it"
    w.later(2)
    w.driver_ends(0)
    yield "it reads that the job has failed, and ends with 0"
    w.later(86400)
    yield "a day later"


def final_save(w: World) -> Iterator[str]:
    w.edit(runPolicy={"finalSave": True})
    yield from _training(w)
    w.delete()
    yield "kubectl delete"
    w.later(5)
    w.report("Draining", step=4)
    yield "the driver saves"
    w.later(5)
    w.report("Drained", step=4)
    yield "the driver has drained"


def unreadable_spec(w: World) -> Iterator[str]:
    yield from _training(w)
    w.edit(trainer={"steps": "as many as it takes"})
    yield "the spec turns into what this operator cannot read"
    w.later(5)
    w.driver_ends(1, "ValueError: advantages are not finite")
    yield "the driver crashes"
    w.later(10)
    w.driver_restarts()
    w.later(5)
    w.report(step=4)
    yield "it restarts; step 4 is finished"
    w.driver_ends(0)
    yield "it ends with 0"
    w.reap()
    yield "the pods are gone"


def never_provided_again(w: World) -> Iterator[str]:
    w.edit(runPolicy={"reprovisioningDeadlineSeconds": 7200})
    yield from _training(w)
    w.disrupt(w.head(), "DeletionByTaintManager", "the node does not answer")
    w.reap()
    w.kuberay()
    yield "the head's node is lost"
    w.later(3601)
    yield "an hour later there is no other"
    w.later(3600)
    yield "another hour later"
    w.reap()
    yield "the pods are gone"


def never_scheduled(w: World) -> Iterator[str]:
    yield "the job is applied"
    w.kuberay()
    for pod in w.pods("trainer"):
        words = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
        pod["status"] = {"phase": "Pending", "conditions": [condition]}
    yield "the scheduler finds no node"
    w.later(3601)
    yield "an hour later"
    w.reap()
    yield "the pods are gone"


def invalid_override(w: World) -> Iterator[str]:
    w.edit(pods={"trainer": {"restartPolicy": "Never"}})
    yield "the job is applied with an override that breaks it"
    w.edit(pods={"trainer": {"nodeSelector": {"gpu": "h200"}}})
    yield "the override is corrected"


def refused_by_api_server(w: World) -> Iterator[str]:
    w.api.refuse["RayCluster"] = ApiError(400, "BadRequest", 'strict decoding error: unknown field '
        '"spec.headGroupSpec.template.spec.tolerationz"')
    yield "the API server refuses the RayCluster"
    del w.api.refuse["RayCluster"]
    w.later(61)
    yield "a minute later it takes it"


def name_conflict(w: World) -> Iterator[str]:
    w.api.put(RAYCLUSTERS, {"metadata": {"name": "sample-1"}})
    yield "a RayCluster of another has the name"


def no_kuberay(w: World) -> Iterator[str]:
    w.api.absent.add("rayclusters")
    yield "KubeRay is not installed"
    w.api.absent.remove("rayclusters")
    w.later(61)
    yield "now it is"


def old_kuberay(w: World) -> Iterator[str]:
    w.api.refuse["RayCluster"] = ApiError(400, "BadRequest", 'strict decoding error: unknown field "spec.authOptions"')
    yield "KubeRay's CRD lacks a field that is set"
    del w.api.refuse["RayCluster"]
    w.later(61)
    yield "a minute after it was upgraded"


STORIES: dict[str, Story] = {
    story.__name__: story for story in (
        success, driver_crash, head_lost, preempted, stalled, too_many_crashes, refused_by_driver, suspend_and_resume,
        cluster_deleted,
        worker_preempted, suspend_refused, stuck_head, kept_for_a_look, final_save, unreadable_spec,
        never_provided_again,
        queued_and_evicted, never_scheduled, invalid_override, refused_by_api_server, name_conflict, no_kuberay,
        old_kuberay,
    )
}
