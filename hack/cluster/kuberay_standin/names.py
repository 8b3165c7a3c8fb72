"""The names of KubeRay's contract."""

from __future__ import annotations

GROUP = "ray.io"
API = "/apis/ray.io/v1"
LABEL_NODE = "ray.io/is-ray-node"
LABEL_CLUSTER = "ray.io/cluster"
LABEL_TYPE = "ray.io/node-type"
LABEL_GROUP = "ray.io/group"
LABEL_IDENTIFIER = "ray.io/identifier"
HEAD_GROUP = "headgroup"
OVERWRITE_COMMAND = "ray.io/overwrite-container-cmd"
NO_HEAD_RESTART = "ray.io/disable-provisioned-head-restart"
MAX_NAME = 53

PORTS = {"client": 10001, "gcs-server": 6379, "dashboard": 8265, "metrics": 8080, "serve": 8000}
AGENT_PORT = "52365"

PROVISIONED = "RayClusterProvisioned"
HEAD_READY = "HeadPodReady"
REPLICA_FAILURE = "ReplicaFailure"
SUSPENDING = "RayClusterSuspending"
SUSPENDED = "RayClusterSuspended"
