"""The loop: watches wake it, and it makes the pods of one RayCluster at a time what the spec asks for."""

from __future__ import annotations

import logging
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hack.cluster.kube import Api, ApiError, Object
from hack.cluster.kuberay_standin import checks, names, objects, pods, status
from hack.cluster.kuberay_standin.status import ReconcileFailure

log = logging.getLogger("kuberay-standin")
_RETRY = 2.0  # seconds, after an error and after a changed status
_RESYNC = 300.0
_MANAGER = "ray.io/kuberay-operator"
Key = tuple[str, str]


@dataclass
class Queue:
    """Keys and when each is due; a key is in it once."""

    _due: dict[Key, float] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, key: Key, delay: float = 0.0) -> None:
        with self._changed:
            due = time.monotonic() + delay
            self._due[key] = min(due, self._due.get(key, due))
            self._changed.notify()

    def take(self) -> Key:
        """Wait for the next due key."""
        with self._changed:
            while True:
                key = min(self._due, key=self._due.__getitem__, default=None)
                left = self._due[key] - time.monotonic() if key else None
                if key and left is not None and left <= 0:
                    del self._due[key]
                    return key
                self._changed.wait(left)


def run(api: Api) -> None:
    """Serve for ever."""
    queue = Queue()
    sources = {
        f"{names.API}/rayclusters": "",
        "/api/v1/pods": f"{names.LABEL_NODE}=yes",
        "/api/v1/services": f"{names.LABEL_TYPE}=head",
    }
    for path, selector in sources.items():
        threading.Thread(target=_follow, args=(api, path, selector, queue), daemon=True).start()
    while True:
        key = queue.take()
        try:
            queue.add(key, _RETRY) if reconcile(api, key) else queue.add(key, _RESYNC)
        except LookupError:
            log.info("%s/%s is gone", *key)
        except ApiError as error:
            log.warning("%s/%s: %s", *key, error)
            queue.add(key, _RETRY)


def _follow(api: Api, path: str, selector: str, queue: Queue) -> None:
    query = f"?labelSelector={urllib.parse.quote(selector)}" if selector else ""
    while True:
        try:
            listed = api.get(path + query)
            for item in listed["items"]:
                _wake(queue, item)
            version = listed["metadata"]["resourceVersion"]
            while True:
                for event in api.watch(path, version, selector):
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        _wake(queue, event["object"])
        except ApiError as error:
            log.info("watching %s again: %s", path, error)
            time.sleep(1)


def _wake(queue: Queue, item: Object) -> None:
    meta = item["metadata"]
    name = (meta.get("labels") or {}).get(names.LABEL_CLUSTER) if item.get("kind") != "RayCluster" else meta["name"]
    if name:
        queue.add((meta["namespace"], name))


# --- one RayCluster ---------------------------------------------------------------------------------------------


def reconcile(api: Api, key: Key) -> bool:
    """One pass. Returns whether it has to come again soon. Raises LookupError when the RayCluster is gone."""
    namespace, name = key
    path = f"{names.API}/namespaces/{namespace}/rayclusters/{name}"
    cluster = api.find(path)
    if cluster is None:
        raise LookupError(name)
    if cluster["spec"].get("managedBy") not in (None, "", _MANAGER) or _refused(api, cluster):
        return False
    if cluster["metadata"].get("deletionTimestamp"):
        return False
    failure = None
    try:
        _make(api, cluster)
    except ReconcileFailure as error:
        log.info("%s/%s: %s %s", namespace, name, error.reason, error)
        failure = error
    return _write_status(api, path, cluster, failure) or failure is not None


def _refused(api: Api, cluster: Object) -> bool:
    """An invalid RayCluster gets an Event and nothing else, as with KubeRay."""
    meta = cluster["metadata"]
    for kind, wrong in (("Metadata", checks.invalid_metadata(cluster)), ("Spec", checks.invalid_spec(cluster))):
        if wrong:
            text = f"The RayCluster {kind.lower()} is invalid {meta['namespace']}/{meta['name']}: {wrong}"
            _event(api, cluster, "Warning", f"InvalidRayCluster{kind}", "Validate", text)
            return True
    return False


def _write_status(api: Api, path: str, cluster: Object, failure: ReconcileFailure | None) -> bool:
    service = api.find(
        f"/api/v1/namespaces/{cluster['metadata']['namespace']}/services/{objects.service_name(cluster)}"
    )
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    new = status.compute(cluster, _pods(api, cluster), service, failure, now)
    if not status.changed(cluster.get("status") or {}, new):
        return False
    api.replace(f"{path}/status", {**cluster, "status": new})
    return True


def _pods(api: Api, cluster: Object) -> list[Object]:
    meta = cluster["metadata"]
    selector = urllib.parse.quote(f"{names.LABEL_CLUSTER}={meta['name']}")
    found: list[Object] = api.get(f"/api/v1/namespaces/{meta['namespace']}/pods?labelSelector={selector}")["items"]
    return [pod for pod in found if names.LABEL_TYPE in pod["metadata"]["labels"]]


def _make(api: Api, cluster: Object) -> None:
    namespace = cluster["metadata"]["namespace"]
    secret = objects.token_secret(cluster)
    if secret and api.find(f"/api/v1/namespaces/{namespace}/secrets/{secret['metadata']['name']}") is None:
        api.create(f"/api/v1/namespaces/{namespace}/secrets", secret)
    service = api.find(f"/api/v1/namespaces/{namespace}/services/{objects.service_name(cluster)}")
    if service is None:
        service = api.create(f"/api/v1/namespaces/{namespace}/services", objects.head_service(cluster))
        _event(api, cluster, "Normal", "CreatedService", "Create", "Created service "
            f"{namespace}/{service['metadata']['name']}")
    existing = _pods(api, cluster)
    if status.is_true(cluster, names.SUSPENDING):
        _delete_all(api, cluster, existing)
    elif not status.is_true(cluster, names.SUSPENDED) and not cluster["spec"].get("suspend"):
        goes_on = _make_head(api, cluster, [pod for pod in existing if _type(pod) == "head"])
        for group in (cluster["spec"].get("workerGroupSpecs") or []) if goes_on else []:
            members = [
                pod for pod in existing if pod["metadata"]["labels"].get(names.LABEL_GROUP) == group["groupName"]
            ]
            _make_workers(api, cluster, group, members, service["spec"]["clusterIP"])


