"""What fleet and producer answer in each state of an engine (the tables of docs/rollouts.md), without processes."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_worker import calls
from rlhf_worker.engines import fleet as fleets
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.engines.ledger import Event, Health
from rlhf_worker.errors import DeadlineExceeded, EngineFailed, EnginesLost, EnvironmentFailed
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.rollout import producer as producers
from rlhf_worker.rollout.admission import Group
from rlhf_worker.rollout.episode import Episode, Request, Turn
from rlhf_worker.rollout.producer import Rollouts
from rlhf_worker.weights.sync import Synced
from tests.worker.configs import run_config
from tests.worker.ray_world import NEVER, Actor, Ref, World
from tests.worker.samples import a_prompt, a_sample

START, DEADLINE, SLOTS, DOCS = 60.0, 600.0, 256, Path(__file__).parents[2] / "docs" / "rollouts.md"


class Sync:
    """`engines`: who is asked; one that died since fails it."""

    def __init__(self, engines: list[Actor]) -> None:
        self.engines: list[Actor] = engines
        self.reached: list[list[Actor]] = []

    def __call__(self, *, prove: bool) -> Synced:
        calls.gather([engine.adopt.remote(1) for engine in self.engines], 5.0, "sync")
        self.reached.append(list(self.engines))
        return Synced(len(self.reached), 0.0, "none", None)


def whole(requests: list[Request], deadline: float, place: tuple[int, int] | None = None) -> list[Sample | None]:
    return completed(requests)


class Engines:
    """A fleet whose thread stands: `look` is its work, at most every two seconds of the world's clock."""

    def __init__(self, world: World, count: int, least: int = 1) -> None:
        self.world, self.spawned = world, list[Actor]()
        self.actors = [Actor(world, f"engine {number}") for number in range(count)]
        self.starts: Any = None  # what the start of a new one answers
        self.sync = Sync(list(self.actors))
        self.fleet = Fleet(
            self.actors, self.sync, self.spawn, lambda amiss: None,  # type: ignore[arg-type]
            least=least, slots=SLOTS, start_seconds=2 * START, sleep_seconds=30.0,
        )  # fmt: skip
        self.fleet.sync(prove=False)
        self._again()

    def spawn(self, number: int) -> tuple[Any, Any]:
        actor = Actor(self.world, f"engine {number} anew", start=self.starts, generate=whole)
        actor.takes["start"] = START
        self.spawned.append(actor)
        return actor, actor.start.remote()

    def _again(self) -> None:
        self.look()
        self.world.after(2.0, self._again)

    def look(self) -> None:
        if not self.fleet._spawning.locked():
            self.fleet._restart()
            self.ping()

    def ping(self) -> None:
        """As `_probe`, which waits: a wait within the clock's own work would move it."""
        for number, health in enumerate(self.fleet.health()):
            if health in fleets.RUNNING and isinstance(self.fleet.actors[number].does.get("ping"), Exception):
                self.fleet._note(number, Event.LOST)
                self.world.kill(self.fleet.actors[number])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(fleets, "PROBE_SECONDS", 3600.0)
    monkeypatch.setattr(Fleet, "_watch", lambda self: None)
    return World(monkeypatch, fleets, calls, producers)


def bring(engines: Engines, state: Health) -> Actor:
    """Engine 1 to a state, as it comes there; what engine 1 is then."""
    fleet, world = engines.fleet, engines.world
    victim = engines.actors[1]
    if state is Health.SUSPECT:
        victim.does["ping"] = NEVER
        fleet._probe()
    elif state is not Health.HEALTHY:
        engines.starts = None if state is not Health.DEAD else RuntimeError("no memory")
        world.kill(victim)
        fleet.lost(victim)
    if state in (Health.RESTARTING, Health.STALE):
        fleet._restart()
        world.sleep(START + 4.0 if state is Health.STALE else 4.0)
    assert fleet.health()[1] is state
    actor: Any = fleet.actors[1]
    assert isinstance(actor, Actor)
    return actor


