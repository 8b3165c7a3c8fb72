"""Rollouts with real Ray actors that only pretend to generate and to score: failures, deaths, refills, staleness, and a
resume.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from rlhf_api.job import EvaluationSpec
from rlhf_worker.errors import EngineFailed, EnginesLost, RewardFailed
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.rollout import producer as module
from rlhf_worker.rollout.admission import Group
from rlhf_worker.rollout.episode import Episode, Request, Turn
from rlhf_worker.rollout.producer import Rollouts
from tests.worker.configs import run_config
from tests.worker.samples import a_prompt

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
SAMPLES = 2


class Silent:
    """Decodes nothing."""

    def text(self, before: Any, token_ids: Any, finish_reason: str) -> str:
        return "made"


class Again:
    def again(self, *given: Any) -> None:
        self.__init__(*given)  # type: ignore[misc]


class Engine(Again):
    """Completes at once, or when it is let go; fails, hangs or dies when told to."""

    def __init__(self, behaviour: str) -> None:
        import asyncio

        self.behaviour, self.go, self.calls, self.asleep = behaviour, asyncio.Event(), list[int](), False

    async def generate(
        self, requests: list[Request], deadline: float, place: tuple[int, int] | None = None
    ) -> list[Sample]:
        self.calls.append(len(requests))
        assert not self.asleep
        if self.behaviour == "fail":
            raise RuntimeError("no memory left")
        if self.behaviour == "lose its core":
            raise EngineFailed("engine 0 is dead")
        if self.behaviour == "die":
            os._exit(1)
        if self.behaviour in ("hang", "held"):
            await self.go.wait()
        return [self._sample(request) for request in requests]

    def _sample(self, request: Request) -> Sample:
        episode = Episode(request)
        episode.add(Turn([7, 8], [-1.0, -1.0], [0, 0], "stop"))
        return episode.sample(Silent())  # type: ignore[arg-type]

    async def sleep(self, asleep: bool) -> None:
        self.asleep = asleep

    async def sleeps(self) -> bool:
        return self.asleep

    async def release(self) -> None:
        self.go.set()

    async def asked(self) -> list[int]:
        return self.calls


class Feed(Again):
    """Prompts 0, 1, 2, ...; samples of a prompt whose row is in `dull` are all worth 0, others 0, 1, ...; `broken`: a
    reward that fails.
    """

    def __init__(self, dull: list[int], broken: bool = False) -> None:
        self.drawn, self.dull, self.broken = 0, dull, broken

    def draw(self, again: list[str], count: int) -> list[Prompt]:
        self.drawn += count
        rows = [*(int(uid.split(":")[1]) for uid in again), *range(self.drawn - count, self.drawn)]
        return [a_prompt(row) for row in rows]

    def sampler_state(self) -> dict[str, Any]:
        return {"position": self.drawn}

    def restore(self, drawn: int) -> None:
        self.drawn = drawn

    def score(self, samples: list[Sample], models: dict[str, list[float]], judge: str) -> list[ScoredSample]:
        if self.broken:
            raise RewardFailed("rewards[r] failed")
        values = [
            0.0 if sample.prompt.row in self.dull else float(index % SAMPLES) for index, sample in enumerate(samples)
        ]
        pairs = zip(samples, values, strict=True)
        return [ScoredSample(sample=sample, reward=value, parts={judge or "r": value}) for sample, value in pairs]


class Scorer(Again):
    """A reward model on the engines' GPUs: there is room for it only while they sleep."""

    def __init__(self, engines: list[Any]) -> None:
        self.engines, self.asked = engines, list[list[str]]()

    def scores(self, role: str, prompts: list[str], completions: list[str]) -> list[float]:
        self.asked.append(prompts)
        assert all(ray.get([engine.sleeps.remote() for engine in self.engines]))
        return [0.0] * len(completions)

    def called(self) -> int:
        return len(self.asked)

    def prompts(self) -> list[list[str]]:
        return self.asked


RemoteScorer: Any = ray.remote(num_cpus=0)(Scorer)
RemoteEngine: Any = ray.remote(num_cpus=0)(Engine)
RemoteFeed: Any = ray.remote(num_cpus=0)(Feed)


class Pool:
    """Actors that live on are made anew for the next test: to start a process costs 4 s of a core."""

    def __init__(self) -> None:
        self.free, self.lent = defaultdict[Any, list[Any]](list), list[tuple[Any, Any]]()

    def made(self, kind: Any, *given: Any) -> Any:
        while self.free[kind]:
            actor = self.free[kind].pop()
            with suppress(RayActorError):
                ray.get(actor.again.remote(*given))
                break
        else:
            actor = kind.remote(*given)
        self.lent.append((kind, actor))
        return actor

    def back(self) -> None:
        while self.lent:
            kind, actor = self.lent.pop()
            self.free[kind].append(actor)

    def gone(self) -> None:
        """With their Ray, whose successor knows none of them."""
        self.free.clear()
        self.lent.clear()


POOL = Pool()


@pytest.fixture(autouse=True)
def lent() -> Iterator[None]:
    yield
    POOL.back()