def _type(pod: Object) -> str:
    return str(pod["metadata"]["labels"][names.LABEL_TYPE])


def _make_head(api: Api, cluster: Object, heads: list[Object]) -> bool:
    """Returns whether to go on to the workers: not where the head is lost and must not come back."""
    if len(heads) > 1:
        raise ReconcileFailure("", f"{len(heads)} head pods found. Please delete extra head pods")
    if heads:
        if _finished(heads[0]):
            _delete(api, cluster, heads[0], "Head")
            raise ReconcileFailure("", f"deleted the ended head pod {heads[0]['metadata']['name']}")
        return True
    annotations = cluster["metadata"].get("annotations") or {}
    if status.is_true(cluster, names.PROVISIONED) and annotations.get(names.NO_HEAD_RESTART) == "true":
        return False
    _create(api, cluster, pods.head_pod(cluster), "Head")
    return True


def _make_workers(api: Api, cluster: Object, group: Object, members: list[Object], head_address: str) -> None:
    ended = [pod for pod in members if _finished(pod)]
    for pod in ended:
        _delete(api, cluster, pod, "Worker")
    if ended:
        raise ReconcileFailure("", f"deleted {len(ended)} unhealthy worker pods")
    unwanted = set((group.get("scaleStrategy") or {}).get("workersToDelete") or [])
    for pod in [pod for pod in members if pod["metadata"]["name"] in unwanted]:
        _delete(api, cluster, pod, "Worker")
        members.remove(pod)
    missing = status.desired_replicas(group) - len(members)
    for _ in range(missing):
        _create(api, cluster, pods.worker_pod(cluster, group, head_address), "Worker")
    for pod in members[: max(0, -missing)]:
        _delete(api, cluster, pod, "Worker")


def _finished(pod: Object) -> bool:
    """Whether KubeRay would delete it: it ended, or its Ray container ended and may not restart."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    if pod["status"].get("phase") in ("Failed", "Succeeded"):
        return True
    ray = pod["spec"]["containers"][0]["name"]
    states = {
        container["name"]: container.get("state") or {} for container in pod["status"].get("containerStatuses") or []
    }
    return pod["spec"]["restartPolicy"] == "Never" and "terminated" in states.get(ray, {})


# --- writes -----------------------------------------------------------------------------------------------------


def _create(api: Api, cluster: Object, pod: Object, kind: str) -> None:
    namespace = cluster["metadata"]["namespace"]
    try:
        made = api.create(f"/api/v1/namespaces/{namespace}/pods", pod)
    except ApiError as error:
        if error.code == 0:
            raise
        _event(
            api, cluster, "Warning", f"FailedToCreate{kind}Pod", "Create", f"Failed to create {kind.lower()} Pod in "
                f"{namespace}, {error}"
        )
        raise ReconcileFailure(f"FailedCreate{kind}Pod", str(error)) from error
    log.info("created %s pod %s/%s", kind.lower(), namespace, made["metadata"]["name"])
    _event(api, cluster, "Normal", f"Created{kind}Pod", "Create", f"Created {kind.lower()} Pod "
        f"{namespace}/{made['metadata']['name']}")


def _delete(api: Api, cluster: Object, pod: Object, kind: str) -> None:
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    try:
        api.delete(f"/api/v1/namespaces/{namespace}/pods/{name}")
    except ApiError as error:
        raise ReconcileFailure(f"FailedDelete{kind}Pod", str(error)) from error
    log.info("deleted %s pod %s/%s (%s)", kind.lower(), namespace, name, pod["status"].get("phase"))
    text = f"Deleted {kind.lower()} Pod {namespace}/{name}; Pod status: {pod['status'].get('phase')}"
    _event(api, cluster, "Normal", f"Deleted{kind}Pod", "Delete", text)


def _delete_all(api: Api, cluster: Object, existing: list[Object]) -> None:
    meta = cluster["metadata"]
    for pod in existing:
        if not pod["metadata"].get("deletionTimestamp"):
            api.delete(f"/api/v1/namespaces/{meta['namespace']}/pods/{pod['metadata']['name']}")
    text = f"Deleted Pods for RayCluster {meta['namespace']}/{meta['name']} due to suspension"
    _event(api, cluster, "Normal", "DeletedPod", "Delete", text)


def _event(api: Api, cluster: Object, kind: str, reason: str, action: str, note: str) -> None:
    meta = cluster["metadata"]
    regarding = {
        "apiVersion": "ray.io/v1", "kind": "RayCluster", "name": meta["name"], "namespace": meta["namespace"],
        "uid": meta["uid"],
    }
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta['name'][:200]}-", "namespace": meta["namespace"]},
        "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "raycluster-controller",
        "reportingInstance": "kuberay-standin",
        "regarding": regarding,
        "type": kind,
        "reason": reason,
        "action": action,
        "note": note[:1024],
    }
    try:
        api.create(f"/apis/events.k8s.io/v1/namespaces/{meta['namespace']}/events", event)
    except ApiError as error:
        log.warning("the event %s was not recorded: %s", reason, error)
