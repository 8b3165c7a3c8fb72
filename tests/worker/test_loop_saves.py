"""What the loop makes of saves that end well or badly, with a stand-in for the ranks."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_api.job import BestSpec
from rlhf_worker import loop as module
from rlhf_worker.best import Best
from rlhf_worker.errors import (
    ActorLost,
    BadData,
    BadSpec,
    DeadlineExceeded,
    Diverged,
    EngineFailed,
    EnginesLost,
    EnvironmentFailed,
    Fenced,
    LinkBroken,
    RewardFailed,
    SaveFailed,
    SyncMismatch,
)
from rlhf_worker.loop import Loop
from rlhf_worker.stop import Ended, Stop, Terminated
from rlhf_worker.trainer.checkpoint import Outcome
from tests.worker.configs import run_config


class Ranks:
    """Saves end when they are asked for, those of `full` for want of room."""

    def __init__(self, full: set[int]) -> None:
        self.full = full
        self.tries: list[int] = []
        self.ended: list[Outcome] = []
        self.gone: Exception | None = None  # of a rank that died, or is at something for ever

    def all(self, actors: Any, method: str, step: int = 0, *rest: Any, **more: Any) -> list[Any]:
        if method == "seat":
            if self.gone is not None:
                raise self.gone
            return []
        if method == "saved":
            told, self.ended = self.ended, []
            return [told]
        self.tries.append(step)
        error = "OSError: [Errno 28] No space left on device" if step in self.full else None
        self.ended.append(Outcome(step=step, path=f"/c/step-{step}", error=error))
        return [None]


class Told:
    drain = False

    def __init__(self) -> None:
        self.good: list[int] = []
        self.errors: list[str] = []
        self.words: list[dict[str, str]] = []

    def saved(self, step: int, path: str) -> None:
        self.good.append(step)

    def update(self, save_error: str = "", **fields: str) -> None:
        self.errors += [save_error] if save_error else []
        self.words.append(fields)

    def bounded(self) -> AbstractContextManager[None]:
        return nullcontext()


def looping(monkeypatch: pytest.MonkeyPatch, full: set[int], stop: Stop | None = None) -> tuple[Loop, Ranks, Told]:
    ranks, told = Ranks(full), Told()
    monkeypatch.setattr(module, "call_all", ranks.all)
    config = run_config(steps=6, checkpoint={"everySteps": 2})
    made = Loop(config, SimpleNamespace(savers=[], policy=[None]), told, stop or Stop())  # type: ignore[arg-type]
    made.sampler, made.memory = {}, {}

    def step() -> None:
        made.step += 1

    monkeypatch.setattr(made, "_step", step)
    return made, ranks, told


def test_training_goes_on_when_a_save_fails_and_the_next_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ranks, told = looping(monkeypatch, full={2, 4})
    made.run()
    assert (ranks.tries, told.good) == ([2, 4, 6], [6])
    assert told.errors == [f"no checkpoint of step {n}: OSError: [Errno 28] No space left on device" for n in (2, 4)]


def test_an_evaluation_that_improves_makes_a_checkpoint_that_remembers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ranks, _ = looping(monkeypatch, full=set())
    made.best, scores, told = Best(BestSpec(metric="eval/a/mean_reward")), iter([0.1, 0.3, 0.3, 0.2, 0.4, 0.1]), []
    monkeypatch.setattr(module, "evaluate", lambda *args: {"eval/a/mean_reward": next(scores)})
    made.rollouts = SimpleNamespace(evaluate=None)  # type: ignore[assignment]
    monkeypatch.setattr(made, "_told", lambda *args: None)
    step, save = made._step, ranks.all

    def evaluated() -> None:
        step()
        made.best.finished()
        made._evaluate()

    def noted(actors: Any, method: str, step: int, *rest: Any, **more: Any) -> list[Any]:
        told.extend([rest[-1]["score"]["eval/a/mean_reward"]] if method == "save" else [])
        return save(actors, method, step, *rest, **more)

    monkeypatch.setattr(made, "_step", evaluated)
    monkeypatch.setattr(module, "call_all", noted)
    made.run()
    assert (ranks.tries, told) == ([1, 2, 4, 5, 6], [0.1, 0.3, 0.2, 0.4, 0.1])


def test_the_run_fails_when_its_last_save_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, told = looping(monkeypatch, full={6})
    with pytest.raises(SaveFailed, match=r"no checkpoint of step 6: OSError: .Errno 28. No space left on device"):
        made.run()
    assert told.good == [2, 4]


def test_a_run_that_is_asked_to_end_tries_again_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    made, ranks, told = looping(monkeypatch, full={2}, stop=stop)
    step = made._step

    def until_the_third() -> None:
        step()
        if made.step == 3:
            stop._asked.set()

    monkeypatch.setattr(made, "_step", until_the_third)
    with pytest.raises(Terminated):
        made.run()
    assert (ranks.tries, told.good) == ([2, 3], [3])


def test_pods_that_are_to_go_are_given_up_once_saved_and_used_when_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspension that is refused, since it would lose the checkpoint, is taken back for the driver."""
    made, ranks, told = looping(monkeypatch, full=set())
    step = made._step

    def until_the_third() -> None:
        step()
        told.drain = made.step == 3

    def waited(seconds: float) -> None:
        assert told.words[-1] == {"state": "Drained", "detail": "saved; waiting for the pods to go"}
        told.drain = False

    monkeypatch.setattr(made, "_step", until_the_third)
    monkeypatch.setattr(made.stop, "wait", waited)
    made.run()
    assert (ranks.tries, told.good) == ([2, 3, 4, 6], [2, 3, 4, 6])
    assert [words["state"] for words in told.words if "state" in words] == ["Draining", "Drained", "Training"]


