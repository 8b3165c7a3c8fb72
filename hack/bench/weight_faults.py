"""Weight sync on GPUs when it does not go well: a receiver that is killed, and a thousand syncs in a row.

usage: python hack/bench/weight_faults.py [--syncs 1000] [--deadline 5] [--modes MODE ...] [--shape 0.6B]

Modes colocated and separated are of two GPUs, cpu of none. Prints rows (`row.py`): memory and open files of both ends
before and after the syncs, for each link; and how long the trainer took to give up on an engine that was killed, by
what error. """

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.row import printed
from hack.bench.weight_base import SHAPES, local_ray
from hack.bench.weight_sync import Fleet
from hack.bench.weight_sync_actors import memory, open_files

KILL_AFTER_SECONDS = 0.5
WAYS = {"colocated": "ours, IPC", "separated": "ours, NCCL", "cpu": "ours, shared memory"}
LINKED = {"separated": "ours, NCCL", "cpu": "ours, gloo"}  # where both ends wait for each other


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


def soak(fleet: Fleet, mode: str, shape: str, count: int) -> None:
    trainer, engine = fleet.ends(mode, shape, "planned")
    ray.get(trainer.connect.remote(WAYS[mode], engine))
    ray.get(trainer.send.remote(10))
    before = held(trainer, engine)
    seconds = ray.get(trainer.send.remote(count))
    printed(
        "weight_faults", {"mode": mode, "shape": shape, "syncs": count}, lower={"seconds": seconds}, before=before,
        after=held(trainer, engine),
    )  # fmt: skip
    ray.get(trainer.close.remote())


def killed(fleet: Fleet, mode: str, shape: str, deadline: float) -> None:
    trainer, engine = fleet.ends(mode, shape, "planned")
    ray.get(trainer.connect.remote(LINKED[mode], engine, deadline))
    ray.get(trainer.send.remote(1))
    ray.get(engine.collective.remote(hang_and_die))
    began = time.perf_counter()
    try:
        ray.get(trainer.send.remote(1))
        error = "none"
    except Exception as raised:
        error = " ".join(str(raised).split())[-300:]
    printed(
        "weight_faults", {"mode": mode, "shape": shape, "killed_after": KILL_AFTER_SECONDS, "deadline": deadline},
        lower={"seconds": time.perf_counter() - began}, raised=error,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=1000)
    parser.add_argument("--deadline", type=float, default=5.0)
    parser.add_argument("--modes", nargs="+", default=["colocated", "separated"], choices=list(WAYS))
    parser.add_argument("--shape", default="0.6B", choices=list(SHAPES))
    given = parser.parse_args()
    with local_ray():
        fleet = Fleet()
        fleet.start([(mode, given.shape, "planned") for mode in given.modes])
        for mode in given.modes:
            soak(fleet, mode, given.shape, given.syncs)
        for mode in LINKED.keys() & set(given.modes):
            killed(fleet, mode, given.shape, given.deadline)


if __name__ == "__main__":
    from hack.bench import weight_faults  # by its name, so that the actors' processes import it too

    weight_faults.main()
