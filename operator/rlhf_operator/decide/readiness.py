"""Why the cluster is not ready: the worst that its pods, its RayCluster and the Events about them tell."""

from collections.abc import Callable, Iterable, Iterator

from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.verdict import Verdict, no, yes
from rlhf_operator.names import DRIVER_CONTAINER
from rlhf_operator.observed import Container, Pod

IMAGE_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
)
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError")
CRASH_REASONS = ("CrashLoopBackOff",)
WORDS_MAX = 1024


def explain(f: Facts) -> Verdict:
    """The condition ClusterReady."""
    cluster = f.cluster
    if f.record.result and (cluster is None or cluster.deleting):
        return no("Finished", "the job has ended and needs no RayCluster any more")
    if cluster is None:
        return _absent(f)
    if cluster.deleting:
        return no("Deleted", f"RayCluster {cluster.name} is being deleted")
    if cluster.suspended:
        return no("Suspended", f"the queue holds RayCluster {cluster.name} back")
    if f.ready:
        return yes("AllPodsReady", "the head and every worker pod are ready")
    return next((found for rule in LADDER if (found := rule(f))), None) or no(
        "Creating", f"waiting for the pods of RayCluster {cluster.name}"
    )


def _absent(f: Facts) -> Verdict:
    if f.old_clusters or f.old_pods:
        return no(
            "WaitingForOldPods", f"{len(f.old_pods)} pods of an earlier RayCluster are still there: {names(f.old_pods)}"
        )
    return no("NotCreated", "there is no RayCluster")


def names(pods: Iterable[Pod]) -> str:
    """Of a few; the rest is counted."""
    all_names = sorted(p.name for p in pods)
    rest = f" and {len(all_names) - 3} more" if len(all_names) > 3 else ""
    return ", ".join(all_names[:3]) + rest


def _containers(f: Facts) -> Iterator[tuple[Pod, Container]]:
    """Ray's and init containers. The driver's ends are not the cluster's, but an image or a Secret it lacks is."""
    for pod in f.pods:
        for container in (*pod.init_containers, *pod.containers):
            if container.name != DRIVER_CONTAINER or container.waiting_reason not in CRASH_REASONS:
                yield pod, container


def _waiting(reasons: tuple[str, ...], reason: str) -> Callable[[Facts], Verdict | None]:
    def rule(f: Facts) -> Verdict | None:
        for pod, container in _containers(f):
            if container.waiting_reason in reasons:
                return no(reason, f"pod {pod.name}, container {container.name}: {_words(container)}"[:WORDS_MAX])
        return None

    return rule


def _words(container: Container) -> str:
    """A crash loop's own message only tells the back-off; the last end tells more."""
    told = container.last.message if container.waiting_reason in CRASH_REASONS and container.last else ""
    return f"{container.waiting_reason}: {told or container.waiting_message}"


def _refused(f: Facts) -> Verdict | None:
    """KubeRay tells a spec it will not take by an Event alone."""
    complaint = next((c for c in f.observed.complaints if f.cluster and c.uid == f.cluster.uid), None)
    return (
        no("InvalidRayCluster", f"KubeRay refuses the RayCluster: {complaint.message}"[:WORDS_MAX])
        if complaint
        else None
    )


def _replica_failure(f: Facts) -> Verdict | None:
    told = f.cluster.condition("ReplicaFailure") if f.cluster else None
    if told is None or told.status != "True":
        return None
    return no(
        "QuotaExceeded" if "exceeded quota" in told.message else "ReplicaFailure",
        f"{told.reason}: {told.message}"[:WORDS_MAX],
    )


def _unschedulable(f: Facts) -> Verdict | None:
    for pod in f.pods:
        if not pod.scheduled and pod.unscheduled_reason:
            reason = "WaitingForGang" if pod.unscheduled_reason == "SchedulingGated" else "Unschedulable"
            return no(reason, f"pod {pod.name}: {pod.unscheduled_message or pod.unscheduled_reason}"[:WORDS_MAX])
    return None


def _mount(f: Facts) -> Verdict | None:
    """A volume that does not come is told by an Event of the pod alone."""
    for pod in f.pods:
        if complaint := next((c for c in f.observed.complaints if c.uid == pod.uid), None):
            return no(complaint.reason, f"pod {pod.name}: {complaint.message}"[:WORDS_MAX])
    return None


def _head(f: Facts) -> Verdict | None:
    if f.head is None or f.head.ray_ready or not f.record.ready_at:
        return None
    return no("HeadNotReady", f"Ray in the head pod {f.head.name} is not ready")


def _workers(f: Facts) -> Verdict | None:
    if f.head is None or not f.head.ray_ready:
        return None
    lacking = [
        f"{group.pods - f.missing(group)} of {group.pods} {group.name}" for group in f.groups if f.missing(group) > 0
    ]
    return no("WorkersMissing", f"ready worker pods: {', '.join(lacking)}") if lacking else None


LADDER: tuple[Callable[[Facts], Verdict | None], ...] = (
    _waiting(IMAGE_REASONS, "ImagePullFailed"),
    _waiting(CONFIG_REASONS, "ContainerConfigFailed"),
    _waiting(CRASH_REASONS, "ContainerCrashing"),
    _refused,
    _replica_failure,
    _unschedulable,
    _mount,
    _head,
    _workers,
)
