"""The store: what watches lose, repeat and reorder, what it keeps, and whom it wakes."""

import asyncio
import itertools
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from rlhf_operator.client import ApiError
from rlhf_operator.complaints import COMPLAINT_SECONDS, STRANGER_SECONDS, STRANGERS_MAX
from rlhf_operator.health import Health
from rlhf_operator.kinds import EVENTS, JOBS, LOCAL_QUEUES, PODS, RAYCLUSTERS, WORKLOADS, Kind
from rlhf_operator.metrics import WatchAges
from rlhf_operator.names import FINALIZER, JOB_LABEL, WORKLOAD_UID_LABEL
from rlhf_operator.queue import Queue
from rlhf_operator.refresh import ABSENT_SECONDS, RETRY_SECONDS, SUSPECT_SECONDS, Refresher
from rlhf_operator.shelf import Key, Rank
from rlhf_operator.store import LISTED, Store
from tests.api.specs import a_job
from tests.control.memory_api import MemoryApi

Raw = dict[str, Any]
KEY = ("default", "sample")


class Told(Store):
    """A store with a clock, and a list of those that it woke."""

    def __init__(self) -> None:
        self.woken: list[Key] = []
        self.now = 0.0
        super().__init__(self.woken.append, lambda: self.now)
        for kind in LISTED:
            self.listed(kind, (), 0)

    def wakes(self, kind: Kind, raw: Raw) -> list[Key]:
        self.woken.clear()
        self.put(kind, raw)
        return sorted(set(self.woken))

    def phase_of_pod(self, uid: str = "p") -> str | None:
        held = self.pods.by_uid.get(uid)
        return held.facts.phase if held else None


def pod(version: int, phase: str = "Pending", *, uid: str = "p", name: str = "head", job: str = "sample") -> Raw:
    meta = {
        "name": name,
        "namespace": "default",
        "uid": uid,
        "resourceVersion": str(version),
        "labels": {JOB_LABEL: job},
    }
    return {"metadata": meta, "status": {"phase": phase}}


def cluster(version: int, uid: str = "c", owner: str = "j", **spec: Any) -> Raw:
    owners = [{"uid": owner, "controller": True}]
    meta = {
        "name": "sample-1",
        "namespace": "default",
        "uid": uid,
        "resourceVersion": str(version),
        "labels": {JOB_LABEL: "sample"},
    }
    return {"metadata": meta | {"ownerReferences": owners}, "spec": spec}


def job(version: int, *, uid: str = "j", status: Raw | None = None, generation: int = 1, **spec: Any) -> Raw:
    raw = a_job(name="sample", **spec)
    raw["metadata"] |= {"namespace": "default", "uid": uid, "resourceVersion": str(version), "generation": generation}
    return raw | {"status": status or {}}


def warning(uid: str, message: str, at: str = "2026-01-01T12:00:00Z", reason: str = "FailedMount") -> Raw:
    return {
        "metadata": {"name": message, "namespace": "default", "uid": message, "resourceVersion": "1"},
        "involvedObject": {"uid": uid},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": at,
    }


# what a watch does to events


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_whatever_the_order_the_newest_counts_and_what_is_gone_stays_gone(order: tuple[int, ...]) -> None:
    store, versions = Told(), [pod(9, "Pending"), pod(10, "Running"), pod(11, "Succeeded")]
    for step, number in enumerate(order):
        if number == 3:
            store.drop(PODS, "p")
        else:
            store.put(PODS, versions[number])
            store.put(PODS, versions[number])
        seen = order[: step + 1]
        newest = None if 3 in seen else versions[max(seen)]["status"]["phase"]
        assert store.phase_of_pod() == newest


def test_versions_are_numbers() -> None:
    store = Told()
    store.put(PODS, pod(10, "Running"))
    store.put(PODS, pod(9, "Pending"))
    assert store.phase_of_pod() == "Running"


def test_a_list_removes_what_went_unseen_and_nothing_that_came_later() -> None:
    store = Told()
    store.put(PODS, pod(5, uid="ghost", name="a"))
    store.put(PODS, pod(5, uid="there", name="b"))
    store.put(PODS, pod(21, uid="new", name="c"))
    store.woken.clear()
    store.listed(PODS, {"there"}, 20)
    assert sorted(store.pods.by_uid) == ["new", "there"]
    assert store.woken == [KEY]


def test_a_namesake_that_is_newer_shows_that_the_former_is_gone() -> None:
    store = Told()
    store.put(JOBS, job(5, uid="old"))
    store.put(JOBS, job(9, uid="new"))
    store.put(JOBS, job(6, uid="old"))
    store.drop(JOBS, "old")
    found = store.job(KEY)
    assert found is not None and found.meta.uid == "new"
    assert list(store.jobs.by_uid) == ["new"]


