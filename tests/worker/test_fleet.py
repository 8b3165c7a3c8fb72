"""The fleet with real Ray actors that only pretend to be engines: death, silence, restarts, and the way back."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from rlhf_worker.calls import gather
from rlhf_worker.engines import fleet as module
from rlhf_worker.engines.engine import Engine
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.engines.ledger import Health
from rlhf_worker.errors import EnginesLost, LinkBroken
from rlhf_worker.weights.sync import Synced
from tests.worker.waiting import kill, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


class Pretender:
    def __init__(self, broken: bool = False) -> None:
        self.broken, self.version, self.silent, self.asleep, self.hung = broken, -1, False, False, asyncio.Event()

    async def start(self) -> int:
        if self.broken:
            raise RuntimeError("no memory")
        return os.getpid()

    async def ping(self) -> None:
        if self.silent:
            raise RuntimeError("the engine core is dead")

    async def alive(self) -> None:
        if self.hung.is_set():
            await asyncio.Event().wait()

    async def hold(self, version: int) -> int:
        await self.alive()
        self.version, self.asleep = version, False
        return version

    async def sleep(self) -> None:
        await self.alive()
        self.asleep = True

    async def sleeps(self) -> bool:
        return self.asleep

    async def hang(self) -> None:
        """Its workers answer nothing any more, which `ping` does not tell."""
        self.hung.set()

    async def held(self) -> int:
        return self.version

    async def fall_silent(self) -> None:
        self.silent = True


PretenderActor: Any = ray.remote(num_cpus=0)(Pretender)


class PretendedSync:
    def __init__(self, engines: list[Any]) -> None:
        self.engines, self.version = engines, 0

    def __call__(self, *, prove: bool) -> Synced:
        self.version += 1
        gather([engine.hold.remote(self.version) for engine in self.engines], 5.0, "pretended sync")
        return Synced(self.version, 0.0, "none", None)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    directory = Path("/tmp") / f"rf-{os.getpid()}"  # Ray's sockets need a short path
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=str(directory),
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Fleet, list[str | None]]]]:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(module, "AFTER_FAILED_SYNC_SECONDS", 5.0)
    made: list[Fleet] = []

    def build(least: int = 1, broken: bool = False) -> tuple[Fleet, list[str | None]]:
        actors = [PretenderActor.remote() for _ in range(2)]
        ray.get([actor.start.remote() for actor in actors])
        amiss: list[str | None] = []

        def spawn(number: int) -> tuple[Any, Any]:
            actor = PretenderActor.remote(broken)
            return actor, actor.start.remote()

        made.append(Fleet(
            actors, PretendedSync(list(actors)), spawn, amiss.append,  # type: ignore[arg-type]
            least=least, slots=8, start_seconds=60.0, sleep_seconds=5.0,
        ))  # fmt: skip
        made[-1].sync(prove=False)
        return made[-1], amiss

    yield build
    for fleet in made:
        fleet.close()


def test_a_killed_engine_comes_back_with_the_next_sync(make: Callable[..., Any]) -> None:
    fleet, amiss = make()
    first, victim = fleet.actors
    os.kill(ray.get(victim.start.remote()), signal.SIGKILL)
    with pytest.raises(RayActorError):
        ray.get(victim.held.remote())
    fleet.lost(victim)
    assert fleet.serving == [first]
    fleet.ensure()  # one is enough: training goes on meanwhile
    until(lambda: fleet.health()[1] is Health.STALE, 60)
    assert fleet.serving == [first] and "engine 1 is stale" in amiss
    synced = fleet.sync(prove=False)
    assert fleet.health() == [Health.HEALTHY] * 2 and amiss[-1] is None
    assert ray.get([actor.held.remote() for actor in fleet.serving]) == [synced.version] * 2


def test_nobody_needs_to_call_an_engine_for_its_death_to_be_found(make: Callable[..., Any]) -> None:
    """vLLM's own process is gone, and the actor still answers everything else."""
    fleet, _ = make()
    victim = fleet.actors[0]
    ray.get(victim.fall_silent.remote())
    until(lambda: fleet.actors[0] != victim and fleet.health()[0] is Health.STALE, 60)
    with pytest.raises(RayActorError):  # who waits for it is not left waiting
        ray.get(victim.held.remote())
    fleet.sync(prove=False)
    assert fleet.health() == [Health.HEALTHY] * 2


def test_engines_that_sleep_serve_nothing_until_a_sync_reaches_those_that_still_live(make: Callable[..., Any]) -> None:
    fleet, _ = make()
    first, second = fleet.actors
    fleet.sleep()
    assert fleet.serving == [] and ray.get([actor.sleeps.remote() for actor in (first, second)]) == [True, True]
    fleet.sync(prove=False)
    assert fleet.serving == [first, second] and ray.get(
        [actor.sleeps.remote() for actor in (first, second)]
    ) == [False, False]
    kill(first)
    fleet.sleep()
    assert fleet.health()[0] is not Health.HEALTHY
    fleet.ensure()
    assert second in fleet.serving and first not in fleet.serving
    assert ray.get([second.held.remote(), second.sleeps.remote()]) == [3, False]


