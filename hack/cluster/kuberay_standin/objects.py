"""The head service and the token Secret of a RayCluster. Pure."""

from __future__ import annotations

import base64
import secrets

from hack.cluster.kube import Object
from hack.cluster.kuberay_standin import names
from hack.cluster.kuberay_standin.pods import labels, owner


def service_name(cluster: Object) -> str:
    own = cluster["spec"]["headGroupSpec"].get("headService") or {}
    return str((own.get("metadata") or {}).get("name") or f"{cluster['metadata']['name']}-head-svc")


def head_service(cluster: Object) -> Object:
    """With a cluster IP (KubeRay can be told so too), because nothing here resolves names."""
    group = cluster["spec"]["headGroupSpec"]
    selector = labels(cluster, "head", names.HEAD_GROUP, {})
    for key in (names.LABEL_NODE, names.LABEL_GROUP):
        del selector[key]
    own = group.get("headService") or {}
    ports = [
        {"name": name, "port": port, "targetPort": port, "appProtocol": "tcp"}
        for name, port in sorted(_ports(cluster).items())
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(cluster),
            "namespace": cluster["metadata"]["namespace"],
            "labels": ((own.get("metadata") or {}).get("labels") or {}) | selector,
            "annotations": cluster["spec"].get("headServiceAnnotations") or {},
            "ownerReferences": [owner(cluster)],
        },
        "spec": {
            "selector": selector,
            "ports": [*((own.get("spec") or {}).get("ports") or []), *ports],
            "type": group.get("serviceType") or "ClusterIP",
            "publishNotReadyAddresses": True,
        },
    }


def _ports(cluster: Object) -> dict[str, int]:
    """The ports that the head's Ray container declares and, only if it declares none, Ray's; the metrics port always.
    """
    declared = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].get("ports") or []
    own = {port.get("name") or f"{port['containerPort']}-port": int(port["containerPort"]) for port in declared}
    return {"metrics": names.PORTS["metrics"]} | (own or names.PORTS)


def token_secret(cluster: Object) -> Object | None:
    """A Secret named as the cluster, unless authentication is off or the user brings one."""
    options = cluster["spec"].get("authOptions")
    if not options or options.get("mode") == "disabled" or options.get("secretName"):
        return None
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": cluster["metadata"]["name"],
            "namespace": cluster["metadata"]["namespace"],
            "labels": {names.LABEL_CLUSTER: cluster["metadata"]["name"]},
            "ownerReferences": [owner(cluster)],
        },
        "stringData": {"auth_token": base64.b64encode(secrets.token_bytes(32)).decode()},
    }
