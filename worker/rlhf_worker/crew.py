"""Every actor of a run: started side by side, loaded, connected, and proven to sit where the plan says."""

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.actor import ActorHandle

from rlhf_api.job import PlacementMode
from rlhf_api.run import TRAINED, RunConfig
from rlhf_worker.calls import answering, call, call_all, gather, root_cause
from rlhf_worker.deadlines import sleep_seconds, work_seconds
from rlhf_worker.engines.arguments import check_engine_args
from rlhf_worker.engines.engine import RemoteEngine
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.engines.hosts import Hosts
from rlhf_worker.errors import Problems
from rlhf_worker.feed.feed import RemoteFeed
from rlhf_worker.placement import Stage, check_seats, ray_share
from rlhf_worker.preflight import preflight
from rlhf_worker.progress import Reporter
from rlhf_worker.roll import Roll
from rlhf_worker.trainer.policy import RemotePolicy
from rlhf_worker.weights.backends import choose
from rlhf_worker.weights.sync import WeightSync

CLOSE_DEADLINE_SECONDS = 60.0
FEED_THREADS = 4  # so that prompts and metrics do not wait for slow rewards


@dataclass(frozen=True, slots=True)
class Crew:
    """Every actor of a run, started and loaded."""

    stage: Stage
    feed: ActorHandle
    ranks: dict[str, list[ActorHandle]]  # by role; roles that share GPUs share actors
    fleet: Fleet | Hosts
    padded: bool  # whether a role lays its batches out one sequence a row

    @property
    def policy(self) -> list[ActorHandle]:
        return self.ranks["policy"]

    @property
    def savers(self) -> list[ActorHandle]:
        """Every rank that holds a part of a checkpoint, the policy's first."""
        return list(dict.fromkeys(actor for role in TRAINED for actor in self.ranks.get(role, ())))


def start(config: RunConfig, stage: Stage, reporter: Reporter, roll: Roll) -> tuple[Crew, dict[str, list[str]]]:
    """Every actor, loaded, connected, and proven to sit where the plan says."""
    reporter.update(detail="starting feed, trainer and engines")
    problems, backend = Problems(), ""
    with problems:
        backend = choose(config, stage.device)
    with problems:
        check_engine_args(config)
    with problems:
        check_functions(config)
    feed = RemoteFeed.options(
        max_concurrency=FEED_THREADS, **stage.options(config.placement.trainer_slots[0], 0.0),
    ).remote(config)
    ranks = _roles(config, stage)
    engines = [_engine(config, stage, index) for index in range(len(config.placement.engine_slots))]
    _enrol(roll, config, feed, ranks, engines)
    groups, deadline = list({group[0]: group for group in ranks.values()}.values()), work_seconds(config)
    opening = {
        "Data": [feed.open.remote()], "EngineArguments": [engine.prepare.remote(backend) for engine in engines],
        "Join": [call for group in groups for call in _join(group, deadline)],
    }  # fmt: skip
    all_ranks = [rank for group in groups for rank in group]
    preflight(config, opening, all_ranks, feed, reporter, problems, deadline)
    reporter.update(detail="loading models")
    started = [engine.start.remote(backend) for engine in engines]
    if stage.device == "cuda" and config.placement.mode is PlacementMode.COLOCATED:
        # Sharing a GPU, vLLM measures its free memory while it starts: the trainer takes its own after that.
        gather(started, deadline, "start of engines")
        started = []
    loads = [rank.load.remote() for group in groups for rank in group]
    importlib.import_module("torch")  # for the loop, while nobody waits for the driver
    answers = gather([*loads, *started], deadline, "start")[: len(loads)]
    batchings = [one for answer in answers for one in answer.items()]
    for words in dict.fromkeys(f"{name}: {batching.words}" for name, batching in batchings):
        print(words, flush=True)
    seats = _prove_seats(config, ranks, engines)
    # Rewards deal their batches themselves.
    padded = any(batching.padded for name, batching in batchings if not name.startswith("reward:"))
    crew = Crew(stage, feed, ranks, _fleet(config, stage, ranks["policy"], engines, backend, reporter), padded)
    roll.release(engines)  # the fleet starts them anew
    return crew, seats


def check_functions(config: RunConfig) -> None:
    """The user's own advantage and loss, before anything is started. Raises BadSpec."""
    if config.algorithm.advantage or config.algorithm.loss:
        from rlhf_worker.algorithm import custom  # brings torch

        custom.check(config)


def _enrol(roll: Roll, config: RunConfig, feed: Any, ranks: dict[str, list[Any]], engines: list[Any]) -> None:
    own = config.placement.role_slots
    titles = {
        actor: f"{name if name in own else 'trainer'} rank {rank}"
        for name, group in ranks.items() for rank, actor in enumerate(group)
    }
    titles |= {feed: "feed"} | {engine: f"engine {index}" for index, engine in enumerate(engines)}
    for actor, title in titles.items():
        roll.enrol(actor, title)