def test_the_loads_are_of_the_engines_that_answer(world: World) -> None:
    """One that hangs costs a moment, and no step waits for it."""
    engines = Engines(world, 4)
    for actor, answer in zip(engines.actors, ({0: 1.0, 8: 2.0}, NEVER, EngineFailed("hangs"), {}), strict=True):
        actor.does["load"] = answer
    before = world.now
    assert engines.fleet.loads() == [{0: 1.0, 8: 2.0}, {}]
    assert world.now - before <= fleets.LOAD_SECONDS
    for actor in engines.actors:
        engines.world.kill(actor)
        engines.fleet.lost(actor)
    assert engines.fleet.loads() == []


def told() -> Iterator[tuple[str, list[str]]]:
    """The rows of the first table in the docs."""
    text = DOCS.read_text().partition("| State of an engine |")[2].partition("\n\n")[0]
    for line in text.splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        yield name, cells


ROWS = dict(told())


def test_the_table_has_every_state() -> None:
    assert list(ROWS) == [str(state) for state in Health]


@pytest.mark.parametrize("state", list(Health))
def test_each_cell_of_the_table_holds(world: World, state: Health) -> None:
    asked, probed, synced, slept, anew, counts = ROWS[state]
    engines = Engines(world, 2, least=2)
    engine, fleet = bring(engines, state), engines.fleet
    assert (engine in fleet.serving) == (asked == "yes")
    pings = engine.asked("ping")
    fleet._probe()
    assert (engine.asked("ping") > pings) == (probed == "yes")
    assert fleet.short == (counts != "yes")

    engines = Engines(world, 2, least=2)
    engine, fleet = bring(engines, state), engines.fleet
    fleet.sync(prove=False)
    assert (engine in engines.sync.reached[-1]) == (synced == "yes")
    assert (engine in fleet.serving) == (synced == "yes")

    engines = Engines(world, 2)
    engine, fleet = bring(engines, state), engines.fleet
    fleet.sleep()
    assert engine.asked("sleep") == (slept in ("yes", "when it has started"))
    if slept == "when it has started":
        assert [name for name, _, _ in engine.calls if name in ("start", "sleep")] == ["start", "sleep"]
        assert fleet.health()[1] is Health.STALE
    assert fleet.serving == [] and not fleet.short

    engines = Engines(world, 2)
    engine, fleet = bring(engines, state), engines.fleet
    before = len(engines.spawned)
    fleet._restart()
    assert (len(engines.spawned) > before) == (anew == "yes, but while the others sleep")


def test_no_engine_begins_to_load_once_the_others_lend_their_memory(world: World) -> None:
    engines = Engines(world, 2)
    engine = bring(engines, Health.DEAD)
    engines.fleet.sleep()
    world.sleep(100.0)
    assert engines.spawned == [] and engine.asked("sleep") == 0
    engines.fleet.sync(prove=False)
    world.sleep(4.0)
    assert len(engines.spawned) == 1


def test_one_that_does_not_start_in_its_time_is_given_up_and_its_late_answer_changes_nothing(world: World) -> None:
    engines = Engines(world, 2)
    engines.fleet.lost(engines.actors[1])
    engines.starts = NEVER
    engines.fleet._restart()
    (late,) = engines.spawned
    engines.starts = None
    world.sleep(2 * START + 10.0)
    assert late.dead and len(engines.spawned) == 2
    late.calls[0][2].end()
    engines.fleet.lost(late)
    world.sleep(START + 4.0)
    assert engines.fleet.health() == [Health.HEALTHY, Health.STALE]


# Producer.

SAMPLES = 4


def completed(requests: list[Request], missing: int = 0) -> list[Sample | None]:
    whole = [a_sample(request.prompt.row, text=f"{request.seed}") for request in requests]
    return [*whole[: len(whole) - missing], *[None] * missing]