def test_an_answer_is_not_undone_by_an_older_event() -> None:
    store = Told()
    store.put(JOBS, job(5))
    store.put(JOBS, job(8, status={"phase": "Running", "reason": "StepAdvancing"}), own=True)
    store.put(JOBS, job(7, status={"phase": "Pending"}))
    assert store.reasons() == {("Running", "StepAdvancing"): 1}


def test_a_pod_that_lost_its_label_is_nobodys() -> None:
    store = Told()
    store.put(PODS, pod(5))
    stray = pod(6)
    stray["metadata"]["labels"] = {}
    store.put(PODS, stray)
    assert store.sizes()["pods"] == 0


def test_what_comes_back_into_sight_is_seen_again() -> None:
    """A watch by a label tells of its loss as of a deletion."""
    store = Told()
    store.put(PODS, pod(5))
    store.drop(PODS, "p", 6)
    store.put(PODS, pod(5))
    assert store.sizes()["pods"] == 0, "that was before"
    store.put(PODS, pod(7))
    assert store.sizes()["pods"] == 1
    store.drop(PODS, "p", 6)
    assert store.sizes()["pods"] == 1, "that was before, too"
    store.drop(PODS, "p", 8)
    store.drop(PODS, "p", 6)
    store.put(PODS, pod(8))
    assert store.sizes()["pods"] == 0


def test_an_object_that_nobody_can_read_stops_nothing() -> None:
    store = Told()
    store.put(PODS, pod(5, "Running"))
    store.put(PODS, pod(6) | {"status": "a word"})
    assert store.phase_of_pod() == "Running"
    store.put(PODS, pod(7, "Succeeded"))
    assert store.phase_of_pod() == "Succeeded"


def test_nothing_is_left_when_everything_has_gone() -> None:
    store = Told()
    store.put(JOBS, job(1))
    store.put(RAYCLUSTERS, cluster(2))
    store.put(PODS, pod(3))
    store.put(WORKLOADS, workload(4))
    for uid in ("p", "c"):
        store.put(EVENTS, warning(uid, f"about {uid}"))
    for kind, uid in ((JOBS, "j"), (RAYCLUSTERS, "c"), (WORKLOADS, "w"), (PODS, "p")):
        store.drop(kind, uid)
    assert set(store.sizes().values()) == {0}
    for shelf in store._shelves.values():
        assert not shelf._by_name and not shelf._by_group


# whom it wakes


def test_a_heartbeat_wakes_nobody_and_is_kept() -> None:
    store = Told()
    report = {"state": "Training", "step": 1, "totalSteps": 9, "reportTime": "2026-01-01T12:00:00Z"}
    assert store.wakes(JOBS, job(1, status={"progress": report})) == [KEY]
    assert store.wakes(JOBS, job(2, status={"progress": report | {"step": 2}})) == []
    raw = store.raw(KEY)
    assert raw is not None and raw["status"]["progress"]["step"] == 2


def test_reports_pack_a_job_once_and_every_version_comes_out_as_it_went_in() -> None:
    store, report = Told(), {"state": "Training", "step": 1, "timings": {"train": "1.5"}}
    written = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    statuses: list[Raw] = [
        written,
        written | {"progress": report},
        written | {"progress": report | {"step": 2, "reward": "0.5"}},
        written | {"progress": report | {"step": 2}},
        {"phase": "Failed", "progress": report | {"step": 2}},
        {"phase": "Failed"},
        {"phase": "Failed", "progress": {}},
    ]
    packed = []
    for version, status in enumerate(statuses, 1):
        told = job(version, status=status)
        told["metadata"]["managedFields"] = [{"manager": "rlhf-driver", "time": f"{version}", "fieldsV1": {"f:x": {}}}]
        store.put(JOBS, told)
        told["metadata"]["managedFields"] = [{"manager": "rlhf-driver", "time": f"{version}"}]
        assert store.raw(KEY) == told
        packed.append(store.jobs.by_uid[told["metadata"]["uid"]].facts.packed)
    assert [one is packed[0] for one in packed[:4]] == [True] * 4
    assert packed[4] != packed[0] and all(one is packed[4] for one in packed[4:])


def test_a_job_ranks_by_what_its_status_tells_of() -> None:
    store = Told()
    assert store.rank(KEY) is Rank.NEW, "one that is gone"
    store.put(JOBS, job(1))
    assert store.rank(KEY) is Rank.NEW
    store.put(RAYCLUSTERS, cluster(2, "of-another", owner="former"))
    assert store.rank(KEY) is Rank.NEW
    store.put(RAYCLUSTERS, cluster(3))
    assert store.rank(KEY) is Rank.UNTOLD
    store.put(JOBS, job(4, status={"record": {"clusters": 1}}))
    assert store.rank(KEY) is Rank.TOLD