class Fleet:
    short, slots = False, 256

    def __init__(self, engines: list[Any]) -> None:
        self.serving, self.spare, self.asleep = engines, list[Any](), list[Any]()

    def lost(self, engine: Any) -> None:
        if engine in self.serving:
            self.serving.remove(engine)

    def sleep(self) -> None:
        ray.get([engine.sleep.remote(True) for engine in self.serving])
        self.asleep, self.serving = self.asleep + self.serving, []

    def ensure(self) -> None:
        if self.asleep:
            ray.get([engine.sleep.remote(False) for engine in self.asleep])
            self.serving, self.asleep = self.asleep, []
            return
        if not self.spare:
            raise EnginesLost("none came back")
        self.serving.append(self.spare.pop())


class Crew:
    def __init__(self, behaviours: list[str], dull: list[int], broken: bool) -> None:
        self.fleet = Fleet([POOL.made(RemoteEngine, behaviour) for behaviour in behaviours])
        self.feed = POOL.made(RemoteFeed, dull, broken)
        self.policy = [POOL.made(RemoteScorer, list(self.fleet.serving))]
        self.ranks: dict[str, list[Any]] = {"reward:model": self.policy}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    directory = Path("/tmp") / f"rr-{os.getpid()}"  # Ray's sockets need a short path
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=str(directory),
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    POOL.gone()


def make(
    behaviours: list[str], *, staleness: int = 0, dull: list[int] | None = None, broken: bool = False, step: int = 0,
    pending: list[str] | None = None,
    spec: dict[str, Any] | None = None, **rollout: Any
) -> tuple[Rollouts, Crew]:
    crew = Crew(behaviours, dull or [], broken)
    config = run_config(
        steps=50, algorithm={"name": "dapo", "dynamicSampling": {"maxRounds": 3}},
        rollout={
            "maxTokens": 16, "promptsPerStep": 4, "samplesPerPrompt": SAMPLES, "staleness": staleness, "seed": 3,
            **rollout,
        },
        **(spec or {"placement": {"mode": "Separated"}}),
    )  # fmt: skip
    return Rollouts(config, crew, step, pending or []), crew  # type: ignore[arg-type]


def rows(groups: list[Group]) -> list[int]:
    return [group.prompt.row for group in groups]


def pumped(rollouts: Rollouts, done: Callable[[], bool]) -> None:
    """As the loop does while it waits for the trainer."""
    end = time.monotonic() + 60
    while not done():
        rollouts.pump()
        assert time.monotonic() < end, "nothing happened for a minute"


def test_a_step_is_a_call_a_group_and_keeps_the_order() -> None:
    rollouts, crew = make(["well", "well"])
    taken = rollouts.take()
    assert rows(taken) == [0, 1, 2, 3]
    assert all([item.reward for item in group.samples] == [0.0, 1.0] for group in taken)
    assert ray.get([engine.asked.remote() for engine in crew.fleet.serving]) == [[2, 2], [2, 2]]
    rollouts.pump()
    assert rollouts.admission.pending() == []  # the trainer works, and nothing begins
    assert rollouts.finish(1) == ({"position": 4}, [])
    assert rows(rollouts.take()) == [4, 5, 6, 7]


@pytest.mark.parametrize("behaviour", ["fail", "die", "lose its core"])
def test_groups_of_a_failing_engine_are_made_by_another(behaviour: str) -> None:
    rollouts, crew = make([behaviour, "well"])
    assert rows(rollouts.take()) == [0, 1, 2, 3]
    assert rollouts.metrics["rollout/retried_groups"] == 2
    assert len(crew.fleet.serving) == (2 if behaviour == "fail" else 1)


def test_when_every_engine_fails_the_run_stops_with_the_cause() -> None:
    rollouts, _ = make(["fail", "fail"])
    with pytest.raises(RuntimeError, match="no memory left"):
        rollouts.take()


@pytest.mark.parametrize("dead", ["die", "lose its core"])
def test_when_every_engine_is_dead_groups_wait_for_one_that_comes_back(dead: str) -> None:
    rollouts, crew = make([dead, dead])
    crew.fleet.spare.append(POOL.made(RemoteEngine, "well"))
    assert sorted(rows(rollouts.take())) == [0, 1, 2, 3]
    rollouts, _ = make([dead])
    with pytest.raises(EnginesLost):
        rollouts.take()


def test_an_engine_that_does_not_answer_past_its_deadline_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LATE_SECONDS", 2.0)  # for the one that is well, on a busy machine
    rollouts, crew = make(["hang", "well"], deadlineSeconds=2.0)
    assert rows(rollouts.take()) == [0, 1, 2, 3] and len(crew.fleet.serving) == 1


def test_a_reward_that_fails_ends_the_run() -> None:
    rollouts, _ = make(["well"], broken=True)
    with pytest.raises(RewardFailed):
        rollouts.take()