class Feed:
    def __init__(self) -> None:
        self.drawn, self.scored, self.calls, self.dull = 0, list[str](), list[int](), set[int]()

    def draw(self, again: list[str], count: int) -> list[Prompt]:
        self.drawn += count
        rows = [*(int(uid.split(":")[1]) for uid in again), *range(self.drawn - count, self.drawn)]
        return [a_prompt(row) for row in rows]

    def score(self, samples: list[Sample], models: dict[str, list[float]], judge: str) -> list[ScoredSample]:
        assert not any(len(sample.token_ids) or sample.prompt.token_ids for sample in samples), "no reward reads them"
        self.scored += [sample.text for sample in samples]
        self.calls.append(len(samples))
        values = [0.0 if one.prompt.row in self.dull else float(i % 2) for i, one in enumerate(samples)]
        pairs = zip(samples, values, strict=True)
        return [ScoredSample(sample=one, reward=value, parts={"r": 1.0}) for one, value in pairs]


class Crew:
    def __init__(self, engines: Engines) -> None:
        self.told = Feed()
        does = {"draw": self.told.draw, "score": self.told.score, "sampler_state": lambda: {"drawn": self.told.drawn}}
        self.feed = Actor(engines.world, "feed", **does)
        self.fleet, self.policy, self.ranks = engines.fleet, list[Actor](), dict[str, list[Actor]]()


def make(world: World, count: int, least: int = 1, **rollout: Any) -> tuple[Rollouts, Engines, Feed]:
    engines = Engines(world, count, least)
    for actor in engines.actors:
        actor.does["generate"] = whole
    given = {"promptsPerStep": 2, "samplesPerPrompt": SAMPLES, "seed": 3, "maxTokens": 16, "deadlineSeconds": DEADLINE}
    config = run_config(steps=50, rollout={**given, **rollout}, placement={"mode": "Separated"})
    crew = Crew(engines)
    return Rollouts(config, crew, 0), engines, crew.told  # type: ignore[arg-type]


def sizes(actor: Actor) -> list[int]:
    return [len(args[0]) for method, args, _ in actor.calls if method == "generate"]


