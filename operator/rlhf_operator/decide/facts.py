"""What the policies ask of the world. Facts are Observed seen through the record: which cluster is the present one, which pods
are its own, whether the driver's report is of this run."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property

from rlhf_api.job import RLHFJobSpec
from rlhf_api.placement import Placement, PodGroup, plan_placement
from rlhf_api.progress import Progress
from rlhf_api.status import Record
from rlhf_operator.clock import moment
from rlhf_operator.names import HEAD, cluster_name
from rlhf_operator.observed import Cluster, Container, Job, Observed, Pod


@dataclass(frozen=True)
class Facts:
    """`record` is what the API server holds when actions are chosen, and what will be written when conditions are told."""

    job: Job
    observed: Observed
    record: Record
    now: datetime

    def knowing(self, record: Record) -> "Facts":
        return replace(self, record=record)

    @property
    def spec(self) -> RLHFJobSpec:
        """Only for a job that parsed."""
        assert self.job.parsed is not None
        return self.job.parsed.spec

    @cached_property
    def placement(self) -> Placement:
        return plan_placement(self.spec)

    @cached_property
    def cluster(self) -> Cluster | None:
        """The present RayCluster. One of the same name and another uid is not the one we remember."""
        name, uid = cluster_name(self.job.meta.name, self.record.clusters), self.record.cluster_uid
        return next((c for c in self.observed.clusters if c.name == name and uid in (None, c.uid)), None)

    @property
    def old_clusters(self) -> tuple[Cluster, ...]:
        return tuple(c for c in self.observed.clusters if c != self.cluster)

    @cached_property
    def pods(self) -> tuple[Pod, ...]:
        uid = self.cluster.uid if self.cluster else None
        return tuple(p for p in self.observed.pods if p.cluster_uid == uid)

    @property
    def old_pods(self) -> tuple[Pod, ...]:
        return tuple(p for p in self.observed.pods if p not in self.pods)

    @cached_property
    def heads(self) -> tuple[Pod, ...]:
        """Newest last; one that is going away comes before one that stays."""
        heads = [p for p in self.pods if p.role == HEAD]
        return tuple(sorted(heads, key=lambda p: (p.deleting_since is None, str(p.created_at), p.name)))

    @property
    def head(self) -> Pod | None:
        return self.heads[-1] if self.heads else None

    @property
    def workers(self) -> tuple[Pod, ...]:
        return tuple(p for p in self.pods if p.role != HEAD)

    @property
    def driver(self) -> Container | None:
        return self.head.driver if self.head else None

    @property
    def driver_runs(self) -> bool:
        return self.driver is not None and self.driver.running_since is not None

    @property
    def driver_exit(self) -> int | None:
        """Exit code of the driver's newest ended run; None while none has ended."""
        return self.driver.last.exit_code if self.driver and self.driver.last else None

    @property
    def succeeded(self) -> bool:
        return self.driver is not None and self.driver.terminated and self.driver_exit == 0

    @cached_property
    def progress(self) -> Progress | None:
        """The report of the driver's present or last run; a report of an earlier run tells nothing of this one."""
        told, driver = self.job.status.progress, self.driver
        began = driver and (driver.running_since or (driver.last and driver.last.started_at))
        reported = moment(told.report_time) if told else None
        return told if began and reported and reported >= began else None

    @property
    def training(self) -> bool:
        """The driver has begun its steps, and neither its pod nor the cluster is being taken from it."""
        cluster, head = self.cluster, self.head
        stays = cluster is not None and not (cluster.deleting or cluster.suspended) and head is not None and head.deleting_since is None
        return stays and self.driver_runs and self.progress is not None and self.progress.state != "Starting"

    def missing(self, group: PodGroup) -> int:
        return group.pods - sum(p.ray_ready for p in self.workers if p.role == group.name)

    @cached_property
    def ready(self) -> bool:
        """Counted, pod by pod: KubeRay's own `ready` never turns back and does not count."""
        cluster = self.cluster
        usable = cluster is not None and not cluster.deleting and not cluster.suspended
        return usable and self.head is not None and self.head.ray_ready and not any(self.missing(g) > 0 for g in self.placement.groups)

    def since(self, stamped: str | None) -> int:
        """Whole seconds from then to now; 0 for never."""
        then = moment(stamped)
        return int((self.now - then).total_seconds()) if then else 0

    def after(self, stamped: str | None, seconds: int | None) -> datetime | None:
        then = moment(stamped)
        return then + timedelta(seconds=seconds) if then and seconds is not None else None