def test_a_failure_while_the_trainer_works_is_raised_by_the_next_take() -> None:
    rollouts, _ = make(["well"], broken=True, staleness=1)
    pumped(rollouts, lambda: rollouts._error is not None)
    with pytest.raises(RewardFailed):
        rollouts.take()


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_that_teach_nothing_are_refilled(staleness: int) -> None:
    rollouts, _ = make(["well", "well"], dull=[0, 2, 5], staleness=staleness)
    taken, _, again = rollouts.take(), rollouts.finish(1), rollouts.take()
    assert not {0, 2, 5} & {*rows(taken), *rows(again)}
    assert len({*rows(taken), *rows(again)}) == 8


def test_after_the_last_round_a_step_takes_what_there_is() -> None:
    rollouts, _ = make(["well"], dull=list(range(100)))
    assert rows(rollouts.take()) == [8, 9, 10, 11]
    assert rollouts.metrics["rollout/dropped_groups"] == 8


def test_staleness_begins_groups_of_the_next_step_and_no_more() -> None:
    rollouts, crew = make(["held", "held"], staleness=1)
    rollouts.pump()
    assert len(rollouts.admission.pending()) == 8
    pumped(
        rollouts,
        lambda: sum(map(sum, ray.get([engine.asked.remote() for engine in crew.fleet.serving]))) == 8 * SAMPLES
    )
    assert len(rollouts.admission.pending()) == 8
    ray.get([engine.release.remote() for engine in crew.fleet.serving])
    rollouts.take()
    pumped(rollouts, lambda: not rollouts._calls)
    assert len(rollouts.admission.pending()) == 4
    rollouts.finish(1)
    assert len(rollouts.admission.pending()) == 8
    rollouts.take()
    assert rollouts.metrics["rollout/staleness_max"] <= 1


def test_a_resumed_run_loses_and_repeats_no_prompt() -> None:
    rollouts, _ = make(["well"], staleness=1, dull=[1])
    trained = rows(rollouts.take())
    sampler, pending = rollouts.finish(1)
    assert pending
    resumed, crew = make(["well"], staleness=1, step=1, pending=pending, dull=[1])
    ray.get(crew.feed.restore.remote(sampler["position"]))
    for step in range(2, 6):
        trained += rows(resumed.take())
        _, pending = resumed.finish(step)
    everyone = [*trained, *(int(uid.split(":")[1]) for uid in pending)]
    assert len(everyone) == len(set(everyone)) and set(range(20)) - {1} <= set(everyone)


def test_a_reward_model_is_asked_about_the_samples_that_it_judges_only() -> None:
    model = {"name": "model", "type": "model", "model": {"path": "/models/reward"}}
    rollouts, crew = make(["well"], spec={"rewards": [model]}, sleep=True)
    spec = EvaluationSpec.model_validate({"name": "e", "data": {"jsonl": {"path": "/x"}}})
    others = [replace(a_prompt(row), rewards=("r",)) for row in (90, 92)]
    rollouts.evaluate(spec, [others[0], a_prompt(91), others[1]])
    assert ray.get(crew.policy[0].prompts.remote()) == [["prompt 91"]]
    rollouts.evaluate(spec, others)
    assert ray.get(crew.policy[0].called.remote()) == 1


def test_reward_models_on_the_engines_gpus_wait_for_all_of_them_to_sleep() -> None:
    """Also when more is generated afterwards: a refill, an evaluation, the next step."""
    model = {"name": "model", "type": "model", "model": {"path": "/models/judge"}}
    rollouts, crew = make(["well", "held"], dull=[1], spec={"rewards": [model]}, sleep=True)
    engines, scorer = list(crew.fleet.serving), crew.policy[0]
    pumped(rollouts, lambda: bool(rollouts._unscored))  # the first engine's
    assert ray.get(scorer.called.remote()) == 0 and crew.fleet.serving == engines
    ray.get(engines[1].release.remote())
    assert rows(rollouts.take()) == [0, 2, 3, 4]
    assert ray.get(scorer.called.remote()) == 2 and crew.fleet.serving == []
    rollouts.finish(1)
    spec = EvaluationSpec.model_validate({"name": "e", "data": {"jsonl": {"path": "/x"}}})
    assert len(rollouts.evaluate(spec, [a_prompt(90)])) == 1
    assert rows(rollouts.take()) == [5, 6, 7, 8]


def test_an_evaluation_takes_nothing_from_the_steps() -> None:
    rollouts, _ = make(["well"])
    given = {"name": "e", "data": {"jsonl": {"path": "/x"}}, "samples": 3, "temperature": 0.5}
    spec = EvaluationSpec.model_validate(given)
    found = rollouts.evaluate(spec, [a_prompt(90), a_prompt(91)])
    assert [[item.sample.prompt.row for item in group] for group in found] == [[90] * 3, [91] * 3]
    assert rows(rollouts.take()) == [0, 1, 2, 3]
    judged = EvaluationSpec.model_validate({**given, "rewards": [{"name": "own", "type": "python", "function": "a:b"}]})
    (group,) = rollouts.evaluate(judged, [a_prompt(92)])
    assert [list(item.parts) for item in [*group, *found[0]]] == [["e"]] * 3 + [["r"]] * 3
