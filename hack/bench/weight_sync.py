"""Weight sync, ours and vLLM's, side by side: median and minimum of 20 after 2 warm-ups, and the memory that it takes.

usage: python hack/bench/weight_sync.py [--modes separated colocated cpu] [--shapes 0.6B 4B 8B] [--only TEXT] [--out
  DIR]
       python hack/bench/weight_sync.py --modes cpu --shapes tiny    (does it still run?)

A trainer process holds random bfloat16 tensors of a Qwen3 shape; an engine process is vLLM with dummy weights.
Separated needs two GPUs, colocated one, cpu none (SmolLM2-135M's shape in float32). The engine is held before each
sync, whatever the way. `wall` is the trainer's clock around send_weights(), with all that tells the engine of it,
device idle before and after; `times` is the median over that of the mode's floor, the fastest that the hardware does: a
bare NCCL send, one _foreach_copy_, a memcpy and the packing. Extra memory is what the device has in use after the syncs
over what it had before connecting, without what torch only keeps for later; `record s` is what the engine needs, once,
to plan; `equal` counts the timed syncs after which every parameter's checksum was the trainer's (on a CPU after sending
once more, since what is packed is summed up as it comes). Rows are printed (as Markdown,
and by `row.py`), and written to DIR, as they come. """

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.row import printed
from hack.bench.weight_base import SHAPES, local_ray, on, write_model
from hack.bench.weight_sync_actors import REPEAT, BenchEngine, BenchTrainer, memory, settle
from rlhf_worker.engines.engine import GROUPS

SHAPES_OF = {"cpu": ["135M"]}
START_SECONDS, RUN_SECONDS = 300.0, 240.0
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
COLUMNS = [
    "mode", "shape", "way", "median ms", "min ms", "GB/s", "times", "events min ms", "connect s", "record s",
    "extra MiB trainer", "extra MiB engine", "equal"
]


@dataclass(frozen=True)
class Mode:
    """gpus: what the trainer and the engine see. backends: each is an engine's for life, with the ways (keys of WAYS)
    that it serves.
    """

    gpus: tuple[str, str]
    device: str
    dtype: str
    backends: dict[str, list[str]]
    floor: tuple[str, ...]  # ways whose times add up to what cannot be beaten

    def options(self, end: int) -> dict[str, Any]:
        """Of the trainer's actor (0) or the engine's (1)."""
        return on(self.gpus[end], CPU_ENVIRONMENT if self.device == "cpu" else {})


MODES = {
    "separated": Mode(
        ("0", "1"), "cuda", "bfloat16",
        {"planned": ["bare NCCL send", "ours, NCCL"], "nccl": ["vLLM nccl packed", "one RPC a parameter"]},
        ("bare NCCL send",),
    ),
    "colocated": Mode(
        ("1", "1"), "cuda", "bfloat16",
        {"planned": ["_foreach_copy_ alone", "ours, IPC"], "ipc": ["vLLM ipc as it comes", "vLLM ipc packed"]},
        ("_foreach_copy_ alone",),
    ),
    "cpu": Mode(
        ("", ""), "cpu", "float32",
        {"planned": ["memcpy of the bytes", "packing alone", "ours, shared memory", "ours, gloo"]},
        ("memcpy of the bytes", "packing alone"),
    ),
}


class Fleet:
    """Trainers and engines, all started at once; what a failure has touched is thrown away, and started again when it
    is next needed.
    """

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Path] = {}
        self.trainers: dict[tuple[str, str], Any] = {}  # by mode and shape
        self.engines: dict[tuple[str, str, str], Any] = {}  # by GPU, shape and backend: modes share them

    def start(self, wanted: list[tuple[str, str, str]]) -> None:
        """Of (mode, shape, backend). Raises what the actors raise."""
        calls = []
        for mode, shape, backend in wanted:
            calls += self._trainer(mode, shape) + self._engine(mode, shape, backend)
        ray.get(calls, timeout=START_SECONDS)

    def _trainer(self, name: str, shape: str) -> list[Any]:
        mode = MODES[name]
        if (name, shape) in self.trainers:
            return []
        made = ray.remote(BenchTrainer).options(**mode.options(0)).remote(shape, mode.dtype, mode.device)
        self.trainers[name, shape] = made
        return [made.bytes.remote()]

    def _engine(self, name: str, shape: str, backend: str) -> list[Any]:
        mode = MODES[name]
        if (mode.gpus[1], shape, backend) in self.engines:
            return []
        if (shape, mode.dtype) not in self.models:
            self.models[shape, mode.dtype] = Path(tempfile.mkdtemp(prefix=f"bench-{shape}-"))
            write_model(self.models[shape, mode.dtype], shape, mode.dtype)
        made = ray.remote(concurrency_groups=GROUPS)(BenchEngine).options(**mode.options(1)).remote()
        self.engines[mode.gpus[1], shape, backend] = made
        return [
            made.start.remote(backend, model=str(self.models[shape, mode.dtype]), dtype=mode.dtype, device=mode.device)
        ]

    def ends(self, name: str, shape: str, backend: str) -> tuple[Any, Any]:
        self.start([(name, shape, backend)])
        return self.trainers[name, shape], self.engines[MODES[name].gpus[1], shape, backend]

    def measure(self, name: str, shape: str, backend: str, way: str) -> dict[str, Any]:
        """Raises what the actors raise, GetTimeoutError included."""
        trainer, engine = self.ends(name, shape, backend)

        def memories() -> list[dict[str, float]]:
            """Of what is held; memory that torch only keeps for later is given back first."""
            ray.get([trainer.settle.remote(), engine.collective.remote(settle)], timeout=RUN_SECONDS)
            found: list[dict[str, float]] = ray.get(
                [trainer.memory.remote(), engine.collective.remote(memory)], timeout=RUN_SECONDS,
            )
            return found

        size, held = ray.get(trainer.bytes.remote()), [memories()]
        connected = ray.get(trainer.connect.remote(way, engine), timeout=RUN_SECONDS)
        samples, verdicts = ray.get(trainer.syncs.remote(), timeout=RUN_SECONDS)
        held.append(memories())
        ray.get(trainer.close.remote(), timeout=RUN_SECONDS)
        return {
            **connected, "bytes": size, "samples": [asdict(sample) for sample in samples], "equal": verdicts,
            "memory_mib": dict(zip(["before", "synced"], held, strict=True)),
        }

    def discard(self, name: str, shape: str, backend: str) -> None:
        for actor in (
            self.trainers.pop((name, shape), None), self.engines.pop((MODES[name].gpus[1], shape, backend), None),
        ):
            if actor is not None:
                ray.kill(actor)


