"""A job's life in any order. KubeRay, kubelet, driver, scheduler, garbage collector, user, clock and API server each
move by themselves, and the operator looks when it happens to. What really was is kept beside it, and the status is held
against that.

CI takes a hundred or so lives; `RLHF_LIVES=5000 RLHF_SEED=7` takes other and more ones. A seed does not stand for the
same lives everywhere: hypothesis also tries constants of the modules that are loaded. It prints the shortest life that
breaks a promise, as a program.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rlhf_operator.client import ApiError
from rlhf_operator.kinds import PODS, RAYCLUSTERS
from rlhf_operator.names import DRIVER_CONTAINER, JOB_LABEL, RAY_CONTAINER, ROLE_LABEL
from rlhf_operator.queue import Schedule
from rlhf_operator.shelf import Key
from tests.control.world import START, World

Raw = dict[str, Any]
LIVES, SEED = int(os.environ.get("RLHF_LIVES", "120")), int(os.environ.get("RLHF_SEED", "11"))
STALL_SECONDS, PROVISION_SECONDS, REPROVISION_SECONDS = 300, 3600, 86400
# A loss explains a driver's end from its beginning to this long after it is over, and no longer once a step was
# finished that late.
NEAR, SURVIVED = timedelta(seconds=200), timedelta(seconds=60)
SAME_TIME = timedelta(seconds=5)
# Watches that say nothing for longer are begun anew.
BEHIND = timedelta(seconds=60)
ANY = st.integers(0, 7)
KEYS = st.sampled_from([("default", "a"), ("default", "b")])
BREAKS = [
    "ray",
    "memory",
    "force",
    "deleted",
    "cluster",
    "PreemptionByScheduler",
    "EvictionByEvictionAPI",
    "DeletionByTaintManager",
]
CLASSES = ("app", "oom", "headLost", "nodeLost", "preempted", "stalled")


@dataclass
class Loss:
    """Something broke under the driver. `charge` is the class that it may be charged to."""

    uid: str
    charge: str
    began: datetime
    gone: datetime | None = None

    @property
    def works_until(self) -> datetime:
        """A pod that stays much longer than it was given has no kubelet, and so takes nothing along when it goes."""
        return min(self.gone or self.began, self.began + timedelta(seconds=60)) + timedelta(seconds=60)


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Loss] = []
        self.lost_heads: set[str] = set()
        self.may: Counter[str] = Counter()  # charges that have an explanation, by class
        self.incidents = 0
        self.ends_unseen = 0
        self.words = 0
        self.step_made_in = ""
        self.behind_since = START
        self.ended_at = START - SAME_TIME * 2

    @initialize(
        up=st.sampled_from(("none", "head", "all")), lasting=st.booleans(), keep=st.booleans(), separated=st.booleans()
    )
    def is_applied(self, up: str, lasting: bool, keep: bool, separated: bool) -> None:
        policy = {
            "stallTimeoutSeconds": STALL_SECONDS, "provisioningDeadlineSeconds": PROVISION_SECONDS, "backoffLimit": 3,
            "reprovisioningDeadlineSeconds": REPROVISION_SECONDS,
            "cleanup": {"onFailure": "Keep" if keep else "Delete"},
        }  # fmt: skip
        lies = {"path": "s3://bucket/run" if lasting else "/checkpoints"}
        mode = "Separated" if separated else "Colocated"
        self.world = World(runPolicy=policy, checkpoint=lies, placement__mode=mode)
        self.lasting = lasting
        self.awaited = self.active = self.world.api.now
        self.ready = self.seen_ready = self.was_ready = False
        self.world.settle()
        if up == "head":
            self.world.kuberay()
            self.world.start(self.world.head())
            self.world.settle()
        if up == "all":
            self.world.up()
            self._look()
            self.world.settle()
            self.world.later(10)
            self._finish_step()
            self.world.settle()

    # what is there

    def pods(self, *, going: bool | None = None) -> list[Raw]:
        """Of the present RayCluster and of earlier ones; a stranger's do not count."""
        pods = [p for p in self.world.pods() if p["metadata"].get("ownerReferences")]
        return [p for p in pods if going in (None, "deletionTimestamp" in p["metadata"])]

    def pod(self, which: int, *, going: bool | None = False) -> Raw | None:
        pods = self.pods(going=going)
        return pods[which % len(pods)] if pods else None

    def heads(self) -> list[Raw]:
        uids = [c["metadata"]["uid"] for c in self.world.api.of(RAYCLUSTERS)]
        return [p for p in self.world.pods("head") if p["metadata"]["ownerReferences"][0]["uid"] in uids]

    @property
    def head(self) -> Raw | None:
        heads = [p for p in self.heads() if "deletionTimestamp" not in p["metadata"]]
        return heads[-1] if heads else None

    @property
    def any_driver(self) -> Raw | None:
        """The pod whose driver runs: the newest."""
        alive = [p for p in self.heads() if "running" in self.world.container(p, DRIVER_CONTAINER)["state"]]
        return alive[-1] if alive else None

    def driver_runs(self) -> bool:
        return self.any_driver is not None

    def all_ready(self) -> bool:
        """As far as Ray goes, of the pods that stay."""
        roles = Counter(p["metadata"]["labels"][ROLE_LABEL] for p in self.pods(going=False) if self._ray_runs(p))
        clusters = self.world.api.of(RAYCLUSTERS)
        return (
            bool(clusters)
            and roles["head"] >= 1
            and all(roles[g["groupName"]] >= g["replicas"] for g in clusters[-1]["spec"]["workerGroupSpecs"])
        )

    def _ray_runs(self, pod: Raw) -> bool:
        return pod["status"]["phase"] == "Running" and "running" in self.world.container(pod, RAY_CONTAINER)["state"]

    @property
    def now(self) -> datetime:
        return self.world.api.now

    def _look(self) -> None:
        """What the clocks really count from."""
        was, self.ready = self.ready, self.all_ready()
        self.seen_ready &= self.ready
        self.active = self.now if self.ready and not was else self.active

    # the driver

    def _finish_step(self) -> None:
        self.step = getattr(self, "step", 0) + 1
        self.active, self.was_ready = self.now, True
        trainers = [p for p in self.world.pods("trainer") if "deletionTimestamp" not in p["metadata"]]
        self.step_made_in = trainers[0]["metadata"]["uid"] if trainers else ""
        head = self.any_driver
        assert head is not None
        saved = {"step": self.step, "path": "/c", "time": self._stamp()}
        self.world.report(step=self.step, checkpoint=saved, podUid=head["metadata"]["uid"], activityTime=self._stamp())
        self.losses = [loss for loss in self.losses if loss.gone is None or self.now < loss.gone + SURVIVED]

    def _stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    @precondition(lambda self: self.driver_runs() and self.all_ready())
    @rule()
    def a_step_is_finished(self) -> None:
        self._finish_step()

    @precondition(lambda self: self.driver_runs() and self.all_ready())
    @rule()
    def the_driver_evaluates(self) -> None:
        """A report that it gets further, without a step."""
        self.active, head = self.now, self.any_driver
        assert head is not None
        told = {
            k: v
            for k, v in self.world.status.get("progress", {}).items()
            if k in ("state", "step", "checkpoint", "stepTime")
        }
        self.world.report(
            **{"state": "Starting", **told, "podUid": head["metadata"]["uid"], "activityTime": self._stamp()}
        )

    @precondition(lambda self: self.driver_runs())
    @rule()
    def the_driver_errs(self) -> None:
        """By its own doing."""
        self._driver_ends(1, "ValueError: advantages are not finite", own=True)

    @precondition(lambda self: self.driver_runs() and self._near())
    @rule(code=st.sampled_from((1, 143)))
    def the_driver_dies_of_a_loss(self, code: int) -> None:
        self._driver_ends(code, "ActorDiedError: an actor died unexpectedly", own=False)

    def _near(self) -> list[Loss]:
        """A head pod takes its own driver along, and not its successor's."""
        mine = self.any_driver["metadata"]["uid"] if self.any_driver else ""
        reach = [loss for loss in self.losses if loss.uid == mine or loss.uid not in self.lost_heads]
        return [loss for loss in reach if self.now <= loss.works_until]

    def _driver_ends(self, code: int, words: str, *, own: bool) -> None:
        head = self.any_driver
        assert head is not None
        self.words += 1
        self.world.ends(head, DRIVER_CONTAINER, code, f"{words} ({self.words})")
        near = {loss.charge for loss in self.losses if self.now <= (loss.gone or self.now) + NEAR}
        self.may.update(
            [*near, *(["app"] if own else [])] if not self.ends_unseen else CLASSES * 2
        )  # all count as the last one
        self.incidents += 1
        self.ends_unseen += 1
        self.ended_at = self.now

    @precondition(
        lambda self: (
            self.head is not None
            and self.head["status"]["phase"] == "Running"
            and "terminated" in self.world.container(self.head, DRIVER_CONTAINER)["state"]
        )
    )
    @rule()
    def the_driver_restarts(self) -> None:
        """A pod that has failed runs nothing again."""
        head = self.head
        assert head is not None
        if self.world.container(head, DRIVER_CONTAINER)["state"]["terminated"]["exitCode"]:
            self.world.restarts(head, DRIVER_CONTAINER)
            self.active = self.now

    # KubeRay, kubelet, scheduler, garbage collector

    @rule()
    def kuberay_makes_pods(self) -> None:
        self.world.kuberay()

    @rule(which=ANY)
    def a_pod_starts(self, which: int) -> None:
        waiting = [p for p in self.pods(going=False) if p["status"]["phase"] == "Pending"]
        if waiting:
            pod = waiting[which % len(waiting)]
            self.world.start(pod)
            self.active = self.now if pod["metadata"]["labels"][ROLE_LABEL] == "head" else self.active
            self._look()

    @precondition(lambda self: self.pods(going=True))
    @rule(which=ANY)
    def a_pod_is_gone(self, which: int) -> None:
        pod = self.pod(which, going=True)
        assert pod is not None
        self._gone(pod)

    def _gone(self, pod: Raw) -> None:
        self.world.api.remove(PODS, pod["metadata"]["name"])
        for loss in self.losses:
            if loss.uid == pod["metadata"]["uid"] and loss.gone is None:
                loss.gone = self.now

    @precondition(lambda self: self.pods(going=False))
    @rule(how=st.deferred(lambda: st.sampled_from(BREAKS)), which=ANY)
    def something_breaks(self, how: str, which: int) -> None:
        pods = [p for p in self.pods(going=False) if p["status"]["phase"] == "Running"]
        if how == "cluster":
            self._lose_cluster()
        elif pods:
            self._break(pods[which % len(pods)], how)

    def _break(self, pod: Raw, how: str) -> None:
        is_head = pod["metadata"]["labels"][ROLE_LABEL] == "head"
        if how == "ray":
            self._lose_ray(pod, is_head)
        elif how == "memory":
            self.world.evict(pod)
            self._lost(pod, "nodeLost")
        elif how == "force":
            self._lost(pod, "headLost" if is_head else "nodeLost")
            self.may.update([] if is_head else ["app", "nodeLost"])  # of a worker that nobody saw go
            self._gone(pod)
        elif how == "deleted":
            self.world.api.vanish(PODS, pod)
            self._lost(pod, "headLost" if is_head else "nodeLost")
        else:
            self.world.disrupt(pod, how, "it has to go")
            self._lost(pod, "nodeLost" if how == "DeletionByTaintManager" else "preempted")

    def _may_explain(self, charge: str) -> None:
        """An end that came in the same seconds, in whatever order."""
        if self.now <= self.ended_at + SAME_TIME:
            self.may[charge] += 1

    def _lost(self, pod: Raw, charge: str) -> None:
        self._may_explain(charge)
        self.losses.append(Loss(pod["metadata"]["uid"], charge, self.now))
        if pod["metadata"]["labels"][ROLE_LABEL] == "head":
            self.lost_heads.add(pod["metadata"]["uid"])
            self.may[charge] += 1
            self.may["headLost"] += 1  # if nobody saw why
            self.incidents += 1
        else:
            self.losses.append(Loss(pod["metadata"]["uid"], "nodeLost", self.now))  # likewise
            self._may_explain("nodeLost")
        self._look()

    def _lose_ray(self, pod: Raw, is_head: bool) -> None:
        if self._ray_runs(pod):
            self.world.ends(pod, RAY_CONTAINER, 1, "the raylet is gone")
            charge, uid = "headLost" if is_head else "nodeLost", pod["metadata"]["uid"]
            self.losses.append(Loss(uid, charge, self.now, self.now))
            self.lost_heads |= {uid} if is_head else set()
            self._may_explain(charge)
            self._look()

    @precondition(
        lambda self: any(
            "terminated" in self.world.container(p, RAY_CONTAINER)["state"] for p in self.pods(going=False)
        )
    )
    @rule()
    def ray_restarts(self) -> None:
        for pod in self.pods(going=False):
            if (
                pod["status"]["phase"] == "Running"
                and "terminated" in self.world.container(pod, RAY_CONTAINER)["state"]
            ):
                self.world.restarts(pod, RAY_CONTAINER)
        self._look()

    def _lose_cluster(self) -> None:
        if not self.world.api.of(RAYCLUSTERS):
            return
        self.world.api.vanish(RAYCLUSTERS, self.world.api.of(RAYCLUSTERS)[-1])
        self.losses += [Loss(p["metadata"]["uid"], "headLost", self.now) for p in self.pods()]
        self.may["headLost"] += 1
        self.incidents += 1
        self._look()

    @precondition(lambda self: all(p["metadata"]["name"] != "tensorboard" for p in self.world.pods()))
    @rule()
    def a_stranger_uses_our_label(self) -> None:
        meta = {"name": "tensorboard", "labels": {JOB_LABEL: "sample", ROLE_LABEL: "tensorboard"}}
        self.world.api.put(PODS, {"metadata": meta, "status": {"phase": "Running"}})

    # user and clock

    @rule(suspend=st.booleans())
    def the_user_edits(self, suspend: bool) -> None:
        self.world.edit(suspend=suspend)

    @precondition(lambda self: self.world.job_raw["spec"].get("suspend"))
    @rule(steps=st.sampled_from((20, 30)))
    def the_user_edits_what_takes_another_cluster(self, steps: int) -> None:
        self.world.edit(trainer={**self.world.job_raw["spec"]["trainer"], "steps": steps})

    @rule(seconds=st.sampled_from((1, 7, 30, 130)))
    def time_passes(self, seconds: int) -> None:
        self.world.later(seconds)
        self.awaited = self.now if self.seen_ready else self.awaited
        if not self.world.api.live and self.now > self.behind_since + BEHIND:
            self.the_watches_catch_up()

    @rule(seconds=st.sampled_from((310, 1000, 4000)))
    def long_time_passes(self, seconds: int) -> None:
        self.time_passes(seconds)

    # the operator

    @rule()
    def the_operator_looks(self) -> None:
        self._pass()

    @rule()
    def the_operator_looks_later(self) -> None:
        self.world.later(1)
        self._pass()

    @rule(write=st.integers(0, 4))
    def the_operator_dies_and_comes_back(self, write: int) -> None:
        self.world.api.kill_at = len(self.world.api.writes) + write
        self._pass()
        self.world.api.kill_at = None

    @rule(kind=st.sampled_from(("RLHFJob", "RayCluster", "Pod", "ConfigMap")))
    def the_api_server_fails(self, kind: str) -> None:
        self.world.api.refuse[kind] = ApiError(500, "InternalError", "etcd has no leader")
        try:
            self.world.settle()
        finally:
            del self.world.api.refuse[kind]

    # the operator's watches

    @precondition(lambda self: self.world.api.live)
    @rule()
    def the_watches_fall_behind(self) -> None:
        self.world.api.live, self.behind_since = False, self.now

    @precondition(lambda self: self.world.api.pending)
    @rule(how=st.sampled_from(("late", "lost", "twice")), which=ANY)
    def an_event_comes(self, how: str, which: int) -> None:
        """In any order, more than once, or never."""
        event = self.world.api.pending[which % len(self.world.api.pending)]
        if how != "lost":
            self.world.api.tell(event)
        if how != "twice":
            self.world.api.pending.remove(event)

    @rule()
    def the_watches_catch_up(self) -> None:
        """A list finds what they lost."""
        self.world.api.pending.clear()
        self.world.api.relist()
        self.world.api.live = True

    def _pass(self) -> None:
        ended = bool(self.world.record.get("result"))
        stalled = self.world.status.get("restarts", {}).get("stalled", 0)
        said = self._said()
        self._look()
        if self.ready and self.world.api.live:  # readiness that came and went unseen, nobody can know of
            self.awaited, self.seen_ready, self.was_ready = self.now, True, True
        self.world.settle()
        self.ends_unseen = 0
        if self.world.status["phase"] in ("Suspending", "Suspended"):
            self.awaited = self.now
        for check in CHECKS if self.world.api.live else [charges_have_causes]:
            check(self, Seen(ended, stalled, said))

    def _said(self) -> list[str]:
        """Last words of the drivers whose pods can be seen."""
        return [
            c["terminated"]["message"]
            for p in self.heads()
            for c in [self.world.container(p, DRIVER_CONTAINER)["state"]]
            if c.get("terminated", {}).get("exitCode")
        ]

    def teardown(self) -> None:
        """Nobody but the clock and the operator moves any more."""
        if not hasattr(self, "world"):
            return
        self.the_watches_catch_up()
        for _ in range(60):
            self.world.settle()
            if self.world.wake is None:
                break
            self.world.api.now = max(self.now, self.world.wake)
        for check in LAST_CHECKS:
            check(self)


