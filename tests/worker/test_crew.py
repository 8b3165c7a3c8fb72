"""How a run's actors start together and end, whatever they do at that; without processes."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_api.run import RunConfig
from rlhf_worker import calls, run
from rlhf_worker import crew as module
from rlhf_worker import loop as loops
from rlhf_worker.crew import Crew
from rlhf_worker.experience import Batching
from rlhf_worker.roll import Roll
from rlhf_worker.stop import Stop
from tests.worker.configs import resolved, run_config
from tests.worker.ray_world import NEVER, Actor, World
from tests.worker.test_loop_order import Told

ENGINE_SECONDS, MODEL_SECONDS = 100.0, 70.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch, calls)


@pytest.mark.parametrize(("device", "mode", "seconds"), [
    ("cuda", "Colocated", ENGINE_SECONDS + MODEL_SECONDS),  # on one GPU an engine measures what is free
    ("cuda", "Separated", ENGINE_SECONDS), ("cpu", "Colocated", ENGINE_SECONDS),
])  # fmt: skip
def test_who_shares_no_gpu_starts_side_by_side(
    world: World, monkeypatch: pytest.MonkeyPatch, device: str, mode: str, seconds: float
) -> None:
    rank, feed = (Actor(world, name, address=("h", 1)) for name in ("rank", "feed"))
    engines = [Actor(world, f"engine {index}") for index in range(2)]
    for engine in engines:
        engine.takes["start"] = ENGINE_SECONDS
    rank.does["load"] = {"policy": Batching(padded=True, words="padded")}
    rank.takes["load"] = MODEL_SECONDS
    index = iter(engines)
    stand = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda config: feed))
    for name, value in {
        "RemoteFeed": stand, "choose": lambda *args: "shm", "_roles": lambda *args: {"policy": [rank]},
        "_engine": lambda *args: next(index), "preflight": lambda *args: None, "_prove_seats": lambda *args: {},
        "_fleet": lambda *args: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    rollout, trainer = {"maxTokens": 16, "engines": 2}, {"steps": 1, "gpus": 2}
    config = run_config(placement={"mode": mode}, rollout=rollout, trainer=trainer)
    stage: Any = SimpleNamespace(device=device, bundles={}, options=lambda *args: {})
    began = world.now
    module.start(config, stage, Told(), Roll(Stop()))  # type: ignore[arg-type]
    assert seconds <= world.now - began < seconds + 2.0


def test_the_driver_imports_torch_while_engines_start_and_models_load(
    world: World, monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Actor(world, "rank", address=("h", 1), load={"policy": Batching(padded=True, words="padded")})
    engine, under_way = Actor(world, "engine"), list[bool]()
    rank.takes["load"] = engine.takes["start"] = 10.0
    for name, value in {
        "RemoteFeed": SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda config: Actor(world, "feed"))),
        "choose": lambda *args: "shm", "_roles": lambda *args: {"policy": [rank]}, "_engine": lambda *args: engine,
        "preflight": lambda *args: None, "_prove_seats": lambda *args: {}, "_fleet": lambda *args: None,
        "importlib": SimpleNamespace(import_module=lambda name: under_way.extend(
            not ref.done for actor in (rank, engine) for method, _, ref in actor.calls if method in ("load", "start")
        )),
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    stage: Any = SimpleNamespace(device="cuda", bundles={}, options=lambda *args: {})
    module.start(run_config(placement={"mode": "Separated"}), stage, Told(), Roll(Stop()))  # type: ignore[arg-type]
    assert under_way == [True, True]


def failing() -> None:
    raise RuntimeError("it is gone")


class Ending:
    """A crew whose parts end as they like."""

    def __init__(self, world: World, engine: Any, fleet: Any, stage: Any) -> None:
        self.feed, self.rank = Actor(world, "feed"), Actor(world, "rank")
        self.engine = Actor(world, "engine", close=engine)
        if engine == "dead":
            self.engine.die()
        engines: Any = SimpleNamespace(close=fleet or (lambda: None), serving=[self.engine])
        placed: Any = SimpleNamespace(close=stage or (lambda: None))
        self.crew = Crew(placed, self.feed, {"policy": [self.rank]}, engines, padded=False)


@pytest.mark.parametrize(("engine", "fleet", "stage"), [
    (None, None, None), (NEVER, None, None), ("dead", None, None), (RuntimeError("CUDA error"), None, None),
    (None, failing, None), (None, None, failing), (NEVER, failing, failing),
])  # fmt: skip
def test_a_finished_run_is_done_whatever_its_actors_do_on_the_way_out(
    world: World, monkeypatch: pytest.MonkeyPatch, engine: Any, fleet: Any, stage: Any
) -> None:
    ending = Ending(world, engine, fleet, stage)
    stands: dict[str, Any] = {
        "_reserve": lambda *args: SimpleNamespace(device="cuda"), "start": lambda *args: (ending.crew, {}),
        "_restore": lambda *args: (0, {}),
        "_export": lambda *args: "/out/export", "fetch": lambda *args: None,
    }  # fmt: skip
    for name, value in stands.items():
        monkeypatch.setattr(run, name, value)
    stub = SimpleNamespace(begin=lambda *args: None, run=lambda: None, step=4)
    settled = list[RunConfig]()

    def loop(config: RunConfig, *_: Any) -> Any:
        settled.append(config)
        return stub

    monkeypatch.setattr(loops, "Loop", loop)
    told = Told()
    result = run.drive(resolved(), told, Stop())  # type: ignore[arg-type]
    assert [config.engines_sleep for config in settled] == [True], "which follows from the device"
    assert (result.steps, result.export, told.fields["state"]) == (4, "/out/export", "Done")
    assert ending.feed.asked("close") == ending.rank.asked("close") == ending.engine.asked("close") == 1