def _fleet(
    config: RunConfig, stage: Stage, policy: list[Any], engines: list[Any], backend: str, reporter: Reporter,
) -> Fleet | Hosts:
    if config.rollout.engine == "hf":
        return Hosts(config, policy)

    def spawn(index: int) -> tuple[ActorHandle, Any]:
        engine = _engine(config, stage, index)
        engine.enrol.remote()
        return engine, engine.start.remote(backend)

    sync = WeightSync(config, policy, engines, backend)
    reporter.update(detail=f"connecting the weight sync ({backend})")
    sync.connect()
    slots = max(call_all(engines, "slots", deadline_seconds=work_seconds(config), what="slots of the engines"))
    return Fleet(
        engines, sync, spawn, reporter.engines, least=config.rollout.min_engines, slots=slots,
        start_seconds=work_seconds(config), sleep_seconds=sleep_seconds(config),
    )  # fmt: skip


def _roles(config: RunConfig, stage: Stage) -> dict[str, list[Any]]:
    """The ranks of each role: the trainer's hold every one that has no GPUs of its own."""
    placement = config.placement
    shared = [name for name in config.roles if name not in placement.role_slots]
    trainer = _ranks(config, stage, shared, placement.trainer_slots, ray_share(placement))
    own = {name: _ranks(config, stage, [name], slots, 1.0) for name, slots in placement.role_slots.items()}
    return dict.fromkeys(shared, trainer) | own


def _ranks(config: RunConfig, stage: Stage, names: list[str], slots: list[int], share: float) -> list[Any]:
    threads = stage.threads(slots)
    given = [(config, names, rank, len(slots), stage.device, threads[slot]) for rank, slot in enumerate(slots)]
    return [
        RemotePolicy.options(**stage.options(slot, share)).remote(*one)
        for slot, one in zip(slots, given, strict=True)
    ]


def _engine(config: RunConfig, stage: Stage, index: int) -> ActorHandle:
    """A tensor-parallel engine's actor holds no GPU itself: its workers, which vLLM starts in the engine's bundles, do.
    """
    placement, slots = config.placement, config.placement.engine_slots[index]
    threads = stage.threads([slot for slots in placement.engine_slots for slot in slots])
    bundles = [stage.bundles[slot].index for slot in slots]
    options = stage.options(slots[0], ray_share(placement) if len(slots) == 1 else 0.0)
    return RemoteEngine.options(**options).remote(
        config, index, stage.device, bundles, stage.visible(slots[0]), threads[slots[0]],
    )


def _join(group: list[Any], deadline: float) -> list[Any]:
    address = call(group[0], "address", deadline_seconds=deadline, what="start of the trainer")
    return [rank.join.remote(address) for rank in group]


def _prove_seats(config: RunConfig, roles: dict[str, list[Any]], engines: list[Any]) -> dict[str, list[str]]:
    """Host and GPU of every role, by name. Raises PlacementFailed."""
    own, deadline = ("policy", *config.placement.role_slots), work_seconds(config)
    sat = {name: call_all(roles[name], "seat", deadline_seconds=deadline, what=f"seats of {name}") for name in own}
    trainer = sat.pop("policy")
    ranks = call_all(engines, "seats", deadline_seconds=deadline, what="seats of the engines")
    check_seats(config.placement, trainer, ranks, sat)
    seats = {f"trainer {i}": [str(seat)] for i, seat in enumerate(trainer)}
    seats |= {f"engine {i}": [str(seat) for seat in each] for i, each in enumerate(ranks)}
    seats |= {f"{name} {i}": [str(seat)] for name, each in sat.items() for i, seat in enumerate(each)}
    for name, places in seats.items():
        print(f"{name}: {', '.join(places)}", flush=True)
    return seats


def close(crew: Crew) -> None:
    """Of a run that is done, which nothing here takes back. What does not end dies with the driver's Ray job."""
    for end in (crew.fleet.close, partial(_close_actors, crew), crew.stage.close):
        try:
            end()
        except Exception as error:
            print(f"after the end of the run: {root_cause(error)}", file=sys.stderr, flush=True)


def _close_actors(crew: Crew) -> None:
    actors = {crew.feed, *crew.fleet.serving, *(actor for ranks in crew.ranks.values() for actor in ranks)}
    if left := len(actors) - len(answering(list(actors), "close", deadline_seconds=CLOSE_DEADLINE_SECONDS)):
        print(f"after the end of the run: {left} of {len(actors)} actors did not close", file=sys.stderr, flush=True)
