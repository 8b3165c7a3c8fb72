"""What ended a driver: causes near in time, words that are never lost, costs that are counted once. Each is driven by
a world."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_operator.kinds import PODS
from tests.control.world import World, running

Change = Callable[[World], Any]


def charged(w: World) -> dict[str, int]:
    return {name: n for name, n in w.status["restarts"].items() if n and name != "total"}


def words(w: World) -> list[str]:
    return [failure.get("words", "") for failure in w.status["failures"]]


def trainer(w: World) -> dict[str, Any]:
    return w.pods("trainer")[0]


def an_old_incident(w: World) -> None:
    """Ray in a worker pod ends and recovers; hours of steps later the driver errs."""
    w.ends(trainer(w), "ray", 1)
    w.restarts(trainer(w), "ray")
    w.settle()
    w.later(60)
    w.report(step=5)
    w.settle()
    w.later(4 * 3600)
    w.report(step=99)
    w.driver_ends(1, "ValueError: x")


def a_survived_incident(w: World) -> None:
    """A minute ago, but a step was finished since."""
    w.ends(trainer(w), "ray", 1)
    w.restarts(trainer(w), "ray")
    w.later(40)
    w.report(step=5)
    w.later(20)
    w.driver_ends(1, "ValueError: x")


def a_preempted_worker_that_is_gone(w: World) -> None:
    """Its pod lives for its whole grace period; the driver ends when it is gone."""
    w.disrupt(trainer(w), "PreemptionByScheduler", "x")
    w.settle()
    w.later(120)
    w.reap()
    w.settle()
    w.later(5)
    w.driver_ends(1, "ActorDiedError: x")


def a_worker_told_the_driver(w: World) -> None:
    w.disrupt(trainer(w), "EvictionByEvictionAPI", "x")
    w.settle()
    w.later(3)
    w.driver_ends(143, "Terminated: x")


def a_worker_that_nobody_saw_go(w: World) -> None:
    w.later(10)
    w.api.remove(PODS, trainer(w)["metadata"]["name"])
    w.later(5)
    w.driver_ends(1, "ActorDiedError: x")
    w.later(5)
    w.kuberay()


def a_node_under_pressure(w: World) -> None:
    w.evict(trainer(w))
    w.later(5)
    w.driver_ends(1, "ActorDiedError: x")


def an_end_seen_long_after(w: World) -> None:
    w.disrupt(trainer(w), "PreemptionByScheduler", "x")
    w.later(3)
    w.driver_ends(143, "Terminated: x")
    w.later(1000)


def the_first_domino(w: World) -> None:
    w.ends(w.head(), "ray", 137)
    w.later(51)
    w.ends(trainer(w), "ray", 1)
    w.driver_ends(1, "RaySystemError: x")


def an_error_before_the_loss(w: World) -> None:
    w.driver_ends(1, "ValueError: x")
    w.settle()
    w.driver_restarts()
    w.later(60)
    w.disrupt(trainer(w), "PreemptionByScheduler", "x")


def placement_in_vain(w: World) -> None:
    """Of a driver that has a deadline of its own for what Kubernetes is to give."""
    a_worker_told_the_driver(w)
    w.reap()
    w.kuberay()
    w.settle()
    for _ in range(8):
        w.driver_restarts()
        w.later(600)
        w.driver_ends(1, "PlacementFailed: no placement for 1 GPUs after 600 s")
        w.settle()


def head_and_words(w: World) -> None:
    """The pod is charged while the driver still saves; what it says comes later."""
    w.disrupt(w.head(), "PreemptionByScheduler", "x")
    w.settle()
    w.later(30)
    w.driver_ends(1, "OSError: disk full: x")


INCIDENTS: list[tuple[Change, dict[str, int]]] = [
    (an_old_incident, {"app": 1}), (a_survived_incident, {"app": 1}),
    (a_preempted_worker_that_is_gone, {"preempted": 1}),
    (a_worker_told_the_driver, {"preempted": 1}), (a_worker_that_nobody_saw_go, {"nodeLost": 1}),
    (a_node_under_pressure, {"nodeLost": 1}),
    (an_end_seen_long_after, {"preempted": 1}),
    (the_first_domino, {"headLost": 1}), (an_error_before_the_loss, {"app": 1}), (placement_in_vain, {"preempted": 1}),
    (head_and_words, {"preempted": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("incident", "counted"), INCIDENTS, ids=[i[0].__name__ for i in INCIDENTS])
def test_the_cause_is_near_and_the_words_are_kept(incident: Change, counted: dict[str, int]) -> None:
    w = running()
    w.later(5)
    incident(w)
    w.settle()
    assert charged(w) == counted
    said = [
        c["state"]["terminated"]["message"]
        for p in w.pods("head")
        for c in p["status"]["containerStatuses"]
        if "terminated" in c["state"]
    ]
    assert all(one in words(w) for one in said if one)


@pytest.mark.parametrize("gone", [True, False])
def test_a_head_pod_that_was_replaced_is_no_cause_of_its_successors_errors(gone: bool) -> None:
    """Whether it is still there, on a dead node, or has gone."""
    w = running(runPolicy={"stallTimeoutSeconds": 300})
    w.later(1000)
    w.settle()
    assert w.status["restarts"]["stalled"] == 1
    former = w.head()
    assert "deletionTimestamp" in former["metadata"]
    w.kuberay()
    w.later(5)
    if gone:
        w.api.remove(PODS, former["metadata"]["name"])
    w.start_pods()
    w.settle()
    w.later(20)
    w.driver_ends(1, "ValueError: advantages are not finite")
    w.settle()
    assert w.status["restarts"] | {"total": 0, "stalled": 0} == {**dict.fromkeys(w.status["restarts"], 0), "app": 1}


def test_evictions_for_memory_use_up_the_backoff_limit() -> None:
    w = running(runPolicy={"backoffLimit": 1})
    for _ in range(2):
        w.later(5)
        w.evict(w.head())
        w.settle()
        w.api.remove(PODS, w.head()["metadata"]["name"])
        w.up()
        w.settle()
    assert w.condition("Failed") == ("True", "BackoffLimitExceeded")


def test_a_driver_that_waits_in_vain_at_the_first_start_costs_nothing() -> None:
    w = World(runPolicy={"backoffLimit": 0, "provisioningDeadlineSeconds": 86400})
    w.settle()
    w.kuberay()
    w.start(w.head())
    w.settle()
    for _ in range(3):
        w.later(600)
        w.driver_ends(1, "PlacementFailed: no placement for 1 GPUs after 600 s")
        w.settle()
        w.driver_restarts()
        w.settle()
    assert (w.status["phase"], charged(w)) == ("Provisioning", {})
    assert words(w)[0].startswith("PlacementFailed")


def test_a_placement_that_fails_though_all_pods_are_there_is_the_drivers_own() -> None:
    w = running()
    w.later(5)
    w.driver_ends(1, "PlacementFailed: trainer and engines are Separated but share 1 GPU")
    w.settle()
    assert charged(w) == {"app": 1}


def test_five_failures_are_kept_newest_first_with_step_attempt_and_signal() -> None:
    w = running(runPolicy={"backoffLimit": 20})
    for n in range(7):
        w.later(5)
        w.driver_ends(137 if n == 6 else 1, f"line {n}")
        w.settle()
        w.driver_restarts()
    newest = w.status["failures"][0]
    assert [one["words"] for one in w.status["failures"]] == ["line 6", "line 5", "line 4", "line 3", "line 2"]
    assert (newest["signal"], newest["exitCode"], newest["step"], newest["attempt"]) == (9, 137, 3, 1)
    assert newest["message"] == "the driver was killed by SIGKILL (signal 9)"


def test_a_long_text_stands_in_the_status_once() -> None:
    w = running(runPolicy={"backoffLimit": 0})
    w.later(5)
    text = "\n".join(
        [
            "Traceback (most recent call last):",
            *(f'  File "loop.py", line {n}, in step' for n in range(100)),
            "ValueError: no",
        ]
    )
    w.driver_ends(1, text)
    w.settle()
    assert w.condition("Failed") == ("True", "BackoffLimitExceeded")
    assert json.dumps(w.status).count("line 50, in step") == 1
    assert w.status["message"].endswith("ValueError: no")
    assert all(len(c["message"]) <= 1024 for c in w.status["conditions"])


def test_last_words_begin_at_the_border_of_a_line() -> None:
    """Of a log the kubelet keeps the last 2048 bytes."""
    w = running()
    log = "\n".join(f"step {n}/100 reward 0.5" for n in range(300))
    w.later(5)
    w.driver_ends(137, log[-2048:])
    w.settle()
    (said,) = words(w)
    assert said.startswith("step ")
    assert said.endswith("step 299/100 reward 0.5")


def test_a_report_of_another_head_pods_driver_counts_for_nothing() -> None:
    w = running()
    old = w.head()["metadata"]["uid"]
    w.later(5)
    w.api.remove(PODS, w.head()["metadata"]["name"])
    w.settle()
    w.up()
    w.later(5)
    w.report(step=4, podUid=old)
    w.settle()
    assert (w.status["phase"], w.status["reason"]) == ("Restarting", "HeadLost")
    w.report(step=4)
    w.settle()
    assert w.status["phase"] == "Running"
    assert [e for e in w.events() if "Running" in e][1:] == ["Normal StepAdvancing: Running: steps are finishing"]


def test_each_head_pod_has_the_next_number() -> None:
    w = running()
    first = w.record["attempt"]
    assert first == {"number": 1, "podUid": w.head()["metadata"]["uid"]}
    w.later(5)
    w.driver_ends(1, "ValueError")
    w.driver_restarts()
    w.settle()
    assert w.record["attempt"] == first, "the same pod, the same number: its driver is the one writer"
    w.delete_cluster()
    w.settle()
    w.reap()
    w.settle()
    w.up()
    w.settle()
    assert w.record["attempt"] == {"number": 2, "podUid": w.head()["metadata"]["uid"]}


def test_a_pod_that_is_going_is_told_while_training_goes_on() -> None:
    w = running()
    w.disrupt(trainer(w), "EvictionByEvictionAPI", "drained")
    w.settle()
    assert w.status["phase"] == "Running"
    assert w.condition("Degraded") == ("True", "PodEnding")


def test_a_crash_while_the_driver_drains_is_told_and_costs_nothing() -> None:
    w = running()
    w.edit(suspend=True)
    w.settle()
    w.later(5)
    w.driver_ends(1, "OSError: no space left on device")
    w.settle()
    assert (charged(w), words(w)) == ({}, ["OSError: no space left on device"])


RAISED = """RewardFailed: rewards[judge] failed 2 times on prompt 0:0, completion '1 + 1 =': \
Traceback (most recent call last):
  File "<rewards[judge].code>", line 2, in reward
    raise ValueError('the judge is asleep')
