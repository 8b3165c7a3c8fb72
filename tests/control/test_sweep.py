"""What a gone job owned is deleted by the operator, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_operator import store as store_module
from rlhf_operator.client import ApiError
from rlhf_operator.decide import Want
from rlhf_operator.kinds import CLAIMS, CONFIG_MAPS, JOBS, NETWORK_POLICIES, OF_KIND, PODS, RAYCLUSTERS, ROLES
from rlhf_operator.names import JOB_LABEL
from rlhf_operator.observed import owner_uid, read_job
from rlhf_operator.plan import plan
from rlhf_operator.sweep import owned
from tests.api.specs import a_job
from tests.control.api_server import ApiServer
from tests.control.test_watches import job, led, operator, until
from tests.control.world import World

Raw = dict[str, Any]
OWNED = {("RayCluster", "sample-1"), *((kind.kind, name) for kind, name in owned("sample"))}


def made(**changes: Any) -> World:
    """A job with its RayCluster, in a cluster whose garbage collector has much else to do."""
    world = World(**changes)
    world.settle()
    world.api.collects = False
    assert left(world) >= OWNED
    return world


def left(world: World) -> set[tuple[str, str]]:
    """Kind and name of all that a job made."""
    named = {kind.plural: kind.kind for kind in OF_KIND.values()}
    return {(named[p], name) for p, _, name in world.api.objects if p not in ("rlhfjobs", "events", "pods")}


def applied_again(world: World) -> str:
    """The uid of a new job of the same name."""
    world.job_raw = world.api.put(JOBS, a_job(name="sample", checkpoint={"path": "s3://bucket/run"}))
    world.job_raw["metadata"]["generation"] = 1
    return str(world.job_raw["metadata"]["uid"])


def test_all_that_a_job_owns_by_name_is_known() -> None:
    found = plan(read_job(a_job("sample")), Want(cluster=1), "home")
    made = {(body["kind"], body["metadata"]["name"]) for body in (*found.ensure, *found.create)}
    assert made == OWNED


def test_what_a_gone_job_owned_goes_at_once_and_the_cluster_first() -> None:
    world = made()
    world.delete()
    writes = len(world.api.writes)
    world.settle()
    assert left(world) == set()
    assert world.api.writes[writes] == "delete RayCluster sample-1", "it holds the GPUs"
    calls = len(world.api.calls)
    world.settle()
    assert len(world.api.calls) == calls, "once"


def test_pods_go_with_their_cluster_and_strangers_stay() -> None:
    world = made()
    world.up()
    stranger = {"metadata": {"name": "tensorboard", "labels": {JOB_LABEL: "sample"}}, "status": {"phase": "Running"}}
    world.api.put(PODS, stranger)
    world.delete()
    world.settle()
    staying = [p["metadata"]["name"] for p in world.pods() if "deletionTimestamp" not in p["metadata"]]
    assert staying == ["tensorboard"]


def test_nothing_is_asked_about_a_job_that_never_made_anything() -> None:
    world = World(suspend=True)
    world.settle()
    calls = len(world.api.calls)
    world.delete()
    world.settle()
    assert len(world.api.calls) == calls


@pytest.mark.parametrize("kept", ["Keep", "Delete"])
def test_claims_are_left_to_the_garbage_collector(kept: str) -> None:
    world = made(checkpoint={"path": "/checkpoints/run", "claim": {"size": "1Gi", "onDelete": kept}})
    world.delete()
    world.settle()
    assert left(world) == {("PersistentVolumeClaim", "sample-checkpoints")}
    world.api.collect()
    assert len(world.api.of(CLAIMS)) == (kept == "Keep")


@pytest.mark.parametrize("live", [True, False])
def test_a_job_that_was_applied_again_loses_nothing_and_waits_for_nothing(live: bool) -> None:
    world = made()
    world.delete()
    if not live:  # the watch tells of end and beginning together, after the operator looked
        world.api.live = False
        world.settle()
        world.api.commit()
    uid = applied_again(world)
    world.api.live = True
    world.settle()
    assert left(world) == OWNED
    found = [raw for (plural, _, _), raw in world.api.objects.items() if plural not in ("rlhfjobs", "events")]
    assert {owner_uid(raw) for raw in found} == {uid}
    world.api.collect()
    assert left(world) == OWNED
    assert world.status["reason"] != "WaitingForOldObjects"


def both_alike(world: World) -> None:
    """The predecessor's end is told when the successor has everything already."""
    world.api.collect()
    applied_again(world)
    world.settle()


