"""Raw objects -> facts: what the kubelet says of a container's end."""

from typing import Any

import pytest

from rlhf_operator.observed import owner_uid, read_job, read_pod
from tests.api.specs import a_job

Raw = dict[str, Any]
END = {
    "exitCode": 1, "reason": "Error", "message": "\x1b[36mray::f()\x1b[39m ValueError: no\n",
    "startedAt": "2026-01-01T12:00:00Z", "finishedAt": "2026-01-01T12:05:00Z",
}


def container(state: Raw, last: Raw | None = None, restarts: int = 0, name: str = "driver") -> Raw:
    return {
        "name": name, "state": state, "lastState": last or {}, "restartCount": restarts, "ready": "running" in state,
    }


def pod(*containers: Raw, **meta: Any) -> Raw:
    return {
        "metadata": {"name": "p", "uid": "u", **meta},
        "status": {"phase": "Running", "containerStatuses": list(containers)},
    }


RUNNING = {"running": {"startedAt": "2026-01-01T12:06:00Z"}}
WAITING = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
STATES: list[tuple[str, Raw, int]] = [
    ("not begun", container({"waiting": {"reason": "ContainerCreating"}}), 0),
    ("first run", container(RUNNING), 0),
    ("crashed, not restarted yet", container({"terminated": END}), 1),
    ("backs off after the first crash", container(WAITING, {"terminated": END}), 1),
    ("runs again", container(RUNNING, {"terminated": END}, 1), 1),
    ("crashed again", container({"terminated": END}, {"terminated": END}, 1), 2),
    ("backs off after the second crash", container(WAITING, {"terminated": END}, 1), 2),
    ("ended well", container({"terminated": {**END, "exitCode": 0}}), 0),
    ("ended well after a crash", container({"terminated": {**END, "exitCode": 0}}, {"terminated": END}, 1), 1),
]


@pytest.mark.parametrize(("state", "raw", "failures"), STATES, ids=[s[0] for s in STATES])
def test_failed_runs_of_a_container(state: str, raw: Raw, failures: int) -> None:
    driver = read_pod(pod(raw)).driver
    assert driver is not None
    assert driver.failures == failures


def test_the_last_words_come_without_terminal_colours() -> None:
    driver = read_pod(pod(container(WAITING, {"terminated": END}))).driver
    assert driver is not None and driver.last is not None
    assert driver.last.message == "ray::f() ValueError: no"


def test_rays_container_is_found_by_name_because_the_kubelet_sorts_statuses() -> None:
    seen = read_pod(pod(container(RUNNING, name="driver"), container(RUNNING, name="ray")))
    assert seen.driver is not None and seen.driver.name == "driver"
    assert seen.ray is not None and seen.ray.name == "ray"


def test_a_pod_with_a_resting_driver_is_ready_for_ray() -> None:
    assert read_pod(pod(container(RUNNING, name="ray"), container(WAITING, {"terminated": END}))).ray_ready


def test_deletion_began_before_its_grace_period() -> None:
    seen = read_pod(pod(deletionTimestamp="2026-01-01T12:02:00Z", deletionGracePeriodSeconds=120))
    assert seen.deleting_since is not None
    assert seen.deleting_since.minute == 0


def test_only_the_controlling_owner_counts() -> None:
    owners = [{"uid": "a"}, {"uid": "b", "controller": True}]
    assert owner_uid(pod(ownerReferences=owners)) == "b"
    assert owner_uid(pod()) == ""


def test_a_status_that_does_not_parse_keeps_its_record() -> None:
    raw = {**a_job(), "status": {"phase": "NoSuchPhase", "record": {"clusters": 3}}}
    assert read_job(raw).status.record.clusters == 3


def test_a_bad_spec_is_a_fact() -> None:
    job = read_job(a_job(trainer__steps="many"))
    assert job.parsed is None
    assert "spec.trainer.steps" in job.problems[0]
