"""Who has the GPUs that trainer and engines share, and when: the order of the loop's calls in one step, with stand-ins
for all actors.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError

from rlhf_api.progress import Speed
from rlhf_api.run import RunConfig
from rlhf_worker import loop as module
from rlhf_worker.errors import DeadlineExceeded, EnginesLost, LinkBroken, SyncMismatch
from rlhf_worker.experience import ScoredSample, TrainSequence
from rlhf_worker.loop import Loop
from rlhf_worker.stop import Stop, Terminated
from rlhf_worker.weights.sync import Synced
from tests.worker.configs import resolved, run_config
from tests.worker.samples import a_prompt, a_sample, scored


class Stand:
    """In for every actor: notes what it is asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.metrics: dict[str, float] = {}  # of the samples taken last
        self.updates: list[list[list[list[int]]]] = []  # of each call to train: samples of micro-batches of updates
        self.most = 0  # tokens of the largest micro-batch of the last call

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.answer(method, *args))

    def answer(self, method: str, *args: Any) -> Any:
        self.asked.append(" ".join([method, *(arg for arg in args if isinstance(arg, str))]))
        if method == "train":
            pairs = zip(*args[-2:], strict=True)
            taken = [[[items[i] for i in batch] for batch in own] for items, own in pairs]
            self.updates.append([[[one.index for one in batch] for batch in own] for own in taken])
            self.most = max(sum(one.length for one in batch) for own in taken for batch in own)
        return zeros(*args[-2:]) if method in ("logprobs", "values") else {}

    # The fleet, and where samples come from.

    def sleep(self) -> None:
        self.asked.append("sleep")

    def loads(self) -> list[dict[int, float]]:
        return []

    def sync(self, *, prove: bool) -> Synced:
        self.asked.append("sync")
        return Synced(1, 0.0, "none", None)

    def take(self) -> list[Any]:
        self.asked.append("take")
        return [
            SimpleNamespace(samples=[scored(a_sample(row), float(index)) for index in range(8)]) for row in range(16)
        ]

    def finish(self, step: int) -> tuple[dict[str, Any], list[str]]:
        return {}, []

    def pump(self) -> None: ...