def test_our_own_write_wakes_nobody_and_neither_does_its_echo() -> None:
    store = Told()
    store.put(JOBS, job(1))
    store.woken.clear()
    store.put(JOBS, job(2, status={"phase": "Pending"}), own=True)
    assert store.wakes(JOBS, job(2, status={"phase": "Pending"})) == []
    assert store.wakes(JOBS, job(3, status={"phase": "Pending"}, generation=2, suspend=True)) == [KEY]


def test_a_pod_wakes_when_something_of_it_changed_that_is_read() -> None:
    store = Told()
    assert store.wakes(PODS, pod(1)) == [KEY]
    assert store.wakes(PODS, pod(2)) == []
    assert store.wakes(PODS, pod(3, "Running")) == [KEY]


def workload(version: int, message: str = "") -> Raw:
    meta = {
        "name": "w",
        "namespace": "default",
        "uid": "w",
        "resourceVersion": str(version),
        "labels": {WORKLOAD_UID_LABEL: "c"},
    }
    return {
        "metadata": meta,
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": message}]},
    }


def test_a_workload_wakes_the_job_of_its_raycluster() -> None:
    store = Told()
    assert store.wakes(WORKLOADS, workload(1)) == []
    store.put(RAYCLUSTERS, cluster(2, suspend=True))
    assert store.wakes(WORKLOADS, workload(3, "no quota")) == [KEY]


def test_a_queue_that_comes_or_goes_wakes_those_that_name_it_and_its_numbers_nobody() -> None:
    store = Told()
    store.put(JOBS, job(1, queue={"name": "team-a"}))
    queue = {"metadata": {"name": "team-a", "namespace": "default", "uid": "q", "resourceVersion": "2"}}
    assert store.wakes(LOCAL_QUEUES, queue) == [KEY]
    assert (
        store.wakes(
            LOCAL_QUEUES, {"metadata": queue["metadata"] | {"resourceVersion": "3"}, "status": {"pendingWorkloads": 7}}
        )
        == []
    )
    store.woken.clear()
    store.drop(LOCAL_QUEUES, "q")
    assert store.woken == [KEY]


def test_kuberay_that_comes_wakes_everybody() -> None:
    store = Told()
    store.missing(RAYCLUSTERS)
    store.put(JOBS, job(1))
    found = store.job(KEY)
    assert found is not None and not store.observe(found).kuberay
    store.woken.clear()
    store.listed(RAYCLUSTERS, (), 1)
    assert store.woken == [KEY] and store.observe(found).kuberay


# what it is ready for


def test_it_is_ready_when_every_kind_was_listed_or_is_absent() -> None:
    store = Store()
    for kind in LISTED[1:]:
        store.listed(kind, (), 1)
    store.put(JOBS, job(2))
    assert not store.ready, "an event is no list"
    store.missing(LISTED[0])
    assert store.ready


def test_a_job_that_goes_is_ours_only_with_our_finalizer() -> None:
    store, going = Told(), job(1)
    going["metadata"] |= {"deletionTimestamp": "2026-01-01T12:00:00Z", "finalizers": [FINALIZER]}
    store.put(JOBS, going)
    assert store.job(KEY) is not None
    store.put(JOBS, going | {"metadata": going["metadata"] | {"resourceVersion": "2", "finalizers": ["theirs"]}})
    assert store.job(KEY) is None


@pytest.mark.parametrize(
    ("conditions", "restless"),
    [
        ({}, True),
        ({"Complete": "True"}, True),
        ({"Failed": "True", "ResourcesReleased": "False"}, True),
        ({"Failed": "True", "ResourcesReleased": "True"}, False),
    ],
)
def test_the_resync_skips_what_ended_and_holds_nothing(conditions: dict[str, str], restless: bool) -> None:
    store = Told()
    store.put(
        JOBS, job(1, status={"conditions": [{"type": kind, "status": status} for kind, status in conditions.items()]})
    )
    assert bool(store.job_keys(at_rest=False)) is restless
    assert store.job_keys() == [KEY]


# the lists that fill it

class Listing:
    """A refresher over an API server in memory, with a clock."""

    def __init__(self) -> None:
        self.api, self.store, self.now = MemoryApi(datetime(2026, 1, 1, tzinfo=UTC)), Store(), 0.0
        self.came: list[Kind] = []
        self.refresher = Refresher(self.api, self.store, None, self.came.append, lambda: self.now)

    def later(self, seconds: float) -> None:
        self.now += seconds
        asyncio.run(self.refresher.round())


