"""Weight sync on GPUs when it does not go well: a receiver that is killed, and a thousand syncs in a row.

usage: python hack/bench/weight_faults.py [--syncs 1000] [--deadline 5]

Two GPUs, Qwen3-0.6B's shape. Prints, as JSON: memory and open files of both ends before and after the syncs, for each
link; and how long the trainer took to give up on an engine that was killed, by what error. """

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.weight_base import local_ray
from hack.bench.weight_sync import Fleet
from hack.bench.weight_sync_actors import memory, open_files

SHAPE = "0.6B"
KILL_AFTER_SECONDS = 0.5
WAYS = {"colocated": "ours, IPC", "separated": "ours, NCCL"}


def hang_and_die(worker: Any) -> None:
    """Runs in vLLM's worker: it does not take part in the next sync, and dies while the trainer waits for it."""
    threading.Timer(KILL_AFTER_SECONDS, os.kill, (os.getpid(), signal.SIGKILL)).start()
    worker.weight_transfer_engine.receive_weights = lambda _: time.sleep(60)


def held(trainer: Any, engine: Any) -> dict[str, Any]:
    ray.get(trainer.settle.remote())
    ours, theirs = ray.get([trainer.memory.remote(), engine.collective.remote(memory)])
    return {
        "trainer": ours | {"files": ray.get(trainer.files.remote())},
        "engine": theirs | {"files": ray.get(engine.collective.remote(open_files))},
    }


def soak(fleet: Fleet, mode: str, count: int) -> dict[str, Any]:
    trainer, engine = fleet.ends(mode, SHAPE, "planned")
    ray.get(trainer.connect.remote(WAYS[mode], engine))
    ray.get(trainer.send.remote(10))
    before = held(trainer, engine)
    seconds = ray.get(trainer.send.remote(count))
    found = {"mode": mode, "syncs": count, "seconds": seconds, "before": before, "after": held(trainer, engine)}
    ray.get(trainer.close.remote())
    return found


def killed(fleet: Fleet, deadline: float) -> dict[str, Any]:
    trainer, engine = fleet.ends("separated", SHAPE, "planned")
    ray.get(trainer.connect.remote(WAYS["separated"], engine, deadline))
    ray.get(trainer.send.remote(1))
    ray.get(engine.collective.remote(hang_and_die))
    began = time.perf_counter()
    try:
        ray.get(trainer.send.remote(1))
        error = "none"
    except Exception as raised:
        error = " ".join(str(raised).split())[-300:]
    return {
        "killed_after": KILL_AFTER_SECONDS, "deadline": deadline, "seconds": time.perf_counter() - began,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=1000)
    parser.add_argument("--deadline", type=float, default=5.0)
    given = parser.parse_args()
    with local_ray():
        fleet = Fleet()
        fleet.start([(mode, SHAPE, "planned") for mode in WAYS])
        for mode in WAYS:
            print(json.dumps(soak(fleet, mode, given.syncs)), flush=True)
        print(json.dumps(killed(fleet, given.deadline)), flush=True)


if __name__ == "__main__":
    from hack.bench import weight_faults  # by its name, so that the actors' processes import it too

    weight_faults.main()