@dataclass(frozen=True)
class Seen:
    """What there was right before a pass."""

    ended: bool
    stalled: int
    said: list[str]


def last_words_are_told(life: Life, seen: Seen) -> None:
    told = json.dumps(life.world.status)
    for words in [] if seen.ended else seen.said:
        assert words in told, f"the driver said {words!r}; the status does not"


def charges_have_causes(life: Life, seen: Seen) -> None:
    """Once, and to a cause near in time."""
    charged = life.world.status["restarts"]
    for name in CLASSES:
        if name != "stalled":
            assert charged.get(name, 0) <= life.may[name], (
                f"{charged} has more of {name} than happened: {dict(life.may)}"
            )
    others = charged.get("total", 0) - charged.get("stalled", 0)
    assert others <= life.incidents, f"{charged} is more than the {life.incidents} incidents that there were"


def stalled_only_when_idle(life: Life, seen: Seen) -> None:
    if life.world.status["restarts"].get("stalled", 0) > seen.stalled:
        idle = life.now - life.active
        assert idle >= timedelta(seconds=STALL_SECONDS), (
            f"called stalled though it got further {idle.total_seconds():g} s ago"
        )


def deadlines_are_waited_for(life: Life, seen: Seen) -> None:
    if "rovisioningDeadline" in (life.world.record.get("resultReason") or "") and not seen.ended:
        limit = REPROVISION_SECONDS if life.was_ready else PROVISION_SECONDS
        waited = life.now - life.awaited
        assert waited >= timedelta(seconds=limit), (
            f"failed after {waited.total_seconds():g} s without pods, {limit} were allowed"
        )