def extra_mib(row: dict[str, Any], end: int) -> str:
    """Of the trainer (0) or the engine (1); on one GPU both see the same."""
    before, after = (row["memory_mib"][when][end].get("device") for when in ("before", "synced"))
    return "" if after is None else f"{after - before:.0f}"


def median(row: dict[str, Any]) -> float:
    """Seconds; not a number for a row that failed."""
    return statistics.median(sample["wall"] for sample in row["samples"]) if "samples" in row else float("nan")


def cells(row: dict[str, Any], floor: float) -> list[str]:
    """One row of the table. floor: seconds."""
    head = [row["mode"], row["shape"], row["way"]]
    if "error" in row:
        return [*head, f"failed: {row['error'][-200:]}", *[""] * (len(COLUMNS) - 4)]
    walls, events = ([sample[key] for sample in row["samples"]] for key in ("wall", "event"))
    figures = [
        1e3 * median(row), 1e3 * min(walls), row["bytes"] / min(walls) / 1e9, median(row) / floor, 1e3 * min(events)
    ]
    proven = sum(verdict is True for verdict in row["equal"])
    equal = "" if all(verdict is None for verdict in row["equal"]) else f"{proven} of {len(row['equal'])}"
    seconds = [f"{row[key]:.2f}" if key in row else "" for key in ("connect_seconds", "record_seconds")]
    return [*head, *(f"{figure:.2f}" for figure in figures), *seconds, extra_mib(row, 0), extra_mib(row, 1), equal]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        found = {r["way"]: median(r) for r in rows if (r["mode"], r["shape"]) == (row["mode"], row["shape"])}
        floor = sum(found.get(way, float("nan")) for way in MODES[row["mode"]].floor)
        lines.append("| " + " | ".join(cells(row, floor)) + " |")
    return "\n".join(lines)


class Report:
    """Rows as they come, to the terminal and to DIR."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        (self.out / "weight_sync.json").write_text(json.dumps(self.rows))
        (self.out / "weight_sync.md").write_text(markdown(self.rows) + "\n")
        print(markdown(self.rows).splitlines()[-1], flush=True)
        where = {key: row[key] for key in ("mode", "shape", "way")}
        if "error" in row:
            printed("weight_sync", where, error=row["error"])
            return
        walls = [1e3 * sample["wall"] for sample in row["samples"]]
        printed("weight_sync", where, lower={"median_ms": statistics.median(walls), "min_ms": min(walls)})


def attempt(fleet: Fleet, name: str, shape: str, backend: str, way: str) -> dict[str, Any]:
    """What was measured, or the error."""
    try:
        return fleet.measure(name, shape, backend, way)
    except Exception as error:
        fleet.discard(name, shape, backend)
        return {"error": " ".join(str(error).split()) or repr(error)}


def main() -> int:
    """Exit code 1: a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["separated", "colocated"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="0.6B and 8B; 135M on the CPU")
    parser.add_argument("--only", default="", help="only ways whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(
        tempfile.gettempdir()
    ) / "weight-sync", help="weight_sync.json "
        "and weight_sync.md go here")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    report = Report(given.out)
    print(f"median and minimum of {REPEAT}\n\n" + markdown([]), flush=True)
    wanted = [
        (
            mode, shape, backend, way,
        ) for mode in given.modes for shape in given.shapes or SHAPES_OF.get(mode, ["0.6B", "8B"])
        for backend, ways in MODES[mode].backends.items() for way in ways if given.only in way
    ]
    with local_ray():
        fleet = Fleet()
        fleet.start([(mode, shape, backend) for mode, shape, backend, _ in wanted])
        for mode, shape, backend, way in wanted:
            report.add({"mode": mode, "shape": shape, "way": way, **attempt(fleet, mode, shape, backend, way)})
    print("\n" + markdown(report.rows), flush=True)
    return 1 if any("error" in row for row in report.rows) else 0


if __name__ == "__main__":
    from hack.bench import weight_sync  # by its name, so that the actors' processes import it too

    sys.exit(weight_sync.main())