def test_sleep_reaches_an_engine_that_came_back_and_goes_on_without_one_that_hangs(make: Callable[..., Any]) -> None:
    fleet, amiss = make()
    first, victim = fleet.actors
    kill(victim)
    until(lambda: fleet.actors[1] != victim and fleet.health()[1] is Health.STALE, 60)
    back = fleet.actors[1]
    fleet.sleep()
    assert fleet.serving == [] and ray.get([actor.sleeps.remote() for actor in (first, back)]) == [True, True]
    fleet.sync(prove=False)
    amiss.clear()
    ray.get(first.hang.remote())
    fleet.sleep()
    assert ray.get(back.sleeps.remote()) and "engine 0 is dead" in amiss


def test_no_engine_is_started_into_the_memory_that_the_sleeping_lend(make: Callable[..., Any]) -> None:
    fleet, _ = make()
    first = fleet.actors[0]
    fleet.sleep()
    kill(first)
    until(lambda: fleet.health()[0] is Health.DEAD, 60)
    fleet._restart()
    assert fleet.health()[0] is Health.DEAD and fleet.actors[0] == first
    fleet.sync(prove=False)
    until(lambda: fleet.health()[0] is Health.STALE, 60)


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_who_is_lost_in_a_sync_is_left_out_and_the_others_get_the_weights_whole(
    make: Callable[..., Any], how: str,
) -> None:
    fleet, amiss = make()
    first, victim = fleet.actors
    ray.get(victim.hang.remote()) if how == "hangs" else kill(victim)
    synced = fleet.sync(prove=False)
    assert first in fleet.serving and victim not in fleet.serving and "engine 1 is dead" in amiss
    assert ray.get(first.held.remote()) == synced.version
    until(lambda: fleet.actors[1] != victim and fleet.health()[1] in (Health.STALE, Health.HEALTHY), 60)
    synced = fleet.sync(prove=False)
    assert ray.get([actor.held.remote() for actor in fleet.serving]) == [synced.version] * 2


def test_too_few_are_waited_for_and_get_the_weights_before_they_serve(make: Callable[..., Any]) -> None:
    fleet, _ = make(least=2)
    fleet.lost(fleet.actors[1])
    fleet.ensure()
    assert ray.get([actor.held.remote() for actor in fleet.serving]) == [2, 2]


def test_a_sync_that_finds_nobody_alive_waits_for_the_first_that_comes_back(make: Callable[..., Any]) -> None:
    fleet, _ = make()
    for actor in fleet.actors:
        kill(actor)
    fleet.sync(prove=False)
    assert Health.HEALTHY in fleet.health()


def test_an_error_that_no_death_explains_is_the_callers(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, _ = make()
    monkeypatch.setattr(PretendedSync, "__call__", lambda self, prove: (_ for _ in ()).throw(LinkBroken("a cable")))
    with pytest.raises(LinkBroken, match="a cable"):
        fleet.sync(prove=False)
    assert fleet.health() == [Health.HEALTHY] * 2


def test_engines_that_never_start_again_end_the_run_by_name(make: Callable[..., Any]) -> None:
    fleet, _ = make(least=2, broken=True)
    fleet.lost(fleet.actors[1])
    with pytest.raises(EnginesLost, match=r"fewer than spec\.rollout\.minEngines \(2\) engines are left.*engine 1 is "
        r"dead; engine 1: no memory"):
        fleet.ensure()


class Working(Engine):
    """An engine without vLLM, whose completions wait to be let go."""

    def __init__(self) -> None:
        self.llm: Any = self
        self.index, self.free = 0, asyncio.Event()

    async def begin(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def _completions(self, requests: list[Any], deadline_seconds: float, place: Any = None) -> list[Any]:
        await self.free.wait()
        assert asyncio.get_running_loop() is self._loop  # vLLM's, whose sockets belong to it
        return [None]

    async def ping(self) -> None: ...

    async def let_go(self) -> None:
        self.free.set()


def test_control_is_answered_while_more_work_waits_than_may_run() -> None:
    """Ray's cap is on the calls of a group: what is beyond it waits, and before there were groups pings did too."""
    actor = ray.remote(num_cpus=0, concurrency_groups={"work": 2})(Working).remote()
    ray.get(actor.begin.remote())
    work = [actor.generate.remote([], 60.0) for _ in range(6)]
    ray.get(actor.ping.remote(), timeout=30)
    ray.get(actor.let_go.remote(), timeout=30)
    assert ray.get(work, timeout=30) == [[None]] * 6