Case = tuple[Any, float, list[int], list[int], Health]
FIRST: dict[str, Case] = {  # what engine 0 does at first, for how long; what is asked of each then; what engine 0 is
    "all": (completed, 1.0, [4], [4], Health.HEALTHY),
    "an error": (RuntimeError("a kernel"), 1.0, [4], [4, 4], Health.HEALTHY),
    "an environment's": (EnvironmentFailed("e"), 1.0, [4], [4, 4], Health.HEALTHY),
    "its core died": (EngineFailed("dead"), 1.0, [4], [4, 4], Health.DEAD),
    "part of it at the deadline": (lambda asked: completed(asked, 1), DEADLINE, [4, 1], [4], Health.HEALTHY),
    "nothing at the deadline": (DeadlineExceeded("none of 4"), DEADLINE, [4], [4, 4], Health.HEALTHY),
    "no core's answer at the deadline": (EngineFailed("hangs"), DEADLINE, [4], [4, 4], Health.DEAD),
    "no answer at all": (NEVER, 0.0, [4], [4, 4], Health.DEAD),
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("staleness", [0, 1])
def test_whatever_an_engine_answers_each_completion_is_made_once(world: World, name: str, staleness: int) -> None:
    does, seconds, first, second, health = FIRST[name]
    rollouts, engines, feed = make(world, 2, staleness=staleness)
    one, other = engines.actors

    def generate(requests: list[Request], deadline: float, place: Any = None) -> Any:
        one.does["generate"] = whole
        one.takes.pop("generate", None)
        return does(requests) if callable(does) else does

    one.does["generate"], one.takes["generate"] = (does if does is NEVER else generate), seconds
    groups = rollouts.take()
    assert all(len({item.sample.text for item in group.samples}) == SAMPLES for group in groups)
    assert len(feed.scored) == len(set(feed.scored))
    if not staleness:
        assert [group.prompt.row for group in groups] == [0, 1]
        assert (sizes(one), sizes(other)) == (first, second)
        states = (health,) if health is Health.HEALTHY else (Health.DEAD, Health.RESTARTING)
        assert engines.fleet.health()[0] in states
        assert (one in engines.fleet.serving) == (health is Health.HEALTHY)


def test_of_five_hundred_and_twelve_the_five_hundred_that_came_are_kept(world: World) -> None:
    rollouts, engines, feed = make(world, 1, promptsPerStep=64, samplesPerPrompt=8)
    (engine,) = engines.actors
    cut = iter([1] * 12 + [0] * 52 + [1] * 4 + [0] * 12)
    engine.does["generate"] = lambda requests, *_: completed(requests, next(cut))
    groups = rollouts.take()
    assert sizes(engine) == [8] * 64 + [1] * 16 and len(feed.scored) == len(set(feed.scored)) == 512
    assert [group.prompt.row for group in groups] == list(range(64))
    assert engines.fleet.health() == [Health.HEALTHY]


def test_the_lone_engine_that_finishes_nothing_in_its_deadline_ends_the_run(world: World) -> None:
    rollouts, engines, _ = make(world, 1)
    engines.actors[0].does["generate"] = DeadlineExceeded("it finished 0")
    with pytest.raises(DeadlineExceeded):
        rollouts.take()


def test_what_an_engine_that_was_given_up_says_later_is_heard_by_nobody(world: World) -> None:
    rollouts, engines, feed = make(world, 2)
    engines.actors[0].does["generate"] = NEVER
    rollouts.take()
    ((_, (requests, *_), ref),) = [call for call in engines.actors[0].calls if call[0] == "generate"]
    ref.end(completed(requests))
    rollouts.finish(1)
    rollouts.take()
    assert len(feed.scored) == len(set(feed.scored)) == 2 * 2 * SAMPLES


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_waits_for_min_engines_and_goes_on_when_they_are_back(world: World, staleness: int) -> None:
    """Through `take`: three of four died, and the one that is left has finished everything."""
    rollouts, engines, _ = make(world, 4, least=3, staleness=staleness)
    for victim in engines.actors[1:]:
        victim.die()
        engines.fleet.lost(victim)
    start = world.now
    rollouts.take()
    assert world.now - start >= START and len(engines.fleet.serving) == 4 and not engines.fleet.short


def test_engines_that_fall_below_it_in_the_middle_of_a_step_are_waited_for_too(world: World) -> None:
    rollouts, engines, _ = make(world, 2, least=2)
    one, other = engines.actors
    one.takes["generate"] = 30.0
    world.after(5.0, lambda: other.does.update(ping=EngineFailed("dead")))
    start = world.now
    rollouts.take()
    assert world.now - start >= START and not engines.fleet.short


def test_too_few_that_never_come_back_end_the_run_by_name(world: World) -> None:
    rollouts, engines, _ = make(world, 2, least=2)
    engines.starts = RuntimeError("no memory")
    engines.fleet.lost(engines.actors[1])
    with pytest.raises(EnginesLost, match=r"fewer than spec\.rollout\.minEngines \(2\).*no memory"):
        rollouts.take()


def test_the_rows_of_the_second_table_are_those_that_are_tried() -> None:
    text = DOCS.read_text().partition("| An engine's call ends with |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|")[0].strip() for line in text.splitlines()[2:]]
    assert [re.sub(r"`", "", row) for row in rows] == list(FIRST)


# The queue, and completions that go on in the next step.