def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls end at once, with their results, and objects stay where they are."""
    monkeypatch.setattr(module, "gather", lambda calls, *rest: calls)
    monkeypatch.setattr(module, "call", lambda *args, **more: None)
    monkeypatch.setattr(module, "ray", SimpleNamespace(put=lambda value: value))


class Told:
    """A reporter that counts how often the run got further, and what was told of its steps."""

    drain = False

    def __init__(self) -> None:
        self.further = 0
        self.fields: dict[str, Any] = {}
        self.steps: list[tuple[int, Synced | None]] = []
        self.bounded = nullcontext

    def update(self, **fields: Any) -> None:
        self.fields |= fields

    def active(self) -> None:
        self.further += 1

    def stepped(
        self, step: int, values: dict[str, float], speed: Speed, *, eta_seconds: int, synced: Synced | None,
    ) -> None:
        self.steps.append((step, synced))


def zeros(sequences: list[TrainSequence], batches: list[list[int]]) -> dict[int, NDArray[np.float32]]:
    return {
        sequences[i].index: np.zeros(len(sequences[i].mask), np.float32) for batch in batches for i in batch
    }


def looping(config: RunConfig, stand: Stand, stop: Stop, *, padded: bool = False) -> tuple[Loop, Told]:
    told, ranks = Told(), {role: [stand] for role in ("policy", "reference", "critic")}
    crew = SimpleNamespace(fleet=stand, ranks=ranks, feed=stand, policy=[stand], savers=[stand], padded=padded)
    loop = Loop(config, crew, told, stop)  # type: ignore[arg-type]
    loop.rollouts = stand  # type: ignore[assignment]
    return loop, told


@pytest.mark.parametrize("sleep", [False, True])
def test_engines_that_share_gpus_sleep_from_the_last_completion_to_the_sync(
    monkeypatch: pytest.MonkeyPatch, sleep: bool
) -> None:
    stand = Stand()
    direct(monkeypatch)
    config = run_config(
        algorithm={"name": "ppo", "kl": {"coefficient": 0.1}}, rollout={"maxTokens": 16, "sleep": sleep},
    )
    loop, told = looping(config, stand, Stop())
    loop._step()
    forward, train = ["logprobs policy", "logprobs reference", "values"], ["train critic", "train policy"]
    assert stand.asked == ["take", *(["sleep"] if sleep else []), *forward, *train, "sync", "log"]
    assert told.further == 5  # a phase each


@pytest.mark.parametrize(("padded", "budgets"), [(False, [20, 40]), (True, [])])
def test_an_open_budget_is_asked_of_every_rank_while_the_engines_sleep(
    monkeypatch: pytest.MonkeyPatch, padded: bool, budgets: list[int]
) -> None:
    """Every step anew: a rank that ran out of memory has another one then. The tightest decides."""
    answers = iter(budgets)

    class Asked(Stand):
        def answer(self, method: str, *args: Any) -> Any:
            if method != "token_budget":
                return super().answer(method, *args)
            self.asked.append(method)
            return next(answers)

    def call_all(actors: list[Any], method: str, **more: Any) -> list[int]:
        return [getattr(actor, method).remote() for actor in actors]

    stand, other = Asked(), Asked()
    direct(monkeypatch)
    monkeypatch.setattr(module, "call_all", call_all)
    config = resolved(rollout={"maxTokens": 16}).on("cuda")
    loop, _ = looping(config, stand, Stop(), padded=padded)
    loop.crew.ranks["reward:x"] = [other]
    loop._step()
    assert stand.asked[:3] == ["take", "sleep", "train policy" if padded else "token_budget"]
    assert stand.most > 100 if padded else stand.most <= 20


def test_a_step_has_epochs_of_mini_batches_after_one_pass_for_the_old_log_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also a resumed run's, which begins with the same step; and another step has another order."""
    direct(monkeypatch)
    config = run_config(trainer={"steps": 9, "epochs": 3, "updatesPerStep": 4}, rollout={"maxTokens": 16})

    def steps(first: int, count: int) -> list[list[list[int]]]:
        stand = Stand()
        loop, _ = looping(config, stand, Stop())
        loop.step = first
        for _ in range(count):
            loop._step()
        assert [one for one in stand.asked if one.startswith("logprobs")] == ["logprobs policy"] * count
        return [[sorted(i for batch in one for i in batch) for one in updates] for updates in stand.updates]

    through = steps(0, 3)
    assert through[2:] == steps(2, 1) and len({str(step) for step in through}) == 3
    for step in through:
        assert [len(update) for update in step] == [32] * 12
        for epoch in range(0, 12, 4):
            assert sorted(i for update in step[epoch : epoch + 4] for i in update) == list(range(128))


@pytest.mark.parametrize(("during", "finished"), [
    ("take", 0), ("logprobs", 0),  # nothing of the policy has changed: the step may go
    ("train", 1),  # finished, and no engine is waited for, which may go with its pod
    ("sync", 1),
])  # fmt: skip
def test_asked_to_end_the_step_is_dropped_or_finished_without_its_sync(
    monkeypatch: pytest.MonkeyPatch, during: str, finished: int
) -> None:
    """Each wait of the loop looks between its slices, as `gather` does."""
    stop = Stop()

    def asked(method: str) -> None:
        if method.startswith(during):
            stop.ask("pod a is being deleted")
        stop.interrupt()

    class Asked(Stand):
        def answer(self, method: str, *args: Any) -> Any:
            found = super().answer(method, *args)
            asked(method)
            return found

        def take(self) -> list[Any]:
            found = super().take()
            asked("take")
            return found

        def sync(self, *, prove: bool) -> Synced:
            asked("sync")
            return super().sync(prove=prove)

    stand = Asked()
    direct(monkeypatch)
    loop, told = looping(run_config(algorithm={"name": "grpo", "kl": {"coefficient": 0.1}}), stand, stop)
    with pytest.raises(Terminated, match="pod a is being deleted"):
        loop._step()
    assert (loop.step, told.steps) == (finished, [(1, None)] * finished)
    assert "sync" not in stand.asked