def test_the_first_round_makes_it_ready_and_the_next_comes_late() -> None:
    it = Listing()
    it.api.put(JOBS, job(1))
    it.later(0)
    assert it.store.ready and it.refresher.listed.is_set()
    assert it.store.job_keys() == [KEY]
    calls = len(it.api.calls)
    it.later(60)
    assert len(it.api.calls) == calls, "no job names a queue: nobody asks for Kueue"


def test_what_a_watch_may_have_lost_is_listed_soon() -> None:
    it = Listing()
    it.api.put(PODS, pod(1))
    it.later(0)
    it.api.remove(PODS, "head")
    it.refresher.suspect(PODS)
    it.later(SUSPECT_SECONDS)
    assert it.store.sizes()["pods"] == 0


def test_a_failed_list_is_tried_again_and_takes_nothing_away() -> None:
    it = Listing()
    it.api.refuse_lists = ApiError(500, "InternalError", "no leader")
    it.later(0)
    assert not it.store.ready
    it.api.refuse_lists = None
    it.later(RETRY_SECONDS)
    assert it.store.ready


def test_a_kind_that_may_not_be_listed_is_named_and_asked_for_at_a_slow_pace() -> None:
    """Another process, an upgrade's roles: what is lacking stands in the answer to the readiness probe."""
    it = Listing()
    it.api.refuse_lists = ApiError(403, "Forbidden", "no")
    it.later(0)
    calls = len(it.api.calls)
    it.later(RETRY_SECONDS)
    assert len(it.api.calls) == calls
    health = Health(Queue(no_work, list), it.store, WatchAges())
    answer = asyncio.run(health.readyz(make_mocked_request("GET", "/readyz")))
    assert (answer.status, answer.text) == (503, "not listed yet: rlhfjobs, rayclusters, pods")
    it.api.refuse_lists = None
    it.later(ABSENT_SECONDS)
    assert it.store.ready


async def no_work(_: tuple[str, str]) -> None:
    """There is none."""


def test_one_answer_that_a_kind_is_not_there_throws_nothing_away() -> None:
    it = Listing()
    it.api.put(RAYCLUSTERS, cluster(1))
    it.later(0)
    it.api.absent.add("rayclusters")
    it.refresher.suspect(RAYCLUSTERS)
    it.later(SUSPECT_SECONDS)
    assert it.store.installed(RAYCLUSTERS) and it.store.sizes()["rayclusters"] == 1
    it.later(RETRY_SECONDS)
    assert not it.store.installed(RAYCLUSTERS) and it.store.sizes()["rayclusters"] == 0
    it.api.absent.clear()
    it.later(2 * ABSENT_SECONDS)
    assert it.came == [RAYCLUSTERS] and it.store.sizes()["rayclusters"] == 1


def test_kueue_is_looked_for_while_a_job_names_a_queue() -> None:
    it = Listing()
    it.api.put(JOBS, job(1, queue={"name": "team-a"}))
    it.later(0)
    it.api.absent.clear()
    it.later(2 * ABSENT_SECONDS)
    assert it.store.installed(LOCAL_QUEUES) and it.store.installed(WORKLOADS)


# complaints


def test_the_newest_telling_warning_counts() -> None:
    store = Told()
    store.put(PODS, pod(1))
    assert store.wakes(EVENTS, warning("p", "new", "2026-01-01T12:00:09Z")) == [KEY]
    assert store.wakes(EVENTS, warning("p", "new", "2026-01-01T12:00:10Z")) == []
    for quiet in (
        warning("p", "old"),
        warning("p", "mere", "2026-01-01T13:00:00Z", reason="Unhealthy"),
        warning("q", "a stranger's"),
    ):
        assert store.wakes(EVENTS, quiet) == []
    complaint = store.complaints.of("p")
    assert complaint is not None and complaint.message == "new"
    store.now += COMPLAINT_SECONDS
    assert store.complaints.of("p") is None


def test_a_warning_may_come_before_its_object() -> None:
    store = Told()
    store.put(EVENTS, warning("p", "early"))
    store.put(PODS, pod(1))
    assert store.complaints.of("p") is not None


def test_strangers_are_few_and_soon_forgotten() -> None:
    store = Told()
    for number in range(3 * STRANGERS_MAX):
        store.put(EVENTS, warning(f"s{number}", "x"))
    assert len(store.complaints) <= STRANGERS_MAX + 1
    store.now += STRANGER_SECONDS + 1
    store.put(EVENTS, warning("another", "x"))
    assert len(store.complaints) == 1
