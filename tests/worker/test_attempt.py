"""The handshake with the operator: no number, no start; and no endless wait for one."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rlhf_api.run import JobRef
from rlhf_worker.errors import NotNumbered
from rlhf_worker.pod import attempt
from rlhf_worker.pod.job import OwnJob
from rlhf_worker.stop import Ended, Stop, Terminated

REF = JobRef(name="tiny", namespace="default", uid="u-1")


def numbered(pod: str, number: int) -> dict[str, Any]:
    return {"metadata": {"uid": "u-1"}, "status": {"record": {"attempt": {"podUid": pod, "number": number}}}}


class Own(OwnJob):
    """Answers with the next of these, the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self.job, self.answers, self.reads = REF, list(answers), 0

    def read(self) -> Any:
        self.reads += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(attempt, "ANSWER_SECONDS", 0.05)


def test_the_number_is_that_of_this_pod_and_is_waited_for() -> None:
    """Also through an API server that is away, and while the record still names the head before."""
    own = Own({"metadata": {"uid": "u-1"}}, httpx.ConnectError("refused"), numbered("pod-1", 4), numbered("pod-2", 5))
    assert attempt.number(own, Stop(), "pod-2") == 5


def test_without_a_pod_there_is_nothing_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    own = Own(AssertionError("asked"))
    assert (attempt.number(own, Stop(), ""), own.reads) == (0, 0)
    assert "RLHF_POD_UID is not set" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "words"), [
    (numbered("pod-1", 4), r"no answer in 0\.05 s while waiting for the operator to give pod pod-2 its number"),
    (httpx.ConnectError("refused"), "waiting for the operator.*: refused"),
])  # fmt: skip
def test_an_operator_that_does_not_answer_is_an_error_that_says_so(answer: Any, words: str) -> None:
    with pytest.raises(NotNumbered, match=words):
        attempt.number(Own(answer), Stop(), "pod-2")


FAILED = {
    "metadata": {"uid": "u-1"},
    "status": {"conditions": [{"type": "Failed", "status": "True", "reason": "Stalled"}]},
}


@pytest.mark.parametrize("answer", [None, {"metadata": {"uid": "u-2"}}, FAILED])
@pytest.mark.parametrize("look", [attempt.first_look, lambda own, stop: attempt.number(own, stop, "pod-1")])
def test_a_driver_of_a_job_that_has_ended_starts_nothing(answer: Any, look: Callable[[OwnJob, Stop], object]) -> None:
    with pytest.raises(Ended):
        look(Own(answer), Stop())


def test_sigterm_ends_the_wait() -> None:
    stop = Stop()
    stop.ask("asked to end")
    with pytest.raises(Terminated):
        attempt.first_look(Own({}), stop)
