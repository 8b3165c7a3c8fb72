"""The kinds that the operator touches, each with the verbs it uses. `client.py` makes URLs from it, `rbac.py` the ClusterRole."""

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


# get and list through the client; list and watch through kopf. `get` and `patch` on the status are also what the driver's
# Role grants: nobody may grant what he does not hold.
JOBS = Kind(GROUP, VERSION, PLURAL, KIND, ("get", "list", "watch", "patch", "delete"), ("get", "patch"))
RAYCLUSTERS = Kind("ray.io", "v1", "rayclusters", "RayCluster", ("get", "list", "watch", "create", "delete"))
PODS = Kind("", "v1", "pods", "Pod", ("list", "watch", "delete"))
CONFIG_MAPS = Kind("", "v1", "configmaps", "ConfigMap", ("get", "create", "patch"))
SERVICE_ACCOUNTS = Kind("", "v1", "serviceaccounts", "ServiceAccount", ("get", "create", "patch"))
ROLES = Kind("rbac.authorization.k8s.io", "v1", "roles", "Role", ("get", "create", "patch"))
ROLE_BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", ("get", "create", "patch"))
EVENTS = Kind("", "v1", "events", "Event", ("list", "create"))
LOCAL_QUEUES = Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue", ("get",))
WORKLOADS = Kind("kueue.x-k8s.io", "v1beta2", "workloads", "Workload", ("list",))
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease", ("get", "create", "update", "patch"))
CRDS = Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", ("list", "watch"))

NAMESPACED = (JOBS, RAYCLUSTERS, PODS, CONFIG_MAPS, SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, EVENTS, LOCAL_QUEUES, WORKLOADS)
OF_KIND = {kind.kind: kind for kind in (*NAMESPACED, LEASES)}