def has_another_owner(world: World) -> None:
    for kind, _ in {(RAYCLUSTERS, ""), *owned("sample")}:
        for raw in world.api.of(kind):
            raw["metadata"]["ownerReferences"].append({"kind": "Team", "name": "blue", "uid": "blue"})


@pytest.mark.parametrize("happens", [both_alike, has_another_owner])
def test_what_is_not_its_own_alone_stays(happens: Callable[[World], None]) -> None:
    world = made()
    world.api.live = False
    world.delete()
    happens(world)
    world.api.live = True
    world.settle()
    assert left(world) == OWNED


def test_an_orphaning_deletion_orphans() -> None:
    world = made()
    world.api.live = False
    world.api.orphan(JOBS, world.job_raw)
    world.api.commit()
    for event in [e for e in world.api.pending if e.kind is JOBS]:  # its end is told before all else
        world.api.tell(event)
    world.api.pending.clear()
    writes = len(world.api.writes)
    world.settle()
    assert world.api.writes[writes:] == [] and left(world) == OWNED


def test_a_foreground_deletion_is_the_garbage_collectors_until_the_job_is_gone() -> None:
    world = made()
    world.job_raw["metadata"]["finalizers"] = ["foregroundDeletion"]
    world.delete()
    writes = len(world.api.writes)
    world.settle()
    assert world.api.writes[writes:] == []
    world.api.remove(JOBS, "sample")
    world.settle()
    assert left(world) == set()


def test_the_stores_word_alone_deletes_nothing() -> None:
    world = made()
    world.api.store.drop(JOBS, world.job_raw["metadata"]["uid"])
    world.settle()
    assert left(world) == OWNED


def test_an_end_that_no_watch_told_is_found_by_a_list() -> None:
    world = made()
    world.api.live = False
    world.delete()
    world.settle()
    assert left(world) == OWNED
    world.api.commit()
    world.api.pending.clear()
    world.api.relist()
    world.settle()
    assert left(world) == set()


@pytest.mark.parametrize("n", range(len(OWNED)))
@pytest.mark.parametrize("again", [False, True])
def test_a_crash_halfway_leaves_the_rest_to_the_garbage_collector(n: int, again: bool) -> None:
    world = made()
    world.delete()
    if again:
        applied_again(world)
    world.api.kill_at = len(world.api.writes) + n
    world.settle()
    world.api.restart()
    world.settle()
    world.api.collect()
    world.later(2)
    world.settle()
    assert left(world) == (OWNED if again else set())


REFUSALS = [ApiError(403, "Forbidden", "no"), ApiError(429, "", "slow", 1.0), ApiError(0, "NotLeader", "")]


@pytest.mark.parametrize("error", REFUSALS)
def test_what_may_not_be_deleted_holds_nobody_up(error: ApiError) -> None:
    world = made()
    world.delete()
    world.api.refuse["RoleBinding"] = error
    world.settle()
    assert world.errors == []
    assert (ROLES.kind, "sample-driver") in left(world)
    world.api.refuse.clear()
    applied_again(world)
    world.settle()
    assert world.status["reason"] == "WaitingForOldObjects"
    world.api.collect()
    world.settle()
    assert left(world) == OWNED


def test_a_standby_remembers_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BEREFT_MAX", 2)
    world = World()
    for name in ("one", "two", "three"):
        raw = world.api.put(JOBS, a_job(name=name) | {"status": {"record": {"clusters": 1}}})
        assert world.api.store.holds(JOBS, raw["metadata"]["uid"])
        world.api.remove(JOBS, name)
    found = [bool(world.api.store.take_bereft(("default", name))) for name in ("one", "two", "three")]
    assert found == [False, True, True]


async def test_only_the_leader_deletes(tmp_path: Path) -> None:
    async with (
        ApiServer(absent={"workloads", "localqueues"}).running() as server,
        operator(server, tmp_path, "one", "default") as one,
        operator(server, tmp_path, "two", "default") as two,
    ):
        await until(lambda: led(one).won.is_set() or led(two).won.is_set())
        leader, standby = ("one", "two") if led(one).won.is_set() else ("two", "one")
        server.put(JOBS, job())
        await until(lambda: server.of(RAYCLUSTERS) and all(it.store.sizes()["rayclusters"] for it in (one, two)))
        server.remove(JOBS, "sample")
        await until(lambda: not any(server.of(kind) for kind in (RAYCLUSTERS, CONFIG_MAPS, NETWORK_POLICIES)))
        assert server.writes(leader) and not server.writes(standby)
