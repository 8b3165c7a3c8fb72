"""The kinds that the operator touches, each with the verbs it uses. `client.py` makes URLs from it, `rbac.py` the
ClusterRole."""

from dataclasses import dataclass

from rlhf_api import GROUP, KIND, PLURAL, VERSION


@dataclass(frozen=True, slots=True)
class Kind:
    """`status_verbs` are those on the status subresource."""

    group: str
    version: str
    plural: str
    kind: str
    verbs: tuple[str, ...]
    status_verbs: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


# list and watch fill the store, the client by itself and through kopf; `get` is for what stands in the way of a write.
# `get` and `patch` on the status are also what the driver's Role grants: nobody may grant what he does not hold.
JOBS = Kind(GROUP, VERSION, PLURAL, KIND, ("get", "list", "watch", "patch", "delete"), ("get", "patch"))
RAYCLUSTERS = Kind("ray.io", "v1", "rayclusters", "RayCluster", ("get", "list", "watch", "create", "delete"))
PODS = Kind("", "v1", "pods", "Pod", ("list", "watch", "delete"))
OWNED = ("get", "create", "patch", "delete")
CONFIG_MAPS = Kind("", "v1", "configmaps", "ConfigMap", OWNED)
SERVICE_ACCOUNTS = Kind("", "v1", "serviceaccounts", "ServiceAccount", OWNED)
ROLES = Kind("rbac.authorization.k8s.io", "v1", "roles", "Role", OWNED)
ROLE_BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", OWNED)
NETWORK_POLICIES = Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", OWNED)
CLAIMS = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", ("get", "create"))
EVENTS = Kind("", "v1", "events", "Event", ("list", "watch", "create"))
LOCAL_QUEUES = Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue", ("list", "watch"))
WORKLOADS = Kind("kueue.x-k8s.io", "v1beta2", "workloads", "Workload", ("list", "watch"))
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease", ("get", "create", "update", "patch"))
CRDS = Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", ("list", "watch"))

NAMESPACED = (
    JOBS, RAYCLUSTERS, PODS, CONFIG_MAPS, SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, NETWORK_POLICIES, CLAIMS, EVENTS,
    LOCAL_QUEUES, WORKLOADS,
)
OF_KIND = {kind.kind: kind for kind in (*NAMESPACED, LEASES)}