def saved_can_be_read_again(life: Life, seen: Seen) -> None:
    if not life.lasting and life.world.condition("CheckpointAvailable")[0] == "True":
        uids = [p["metadata"]["uid"] for p in life.world.pods()]
        assert life.step_made_in in uids, "the checkpoint went with its pod"


def every_wait_has_an_end(life: Life) -> None:
    told = life.world.status
    assert told["phase"] in ("Succeeded", "Failed", "Suspended"), (
        f"waits for ever as {told['phase']}/{told['reason']}: {told['message']}"
    )


def nothing_is_held_after_the_end(life: Life) -> None:
    keep = (
        life.world.job_raw["spec"]["runPolicy"]["cleanup"]["onFailure"] == "Keep"
        and life.world.record.get("result") == "Failed"
    )
    held = [p["metadata"]["name"] for p in life.pods(going=False)]
    assert keep or not held, f"{held} are held after the end"


CHECKS: list[Callable[[Life, Seen], None]] = [
    last_words_are_told,
    charges_have_causes,
    stalled_only_when_idle,
    deadlines_are_waited_for,
    saved_can_be_read_again,
]
LAST_CHECKS: list[Callable[[Life], None]] = [every_wait_has_an_end, nothing_is_held_after_the_end]


def test_any_life_keeps_the_promises() -> None:
    how = settings(
        max_examples=LIVES, stateful_step_count=40, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(seed(SEED)(Life), settings=how)


class Wakings(RuleBasedStateMachine):
    """The operator's queue in any order: whatever happens to a key, a pass begins after it."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.now = Schedule(), 0.0
        self.running: set[Key] = set()
        self.unseen: set[Key] = set()  # keys with an event that no pass has begun after

    @rule(key=KEYS)
    def something_happens(self, key: Key) -> None:
        self.schedule.add(key, self.now)
        self.unseen.add(key)

    @rule()
    def a_worker_takes_a_key(self) -> None:
        if key := self.schedule.take(self.now):
            assert key not in self.running, "two workers have one key"
            self.running.add(key)
            self.unseen.discard(key)

    @precondition(lambda self: self.running)
    @rule(works=st.booleans())
    def a_pass_ends(self, works: bool) -> None:
        key = min(self.running)
        self.running.discard(key)
        if works:
            self.schedule.done(key, None)
        else:
            self.schedule.failed(key, self.now)

    @rule(seconds=st.sampled_from((0.2, 1.0, 70.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def nothing_is_forgotten(self) -> None:
        for key in self.unseen:
            assert key in self.schedule.due, f"{key} changed, and no pass will see it"


def test_no_event_is_lost() -> None:
    how = settings(max_examples=LIVES, stateful_step_count=20, deadline=None, database=None)
    run_state_machine_as_test(seed(SEED)(Wakings), settings=how)
