"""What the policies ask of the world. Facts are Observed seen through the memory: which cluster is the present one,
which pods are
its own, whether the driver's report is of this run."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property

from rlhf_api.progress import Progress
from rlhf_api.status import Record
from rlhf_operator.clock import moment
from rlhf_operator.decide.memory import Memory
from rlhf_operator.names import HEAD, cluster_name
from rlhf_operator.observed import Cluster, Container, Group, Job, Observed, Pod


@dataclass(frozen=True)
class Facts:
    """`memory` is what the API server holds when actions are chosen, and what will be written when conditions are
    made."""

    job: Job
    observed: Observed
    memory: Memory
    now: datetime

    def remembering(self, memory: Memory) -> "Facts":
        return replace(self, memory=memory)

    @property
    def record(self) -> Record:
        return self.memory.record

    # what the user wants

    @property
    def deleted(self) -> bool:
        return self.job.meta.deletion_timestamp is not None

    @property
    def suspended(self) -> bool:
        """The user wants it, and it is not refused."""
        return self.job.suspend and not self.would_lose

    @property
    def would_lose(self) -> bool:
        """Finished steps go with the pods that the user wants gone, and nobody said that this is meant."""
        steps = self.reported.step if self.reported else 0
        held = self.cluster is not None and not self.cluster.deleting and not self.cluster.suspended
        wanted_gone = not self.deleted and (self.job.suspend or self._edited)
        return wanted_gone and self.ephemeral and not self.job.loss_meant and held and steps > 0

    @property
    def ephemeral(self) -> bool:
        """Of the pods that there are: the spec's volumes may be edited, and reach the next RayCluster's."""
        told = self.cluster.ephemeral if self.cluster else None
        return self.job.ephemeral if told is None else told

    @property
    def stopping(self) -> bool:
        """The run is to save and end: nothing that it loses on the way is held against it."""
        return self.suspended or self.deleted

    # what there is

    @cached_property
    def cluster(self) -> Cluster | None:
        """The present RayCluster. One of the same name and another uid is not the one we remember."""
        name, uid = cluster_name(self.job.meta.name, self.record.clusters), self.record.cluster_uid
        return next((c for c in self.observed.clusters if c.name == name and uid in (None, c.uid)), None)

    @property
    def usable(self) -> bool:
        return self.cluster is not None and not self.cluster.deleting and not self.cluster.suspended

    @property
    def outdated(self) -> bool:
        """Another RayCluster is due: the present one was made from a spec that has changed since."""
        return self._edited and not self.would_lose

    @property
    def _edited(self) -> bool:
        """A spec that cannot be read is no edit yet."""
        made_from, wanted = self.cluster.edition if self.cluster else "", self.job.edition
        return bool(made_from and wanted) and made_from != wanted

    @property
    def old_clusters(self) -> tuple[Cluster, ...]:
        return tuple(c for c in self.observed.clusters if c != self.cluster)

    @cached_property
    def all_pods(self) -> tuple[Pod, ...]:
        """Of this job's RayClusters, and of those of an earlier job of its name; strangers with our label are none."""
        return tuple(p for p in self.observed.pods if p.cluster_uid)

    @cached_property
    def pods(self) -> tuple[Pod, ...]:
        uid = self.cluster.uid if self.cluster else None
        return tuple(p for p in self.all_pods if p.cluster_uid == uid)

    @property
    def old_pods(self) -> tuple[Pod, ...]:
        return tuple(p for p in self.all_pods if p not in self.pods)

    @property
    def orphans(self) -> tuple[Pod, ...]:
        """Pods whose RayCluster is gone, and that nobody deletes."""
        uids = {c.uid for c in self.observed.clusters}
        mine = (p for p in self.all_pods if p.cluster_name.startswith(f"{self.job.meta.name}-"))
        return tuple(p for p in mine if p.cluster_uid not in uids and p.deleting_since is None)

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
    def groups(self) -> tuple[Group, ...]:
        """As the RayCluster has them, whether or not the spec can be read."""
        return self.cluster.groups if self.cluster else ()

    def missing(self, group: Group) -> int:
        return group.pods - sum(p.ray_ready for p in self.workers if p.role == group.name)

    @cached_property
    def ready(self) -> bool:
        """Counted, pod by pod: KubeRay's own `ready` never turns back and does not count."""
        head = self.head is not None and self.head.ray_ready
        return self.usable and head and not any(self.missing(g) > 0 for g in self.groups)

    # the driver

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

    @property
    def reported(self) -> Progress | None:
        """What any driver of this job told last."""
        return self.job.status.progress

    @cached_property
    def progress(self) -> Progress | None:
        """The report of the driver's present or last run. One of another pod, or of an earlier run, tells nothing of
        this one."""
        last, head = self.reported, self.head
        if last is None or head is None or last.pod_uid not in (None, head.uid):
            return None
        began, made = self._driver_began, moment(last.report_time)
        return last if began and made and made >= began else None

    @property
    def _driver_began(self) -> datetime | None:
        """Its present or last run."""
        if self.driver is None or self.driver.running_since:
            return self.driver.running_since if self.driver else None
        return self.driver.last.started_at if self.driver.last else None

    @property
    def training(self) -> bool:
        """The driver has begun its steps, and neither its pod nor the cluster is being taken from it."""
        stays = self.usable and self.head is not None and self.head.deleting_since is None
        return stays and self.driver_runs and self.progress is not None and self.progress.state != "Starting"

    @property
    def last_step_at(self) -> datetime | None:
        return self._by_our_clock(self.reported.step_time) if self.reported else None

    @property
    def stepped_at(self) -> datetime | None:
        """The last step of the driver's present or last run: every pod was there for it."""
        told, began = self.progress, self._driver_began
        step = moment(told.step_time) if told else None
        return self._by_our_clock(told.step_time) if told and step and began and step >= began else None

    @property
    def active_at(self) -> datetime | None:
        """When this run last got further, by its own account. Drivers that do not say so: the last step, or any
        report before one."""
        told = self.progress
        if told is None:
            return None
        return self._by_our_clock(told.activity_time or told.step_time or told.report_time)

    def _by_our_clock(self, stamped: str | None) -> datetime | None:
        then = moment(stamped)
        return then + self.job.driver_lag if then else None

    # time

    def since(self, stamped: str | None) -> int:
        """Whole seconds from then to now; 0 for never."""
        then = moment(stamped)
        return int((self.now - then).total_seconds()) if then else 0

    def after(self, stamped: str | None, seconds: int | None) -> datetime | None:
        then = moment(stamped)
        return then + timedelta(seconds=seconds) if then and seconds is not None else None