class Paced(Actor):
    """Makes a token a second of each completion, so many of it as its prompt's row says; as many at once as are asked.

    A token is its place in the completion. `version` is of the weights.
    """

    def __init__(self, world: World, name: str, lengths: dict[int, int]) -> None:
        super().__init__(world, name)
        self.lengths, self.version, self.running = lengths, 0, list[tuple[float, list[Request], Ref]]()

    def _call(self, method: str, args: tuple[Any, ...]) -> Ref:
        if method != "generate":
            ref = super()._call(method, args)
            if method == "interrupt":
                self._interrupt()
            return ref
        requests, ref = args[0], Ref()
        self.calls.append((method, args, ref))
        self.running.append((self.world.now, requests, ref))
        left = max(self._length(request) - self._made(request) for request in requests)
        version = self.version
        self.world.after(left, lambda: self._end(requests, ref, left, version))
        return ref

    def _length(self, request: Request) -> int:
        return self.lengths[request.prompt.row]

    def _made(self, request: Request) -> int:
        return len(request.begun.token_ids) if request.begun else 0

    def _end(self, requests: list[Request], ref: Ref, seconds: float, version: int) -> None:
        if not ref.done:
            self.running = [one for one in self.running if one[2] is not ref]
            ref.end([self._sample(request, int(seconds), version) for request in requests])

    def _interrupt(self) -> None:
        for start, requests, ref in list(self.running):
            self._end(requests, ref, self.world.now - start, self.version)

    def _sample(self, request: Request, seconds: int, version: int) -> Sample:
        episode, made = Episode(request), self._made(request)
        end = min(self._length(request), made + seconds)
        reason = "stop" if end == self._length(request) else "abort"
        tokens = list(range(made, end))
        episode.add(Turn(tokens, [-1.0] * len(tokens), [version] * len(tokens), reason))
        return episode.sample(SimpleNamespace(text=lambda *_: f"{request.seed}"))  # type: ignore[arg-type]


def paced(
    world: World, count: int, lengths: dict[int, int], *, slots: int = SLOTS, step: int = 0,
    pending: Sequence[str] = (), algorithm: dict[str, Any] | None = None, **rollout: Any,
) -> tuple[Rollouts, list[Paced], Feed]:  # fmt: skip
    engines = Engines(world, count)
    actors = [Paced(world, f"engine {number}", lengths) for number in range(count)]
    engines.fleet.actors, engines.fleet.serving, engines.fleet.slots = actors, list(actors), slots
    given = {"samplesPerPrompt": SAMPLES, "seed": 3, "maxTokens": 16, "deadlineSeconds": DEADLINE, **rollout}
    config = run_config(
        steps=50, rollout=given, placement={"mode": "Separated"}, algorithm=algorithm or {"name": "grpo"}
    )
    crew = Crew(engines)
    return Rollouts(config, crew, step, pending), actors, crew.told  # type: ignore[arg-type]


def rows(groups: Sequence[Group]) -> list[int]:
    return [group.prompt.row for group in groups]


def made(groups: Sequence[Group]) -> set[tuple[int, str]]:
    return {(group.prompt.row, item.sample.text) for group in groups for item in group.samples}


def asked(actor: Paced) -> list[int]:
    """The row of each call; all completions of a group are of one."""
    calls = [args[0] for method, args, _ in actor.calls if method == "generate"]
    assert all(len({request.prompt.row for request in requests}) == 1 for requests in calls)
    return [requests[0].prompt.row for requests in calls]


