"""Every actor of a run: started side by side, loaded, connected, and proven to sit where the plan says."""

from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from rlhf_api.run import RunConfig
from rlhf_worker.actors.engine import RemoteEngine
from rlhf_worker.actors.feed import RemoteFeed
from rlhf_worker.actors.group import call, call_all, gather
from rlhf_worker.actors.policy import RemotePolicy
from rlhf_worker.placement import Stage, check_seats
from rlhf_worker.progress import Reporter
from rlhf_worker.weights.backends import choose
from rlhf_worker.weights.sync import WeightSync

START_DEADLINE_SECONDS = 1800.0
CLOSE_DEADLINE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Crew:
    """Every actor of a run, started and loaded."""

    stage: Stage
    feed: ActorHandle
    policy: list[ActorHandle]
    engines: list[ActorHandle]
    sync: WeightSync
    sleeps: bool  # engines give their GPU memory back while the trainer works


def start(config: RunConfig, stage: Stage, reporter: Reporter) -> tuple[Crew, dict[str, list[str]]]:
    """Every actor, loaded, connected, and proven to sit where the plan says."""
    reporter.update(detail="starting feed, trainer and engines")
    backend = choose(config, stage.device, one_node=len({bundle.node for bundle in stage.bundles.values()}) == 1)
    feed = RemoteFeed.options(**stage.options(config.placement.trainer_slots[0], 0.0)).remote(config)
    policy, engines = _policy(config, stage), _engines(config, stage)
    opened = [feed.open.remote(), *(engine.start.remote(backend) for engine in engines)]
    joined = _join(policy)
    if stage.device == "cuda":
        # Sharing a GPU, vLLM measures its free memory while it starts: the trainer takes its own after that.
        gather([*opened, *joined], START_DEADLINE_SECONDS, "start of engines")
        opened, joined = [], []
    gather([*opened, *joined, *(rank.load.remote() for rank in policy)], START_DEADLINE_SECONDS, "start")
    seats = _prove_seats(config, policy, engines)
    sync = WeightSync(config, policy, engines, backend)
    reporter.update(detail=f"connecting the weight sync ({backend})")
    sync.connect()
    sleeps = stage.device == "cuda" and bool(config.rollout.engine_args.get("enable_sleep_mode"))
    return Crew(stage, feed, policy, engines, sync, sleeps), seats


def _policy(config: RunConfig, stage: Stage) -> list[Any]:
    placement = config.placement
    threads = stage.threads(placement.trainer_slots)
    return [
        RemotePolicy.options(**stage.options(slot, placement.trainer_fraction)).remote(config, rank, stage.device, threads[slot])
        for rank, slot in enumerate(placement.trainer_slots)
    ]


def _engines(config: RunConfig, stage: Stage) -> list[Any]:
    """A tensor-parallel engine's actor holds no GPU itself: its workers, which vLLM starts in the engine's bundles, do."""
    placement = config.placement
    threads = stage.threads([slot for slots in placement.engine_slots for slot in slots])
    engines = []
    for index, slots in enumerate(placement.engine_slots):
        bundles = [stage.bundles[slot].index for slot in slots]
        options = stage.options(slots[0], placement.engine_fraction if len(slots) == 1 else 0.0)
        engines.append(RemoteEngine.options(**options).remote(config, index, stage.device, bundles, stage.visible(slots[0]), threads[slots[0]]))
    return engines


def _join(policy: list[Any]) -> list[Any]:
    address = call(policy[0], "address", deadline_seconds=START_DEADLINE_SECONDS, what="start of the trainer")
    return [rank.join.remote(address) for rank in policy]


def _prove_seats(config: RunConfig, policy: list[Any], engines: list[Any]) -> dict[str, list[str]]:
    """Host and GPU of every role, by name. Raises PlacementFailed."""
    trainer = call_all(policy, "seat", deadline_seconds=START_DEADLINE_SECONDS, what="seats of the trainer")
    ranks = call_all(engines, "seats", deadline_seconds=START_DEADLINE_SECONDS, what="seats of the engines")
    check_seats(config.placement, trainer, ranks)
    seats = {f"trainer {i}": [str(seat)] for i, seat in enumerate(trainer)} | {f"engine {i}": [str(s) for s in own] for i, own in enumerate(ranks)}
    for name, places in seats.items():
        print(f"{name}: {', '.join(places)}", flush=True)
    return seats


def close(crew: Crew) -> None:
    """Best effort: whatever is left dies with the driver's Ray job."""
    gather([actor.close.remote() for actor in (crew.feed, *crew.engines, *crew.policy)], CLOSE_DEADLINE_SECONDS, "close")
    crew.stage.close()
