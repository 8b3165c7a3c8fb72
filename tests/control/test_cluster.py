"""Reads and writes: how many, in which order, and what happens on a conflict."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from rlhf_operator import reconcile as reconcile_module
from rlhf_operator.client import ApiError
from rlhf_operator.cluster import ClusterIO
from rlhf_operator.kinds import (
    CLAIMS,
    CONFIG_MAPS,
    EVENTS,
    JOBS,
    LEASES,
    NAMESPACED,
    NETWORK_POLICIES,
    OF_KIND,
    RAYCLUSTERS,
    ROLE_BINDINGS,
    ROLES,
    SERVICE_ACCOUNTS,
    Kind,
)
from rlhf_operator.names import FINALIZER, JOB_LABEL
from rlhf_operator.plan import Deletion, Plan
from rlhf_operator.rbac import rules
from rlhf_operator.reconcile import reconcile
from rlhf_operator.refresh import refresh
from rlhf_operator.store import LISTED
from tests.control.memory_api import Killed, MemoryApi
from tests.control.stories import STORIES
from tests.control.world import RUNNER, World, running

Raw = dict[str, Any]


def test_nothing_is_written_while_nothing_changes() -> None:
    world = running()
    before = list(world.api.writes)
    for step in range(4, 14):
        world.later(10)
        world.report(
            step=step,
            reward=f"0.{step}",
            checkpoint={"step": step, "path": f"/c/{step}", "time": "2026-01-01T12:00:00Z"},
        )
        world.settle()
    assert world.api.writes[len(before) :] == ["apply RLHFJob sample"], "one write: CheckpointAvailable turned True"


def test_the_drivers_progress_is_never_touched() -> None:
    world = running()
    mine = dict(world.status["progress"], somethingNew="x")
    world.job_raw["status"]["progress"] = mine
    world.driver_ends(1, "ValueError")
    world.settle()
    assert world.status["progress"] == mine


def test_the_first_cluster_is_made_and_told_of_in_one_write() -> None:
    world = World()
    world.settle()
    writes = [w for w in world.api.writes if "Event" not in w]
    assert writes[-2:] == ["create RayCluster sample-1", "apply RLHFJob sample"]
    assert writes.count("apply RLHFJob sample") == 1
    assert (world.record["clusters"], world.record["clusterUid"]) == (1, "sample-1-rayclusters-1")


def test_every_later_cluster_is_on_record_before_it_is_made() -> None:
    world = running()
    world.delete_cluster()
    before = len(world.api.writes)
    for _ in range(5):
        world.settle()
        world.reap()
        world.later(30)
    writes = [w for w in world.api.writes[before:] if "Event" not in w]
    assert writes.index("apply RLHFJob sample") < writes.index("create RayCluster sample-2")


def _with_a_cluster_that_nobody_told_of() -> World:
    """The operator died right behind making it."""
    world = World()
    world.api.kill_at = 5  # the sixth write
    with pytest.raises(Killed):
        RUNNER.run(reconcile(ClusterIO(world.api, world.api.store), ("default", "sample"), lambda: world.api.now))
    world.api.dead, world.api.kill_at = False, None
    assert (world.clusters(), world.status) == (["sample-1"], {})
    return world


@pytest.mark.parametrize("edit", [{"suspend": True}, {"trainer": {"gpus": 1, "steps": 0}}])
def test_a_first_cluster_that_nobody_told_of_is_given_up_where_the_spec_allows_none(edit: dict[str, Any]) -> None:
    world = _with_a_cluster_that_nobody_told_of()
    world.edit(**edit)
    world.settle()
    assert world.clusters() == []


def test_a_first_cluster_that_nobody_told_of_is_made_anew_where_an_edit_wants_another() -> None:
    world = _with_a_cluster_that_nobody_told_of()
    world.edit(image="another:1")
    for _ in range(3):
        world.settle()
        world.reap()
    assert world.clusters() == ["sample-2"]


def test_what_is_ours_already_is_brought_up_to_date() -> None:
    world = World()
    world.settle()
    made = world.api.objects[("configmaps", "default", "sample-run")]
    made["data"] = {"run.yaml": "of an earlier version"}
    (cluster,) = world.api.of(RAYCLUSTERS)
    world.api.vanish(RAYCLUSTERS, cluster)
    world.settle()
    assert "job:" in world.api.of(CONFIG_MAPS)[0]["data"]["run.yaml"]


def test_an_object_of_another_is_never_changed() -> None:
    world = World()
    world.api.put(CONFIG_MAPS, {"metadata": {"name": "sample-run"}, "data": {"theirs": "1"}})
    world.settle()
    assert world.api.of(CONFIG_MAPS)[0]["data"] == {"theirs": "1"}
    assert world.condition("Accepted") == ("False", "NameConflict")
    assert "sample-run" in world.status["message"]


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    world = World()
    world.job_raw["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    world.settle()
    assert world.api.writes == []


def test_a_job_whose_deletion_waits_for_us_is_served() -> None:
    world = World()
    world.job_raw["metadata"] |= {"deletionTimestamp": "2026-01-01T12:00:00Z", "finalizers": [FINALIZER]}
    world.settle()
    assert world.api.of(JOBS) == [], "nothing is to be saved, and nothing else holds it"


@pytest.mark.parametrize("there", [[], ["theirs"]])
def test_the_finalizer_is_put_on_before_and_taken_off_after_and_no_other_is_touched(there: list[str]) -> None:
    world = World()
    world.job_raw["metadata"]["finalizers"] = list(there)
    act(
        world,
        Plan(
            "default",
            create=({"kind": "RayCluster", "metadata": {"name": "x", "labels": {JOB_LABEL: "sample"}}},),
            finalizer=True,
        ),
    )
    assert world.job_raw["metadata"]["finalizers"] == [*there, FINALIZER]
    assert world.api.writes == ["patch RLHFJob sample", "create RayCluster x"]
    act(world, Plan("default", finalizer=True))
    assert len(world.api.writes) == 2, "it is on already"
    (cluster,) = world.api.of(RAYCLUSTERS)
    act(world, Plan("default", delete=(Deletion("RayCluster", "x", cluster["metadata"]["uid"]),), finalizer=False))
    assert world.api.writes[2:] == ["delete RayCluster x", "patch RLHFJob sample"]
    assert world.job_raw["metadata"]["finalizers"] == there


def test_with_its_last_finalizer_a_job_is_gone_from_the_store_too() -> None:
    world = World()
    world.job_raw["metadata"] |= {"deletionTimestamp": "2026-01-01T12:00:00Z", "finalizers": [FINALIZER]}
    act(world, Plan("default", finalizer=False))
    assert world.api.of(JOBS) == []
    assert world.api.store.sizes()["rlhfjobs"] == 0


def test_a_pod_that_no_kubelet_ends_is_ended_by_force() -> None:
    world = running()
    head = world.head()["metadata"]
    act(world, Plan("default", delete=(Deletion("Pod", head["name"], head["uid"], grace_seconds=0),)))
    assert world.pods("head") == []


def act(world: World, plan: Plan) -> None:
    store = world.api.store
    job = store.job(("default", "sample"))
    assert job is not None
    asyncio.run(ClusterIO(world.api, store).perform(job, plan))


def test_a_pass_reads_nothing_and_a_steady_state_takes_few_calls() -> None:
    world = running()
    assert not [call for call in world.api.calls if call.startswith(("get", "list"))]
    assert len(world.api.calls) <= 20, world.api.calls
    before = len(world.api.calls)
    for _ in range(5):
        world.later(60)
        world.report(step=4)
        world.settle()
    assert world.api.calls[before:] == []


def test_what_a_pass_wrote_the_next_one_knows_though_the_watch_is_late() -> None:
    world = World()
    world.api.deliver() if world.api.store else None
    world.api.live = False
    world.settle()
    assert world.clusters() == ["sample-1"]
    assert [call for call in world.api.calls if call == "create RayCluster"] == ["create RayCluster"]
    assert not [call for call in world.api.calls if call.startswith(("get", "list"))]


def test_a_write_that_comes_too_late_is_refused_and_the_job_looked_at_again() -> None:
    """An operator that was deposed meanwhile, or one whose watch is behind."""
    world = running()
    world.api.live = False
    world.job_raw["status"]["record"]["clusters"] = 7
    world.driver_ends(1, "ValueError")
    world.api.commit()
    world.api.pending = [event for event in world.api.pending if event.kind is not JOBS]
    world.api.deliver()
    world.settle()
    assert world.errors == []
    assert world.record["clusters"] >= 7, "what the other wrote stays"
    assert world.api.calls.count("get RLHFJob") == 1


def test_a_status_of_which_a_part_is_not_kept_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CRD is of an earlier release: it prunes what it does not know."""
    world, apply = World(), MemoryApi.apply

    async def pruned(self: MemoryApi, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        body["status"]["record"].pop("clusterUid", None)
        return await apply(self, kind, namespace, body, status=status)

    monkeypatch.setattr(MemoryApi, "apply", pruned)
    io = ClusterIO(world.api, world.api.store)
    wakes = [
        asyncio.run(reconcile(io, ("default", "sample"), lambda: world.api.now)) for _ in range(9) if world.api.store
    ]
    assert wakes[-1] is not None and wakes[-1] > world.api.now, "it goes round and round"
    assert world.api.calls.count("patch status RLHFJob") <= 4


@pytest.mark.parametrize(("kind", "name"), [("ConfigMap", "sample-run"), ("RayCluster", "sample-1")])
def test_what_a_predecessor_left_is_waited_for(kind: str, name: str) -> None:
    """delete and apply in one breath: the garbage collector comes after."""
    world = World()
    owner = {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "RLHFJob",
        "name": "sample",
        "uid": "of-the-former",
        "controller": True,
    }
    left = {"metadata": {"name": name, "labels": {JOB_LABEL: "sample"}, "ownerReferences": [owner]}, "spec": {}}
    world.api.put(OF_KIND[kind], left)
    world.settle()
    assert world.errors == []
    assert world.condition("Accepted")[0] == "True"
    assert not [event for event in world.events() if event.startswith("Warning")]
    wake = asyncio.run(reconcile(ClusterIO(world.api, world.api.store), ("default", "sample"), lambda: world.api.now))
    assert wake is not None and wake - world.api.now <= timedelta(seconds=5)
    assert (world.status["phase"], world.status["reason"]) == ("Pending", "WaitingForOldObjects")
    assert f"{kind} {name}" in world.status["message"]
    world.later(300)
    writes = len(world.api.writes)
    world.settle()
    assert world.wake is not None and world.wake - world.api.now >= timedelta(seconds=20), "somebody holds it"
    assert len(world.api.writes) == writes
    world.api.remove(OF_KIND[kind], name)
    world.settle()
    assert world.clusters() == ["sample-1"]


def test_a_claim_that_was_kept_is_taken_up_and_a_strangers_is_not() -> None:
    world = World()
    body = {
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "sample-checkpoints", "labels": {JOB_LABEL: "sample"}},
        "spec": {},
    }
    world.api.put(
        CLAIMS, {"metadata": {"name": "sample-checkpoints", "labels": {JOB_LABEL: "sample"}}, "spec": {"size": 1}}
    )
    act(world, Plan("default", create=(body,)))
    assert world.api.of(CLAIMS)[0]["spec"] == {"size": 1}
    world.api.of(CLAIMS)[0]["metadata"]["labels"] = {}
    store = world.api.store
    job = store.job(("default", "sample"))
    assert job is not None
    refusal = asyncio.run(ClusterIO(world.api, store).perform(job, Plan("default", create=(body,))))
    assert refusal is not None and refusal.reason == "NameConflict"