def test_engines_take_groups_from_one_queue_as_they_have_room(world: World) -> None:
    lengths = dict.fromkeys(range(12), 2) | {0: 9, 2: 9}  # what engine 0 begins with is long
    rollouts, (one, other), feed = paced(world, 2, lengths, slots=SAMPLES, promptsPerStep=12)
    groups = rollouts.take()
    assert (asked(one), asked(other)) == ([0, 2], [1, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert rows(groups) == list(range(12)) and len(feed.calls) > 1, "rewards of what is finished are not waited for"
    assert [args[2:] for method, args, _ in one.calls if method == "generate"] == [((0, 2),), ((1, 2),)]
    again, (alone,), _ = paced(world, 1, lengths, promptsPerStep=12)
    assert made(again.take()) == made(groups), "the same seeds, whichever engine"
    assert asked(alone) == list(range(12)), "one engine has nothing to share"


def test_over_sampling_ends_a_step_with_the_first_and_carries_the_rest_over(world: World) -> None:
    lengths = {0: 9, 1: 3, 2: 9, 3: 3, 4: 5, 5: 20, 6: 4, 7: 4}
    rollouts, engines, _ = paced(world, 2, lengths, promptsPerStep=2, overSampling=2, maxTokens=32)
    start = world.now
    assert rows(rollouts.take()) == [1, 3] and world.now - start < 5.0
    busy = [len(engine.running) for engine in engines]
    rollouts.pump()
    assert busy == [len(engine.running) for engine in engines] == [0, 0], "the trainer has the GPUs"
    for engine in engines:
        engine.version = 1
    _, pending = rollouts.finish(1)
    assert sorted(pending) == ["0:0", "0:2"] and any(engine.running for engine in engines)
    second = rollouts.take()
    assert rows(second) == [0, 2], "6 seconds; the new ones need 5 and 20"
    for group in second:
        for item in group.samples:
            sample = item.sample
            assert sample.token_ids.tolist() == list(range(9)), "none lost, none twice"
            assert sample.versions.tolist() == [0] * 3 + [1] * 6 and sample.logprobs.tolist() == [-1.0] * 9
    calls = [args[0] for engine in engines for name, args, _ in engine.calls if name == "generate"]
    seeds = [Episode(request).seed for requests in calls for request in requests]
    assert len(set(seeds)) == len(seeds) == 8 * SAMPLES, "what goes on draws other numbers than those it began with"
    assert rollouts.metrics["rollout/staleness_max"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_prompt_of_an_over_sampled_run_is_lost_or_trained_twice(world: World, dynamic: bool) -> None:
    """Through deaths, deadlines and a resume."""
    lengths = {row: 1 + (7 * row) % 13 for row in range(200)}
    algorithm: dict[str, Any] = {"name": "dapo", "dynamicSampling": {"maxRounds": 3, "enabled": dynamic}}
    given: dict[str, Any] = {"algorithm": algorithm, "promptsPerStep": 4, "overSampling": 1.5}
    rollouts, engines, feed = paced(world, 3, lengths, **given)
    world.after(4.0, engines[1].die)
    trained, pending = list[int](), list[str]()
    for step in range(1, 9):
        taken = rollouts.take()
        assert len(taken) == 4 and all(len(group.samples) == SAMPLES for group in taken)
        trained += rows(taken)
        state, pending = rollouts.finish(step)
        if step == 4:
            rollouts, engines, feed = paced(world, 2, lengths, step=4, pending=pending, **given)
            feed.drawn = state["drawn"]
            rollouts.pump()
    everyone = [*trained, *(int(uid.split(":")[1]) for uid in pending)]
    assert sorted(everyone) == list(range(len(everyone)))


def test_what_an_engine_answers_late_to_an_interrupt_is_waited_for(world: World) -> None:
    """A call that reached the engine after the interrupt runs on: it is asked again."""
    rollouts, (engine,), _ = paced(world, 1, {0: 2, 1: 40, 2: 40}, promptsPerStep=1, overSampling=3, maxTokens=64)
    deaf = iter([True, False])
    interrupt = engine._interrupt
    engine._interrupt = lambda: None if next(deaf, False) else interrupt()  # type: ignore[method-assign]
    assert rows(rollouts.take()) == [0]
    assert engine.asked("interrupt") == 2 and not engine.running


def test_with_rounds_at_their_end_the_order_of_finishing_changes_nothing(world: World) -> None:
    """Groups that teach nothing are dropped, as many as the rounds allow, in the order of their begin."""
    algorithm: dict[str, Any] = {"name": "dapo", "dynamicSampling": {"maxRounds": 2}}
    found = []
    for lengths in ({row: 1 + row for row in range(9)}, {row: 9 - row for row in range(9)}):
        rollouts, _, feed = paced(world, 2, lengths, promptsPerStep=3, algorithm=algorithm)
        feed.dull = {0, 1, 3, 4}
        found.append((rows(rollouts.take()), rollouts.metrics["rollout/dropped_groups"]))
    assert found[0] == found[1] and found[0][1] == 3