def test_seconds_of_steps_are_those_of_the_lineage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done after the checkpoint that a run resumes from was lost, and does not count."""
    monkeypatch.setattr(module, "Rollouts", lambda *args: Stand())
    loop, _ = looping(run_config(), Stand(), Stop())
    loop.begin(5, {"kl": loop.kl.state(), "productive_seconds": 50.0})
    loop._finished(6, 10.0)
    memory = loop.memory
    loop._finished(7, 30.0)
    resumed, again = looping(run_config(), Stand(), Stop())
    resumed.begin(6, memory)
    resumed._finished(7, 12.0)
    assert (again.fields["productive_seconds"], resumed.memory["productive_seconds"]) == (60, 72.0)


@pytest.mark.parametrize(("padded", "micro_batches"), [(False, 1), (True, 2)])
def test_batches_that_a_model_pads_hold_the_budget_with_their_padding(padded: bool, micro_batches: int) -> None:
    loop, _ = looping(run_config(trainer={"steps": 1, "tokensPerMicroBatch": 64}), Stand(), Stop(), padded=padded)
    lengths = [32, *[4] * 8]
    ((batches,),) = loop._dealt(["policy"], [lengths])["policy"]
    assert len(batches) == micro_batches
    assert not padded or all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)


class Unreached(Stand):
    """Engines that no sync reaches any more."""

    error: Exception = EnginesLost("none came back")

    def sync(self, *, prove: bool) -> Synced:
        raise self.error


def stepping(monkeypatch: pytest.MonkeyPatch, error: Exception, step: int, **spec: Any) -> tuple[Loop, Told]:
    """One step of four, of which `step` are finished, to its sync."""
    stand = Unreached()
    stand.error = error
    direct(monkeypatch)
    loop, told = looping(run_config(**spec), stand, Stop())
    loop.step = step
    return loop, told


ENGINE_ENDS = [EnginesLost("x"), LinkBroken("x"), DeadlineExceeded("x"), ActorDiedError()]


@pytest.mark.parametrize("error", ENGINE_ENDS, ids=lambda error: type(error).__name__)
def test_a_run_whose_last_step_is_trained_needs_its_engines_no_more(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    loop, told = stepping(monkeypatch, error, 3)
    loop._step()
    assert (loop.step, told.steps) == (4, [(4, None)])


@pytest.mark.parametrize(("error", "step", "spec"), [
    (EnginesLost("x"), 2, {}), (SyncMismatch("x"), 3, {}), (RuntimeError("a bug"), 3, {}),
    (EnginesLost("x"), 3, {"evaluation": [{"name": "e", "data": {"jsonl": {"path": "/x"}}}]}),
])  # fmt: skip
def test_before_that_a_sync_that_fails_ends_the_run_after_the_step_that_it_was_of(
    monkeypatch: pytest.MonkeyPatch, error: Exception, step: int, spec: dict[str, Any]
) -> None:
    loop, _ = stepping(monkeypatch, error, step, **spec)
    with pytest.raises(type(error)):
        loop._step()
    assert (loop.step, loop._trained_in_part) == (step + 1, False)


def test_a_step_that_fails_in_training_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = stepping(monkeypatch, RuntimeError(), 2)
    monkeypatch.setattr(loop, "_train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop._step()
    assert (loop.step, loop._trained_in_part) == (2, True)


def test_an_advantage_of_ones_own_sees_nan_where_a_reward_does_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    shaped: dict[str, Any] = {}
    monkeypatch.setattr(module, "shape", lambda *args, **more: shaped.update(more))
    loop, _ = looping(run_config(rollout={"maxTokens": 16, "samplesPerPrompt": 1}), Stand(), Stop())
    samples = [replace(a_sample(row), prompt=replace(a_prompt(row), rewards=(name,))) for row, name in enumerate("ab")]
    parts = {"a": 0.5, "b": 0.0, "environment": 2.0}
    loop._shape([], [ScoredSample(sample=sample, reward=0.5, parts=parts) for sample in samples], [])
    found = {name: [str(value) for value in values] for name, values in shaped["parts"].items()}
    assert found == {"a": ["0.5", "nan"], "b": ["nan", "0.0"], "environment": ["2.0", "2.0"]}