def test_what_cannot_be_planned_is_told() -> None:
    """Everything between the look and the write, whatever it is: this quantity is valid, and the planner chokes on
    it."""
    world = World()

    def choke(*_: object) -> None:
        raise AttributeError("'str' object has no attribute 'get'")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconcile_module, "plan", choke)
        with pytest.raises(AttributeError):
            world.settle()
        assert world.condition("Degraded") == ("True", "ReconcileError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconcile_module, "decide", choke)
        world.job_raw["status"]["conditions"] = [c for c in world.status["conditions"] if c["type"] != "Degraded"]
        with pytest.raises(AttributeError):
            world.settle()
        assert world.condition("Degraded") == ("True", "ReconcileError")


def test_a_heartbeat_wakes_nobody() -> None:
    world = running()
    assert world.api.store is not None
    world.api.woken.clear()
    world.report(step=4)
    assert world.api.store and world.api.woken == []
    world.driver_ends(1, "ValueError")
    assert world.api.store and world.api.woken == [("default", "sample")]


def test_events_that_are_refused_stop_nothing() -> None:
    world = World()
    world.api.refuse["Event"] = ApiError(403, "Forbidden", "no")
    world.settle()
    assert world.clusters() == ["sample-1"]


def test_an_event_is_about_the_job_and_is_told_once() -> None:
    world = World()
    world.settle()
    world.settle()
    (event,) = world.api.of(EVENTS)
    assert (event["involvedObject"]["kind"], event["involvedObject"]["name"]) == ("RLHFJob", "sample")
    assert event["reason"] == "Creating"


def test_every_call_is_covered_by_the_rules_and_every_rule_is_needed() -> None:
    """Of the verbs that the client uses. Watches, and the list of Events, are kopf's, leases the election's."""
    used = {("list", EVENTS), ("delete", JOBS)}  # the latter for runPolicy.ttlSecondsAfterFinished
    for story in STORIES.values():
        world = World()
        for _ in story(world):
            world.settle()
        used |= world.api.used
    for kind in LISTED:
        world.api.absent.clear()
        asyncio.run(refresh(world.api, world.api.store, kind, None))
    for kind in (CLAIMS, NETWORK_POLICIES, CONFIG_MAPS, SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, RAYCLUSTERS):
        used |= made_twice(kind)
    used |= late_and_finalized() | swept()
    used |= world.api.used
    for kind in NAMESPACED:
        mine = {verb for verb, other in used if other is kind}
        assert {v for v in mine if " " not in v} == set(kind.verbs) - {"watch"}, kind.plural
        assert {v.split()[0] for v in mine if " " in v} | {"get"} == set(kind.status_verbs) | {"get"}


def made_twice(kind: Kind) -> set[tuple[str, Kind]]:
    """Verbs on an object of ours that is there already, and changed since where it may be."""
    world = World()
    owner = {"kind": "RLHFJob", "name": "sample", "uid": world.job_raw["metadata"]["uid"], "controller": True}
    meta = {"name": "x", "labels": {JOB_LABEL: "sample"}, "ownerReferences": [owner]}
    first, second = ({"kind": kind.kind, "metadata": dict(meta), "data": {"n": n}} for n in (1, 2))
    lasting = kind in (CLAIMS, RAYCLUSTERS)
    act(world, Plan("default", create=(first,)))
    act(world, Plan("default", create=(second,)) if lasting else Plan("default", ensure=(second,)))
    assert world.api.of(kind)[0]["data"] == {"n": 1 if lasting else 2}
    return world.api.used


def swept() -> set[tuple[str, Kind]]:
    world = World()
    world.settle()
    world.api.collects = False
    world.delete()
    world.settle()
    return world.api.used


def late_and_finalized() -> set[tuple[str, Kind]]:
    world = World()
    job = world.api.store.job(("default", "sample"))
    assert job is not None
    act(world, Plan("default", finalizer=True))
    asyncio.run(ClusterIO(world.api, world.api.store).catch_up(job))
    return world.api.used


def test_rules_cover_what_the_drivers_role_grants() -> None:
    by_resource = {(r["apiGroups"][0], r["resources"][0]): set(r["verbs"]) for r in rules()}
    assert "get" in by_resource[("rlhf.dev", "rlhfjobs")]
    assert "patch" in by_resource[("rlhf.dev", "rlhfjobs/status")]
    assert by_resource[("coordination.k8s.io", "leases")] == set(LEASES.verbs)