ENDS = [
    RewardFailed("r"), EnvironmentFailed("e"), EnginesLost("two"), DeadlineExceeded("generation"), BadData("line 7"),
    BadSpec("late"), EngineFailed("core"), LinkBroken("cable"), SyncMismatch("sum"), ActorLost("feed died"),
    RuntimeError("what no one foresaw"),
]  # fmt: skip


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_whatever_ends_a_run_what_it_finished_is_saved(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Also when that error is an actor's, which every wait is told of until it ends the run."""
    made, ranks, told = looping(monkeypatch, full=set())
    step = made._step

    def until_the_fourth() -> None:
        if made.step == 3:
            made.stop.lose(error)
            raise error
        step()

    monkeypatch.setattr(made, "_step", until_the_fourth)
    with pytest.raises(type(error), match=str(error)):
        made.run()
    made.stop.interrupt()
    assert (ranks.tries, told.good, getattr(error, "__notes__", [])) == ([2, 3], [2, 3], [])


@pytest.mark.parametrize(("error", "half", "gone", "tries", "lost"), [
    (Diverged("nan"), True, None, [2], "step 3 is not saved: the next had begun to train"),
    (DeadlineExceeded("training"), True, None, [2], "step 3 is not saved: the next had begun to train"),
    (ActorLost("rank 1"), False, ActorLost("rank 1"), [2], "step 3 is not saved: ActorLost: rank 1"),
    (DeadlineExceeded("f"), False, DeadlineExceeded("a"), [2], "step 3 is not saved: DeadlineExceeded: a"),
    (Fenced("a later one"), False, None, [2], None),
    (Ended("the job is gone"), False, None, [2], None),
])  # fmt: skip
def test_what_cannot_or_must_not_be_saved_is_told_and_the_save_under_way_ends(
    monkeypatch: pytest.MonkeyPatch, error: Exception, half: bool, gone: Exception | None, tries: list[int],
    lost: str | None,
) -> None:
    made, ranks, told = looping(monkeypatch, full=set())
    step = made._step

    def until_the_fourth() -> None:
        if made.step == 3:
            made._trained_in_part, ranks.gone = half, gone
            raise error
        step()

    monkeypatch.setattr(made, "_step", until_the_fourth)
    with pytest.raises(type(error), match=str(error)):
        made.run()
    assert (ranks.tries, told.good) == (tries, [2])
    assert getattr(error, "__notes__", []) == ([lost] if lost else [])


def test_a_save_under_way_is_waited_for_when_the_next_step_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ranks, told = looping(monkeypatch, full=set())
    step, tell = made._step, ranks.all

    def slow(actors: Any, method: str, *args: Any, **more: Any) -> list[Any]:
        return [[]] if (method, args) == ("saved", (False,)) else tell(actors, method, *args, **more)

    def until_the_third() -> None:
        if made.step == 2:
            made._trained_in_part = True
            raise Diverged("nan")
        step()

    monkeypatch.setattr(module, "call_all", slow)
    monkeypatch.setattr(made, "_step", until_the_third)
    with pytest.raises(Diverged):
        made.run()
    assert told.good == [2] and made.saved_step == 2