ValueError: the judge is asleep
ray::Feed.score() (pid=12, ip=10.0.0.1)"""


@pytest.mark.parametrize(
    "words", [RAISED, RAISED.replace("1 + 1 =", "1 + 1 = " * 99), f"lower rollout.maxTokens\n{RAISED}"]
)
def test_the_error_itself_stands_in_the_message_and_not_what_leads_to_its_traceback(words: str) -> None:
    world = running(runPolicy={"backoffLimit": 0})
    world.driver_ends(1, words)
    world.settle()
    message = next(c["message"] for c in world.status["conditions"] if c["type"] == "Failed")
    assert "RewardFailed: rewards[judge]" in message
    assert "ValueError: the judge is asleep" in message
    assert "Traceback" not in message


SEVERAL = """{kind}: 2 things are wrong:
1. BadData: /data/broken.jsonl: line 3: it is no JSON
  {{"prompt":
2. PreflightFailed: the node has 1.0 GiB of memory left"""


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("BadData", 65, "InvalidData"), ("BadSpec", 64, "InvalidSpec"), ("PreflightFailed", 1, "BackoffLimitExceeded"),
    ],
)
def test_each_of_several_errors_stands_in_the_message(kind: str, code: int, reason: str) -> None:
    world = running(runPolicy={"backoffLimit": 0})
    world.driver_ends(code, SEVERAL.format(kind=kind))
    world.settle()
    failed = next(c for c in world.status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == reason
    assert failed["message"].endswith(
        f"{kind}: 2 things are wrong: 1. BadData: /data/broken.jsonl: line 3: it is no JSON "
        "2. PreflightFailed: the node has 1.0 GiB of memory left"
    )


def test_many_errors_share_the_room_of_a_message() -> None:
    world = running()
    errors = [f"{n}. BadSpec: {'v' * 700}" for n in range(1, 10)]
    world.driver_ends(64, "\n".join(["BadSpec: 9 things are wrong:", *errors]))
    world.settle()
    message = next(c["message"] for c in world.status["conditions"] if c["type"] == "Failed")
    assert len(message) <= 1024
    assert all(f" {n}. BadSpec: vvv" in message for n in range(1, 10))


@pytest.mark.parametrize("runs_again", [True, False])
def test_an_end_that_was_charged_is_not_the_one_of_a_pod_that_goes_right_after_it(runs_again: bool) -> None:
    w = running()
    w.driver_ends(1, "ValueError: first")
    w.settle()
    if runs_again:
        w.driver_restarts()
    w.later(1)
    w.disrupt(w.head(), "PreemptionByScheduler", "it has to go")
    w.settle()
    assert charged(w) == {"app": 1, "preempted": 1}
    assert words(w) == ["", "ValueError: first"]
    if runs_again:
        w.later(20)
        w.driver_ends(143, "ValueError: second")
        w.settle()
        assert words(w) == ["ValueError: second", "ValueError: first"]


def test_a_cluster_that_is_gone_is_charged_once_whoever_is_heard_first() -> None:
    w = running()
    w.api.live = False
    w.delete_cluster()
    w.api.commit()
    for event in [e for e in w.api.pending if e.kind is PODS]:
        w.api.tell(event)
    w.settle()
    assert charged(w) == {"headLost": 1}
    w.api.live = True
    w.api.relist()
    w.settle()
    assert (charged(w), w.clusters()) == ({"headLost": 1}, [])
    w.reap()
    w.settle()
    assert (w.clusters(), w.status["phase"]) == (["sample-2"], "Restarting")


@pytest.mark.parametrize(("stepped", "class_"), [(True, "nodeLost"), (False, "app")])
def test_a_worker_that_came_and_went_unseen_is_known_by_the_step_that_it_trained(stepped: bool, class_: str) -> None:
    w = World()
    w.settle()
    w.up()
    w.later(60)
    if stepped:
        w.report(step=3)
    w.later(4000)
    w.reap_workers()
    w.driver_ends(1, "ActorDiedError")
    w.settle()
    assert charged(w) == {class_: 1}


def test_an_end_that_nobody_saw_before_a_restart_is_not_the_one_of_a_pod_that_goes_right_after_it() -> None:
    w = running()
    w.driver_ends(1, "ValueError: first")
    w.driver_restarts()
    w.disrupt(w.head(), "PreemptionByScheduler", "it has to go")
    w.settle()
    assert words(w) == ["", "ValueError: first"]
    w.later(7)
    w.driver_ends(143, "ValueError: second")
    w.settle()
    assert words(w) == ["ValueError: second", "ValueError: first"]
    assert w.status["restarts"]["total"] == 2


def test_an_end_that_is_heard_of_after_its_head_was_given_up_is_told_however_old() -> None:
    w = running(runPolicy={"stallTimeoutSeconds": 300})
    w.api.live = False
    w.driver_ends(1, "ValueError: x")
    w.later(1000)
    w.settle()
    assert charged(w) == {"stalled": 1}
    w.api.live = True
    w.api.relist()
    w.settle()
    assert (words(w), charged(w)) == (["ValueError: x"], {"stalled": 1})
