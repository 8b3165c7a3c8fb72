"""Weight sync, ours and vLLM's, side by side: median and minimum of 20 after 2 warm-ups, and the memory that it takes.

usage: python hack/bench/weight_sync.py [--modes separated colocated cpu] [--shapes 0.6B 4B 8B] [--only TEXT] [--out DIR]

A trainer process holds random bfloat16 tensors of a Qwen3 shape; an engine process is vLLM with dummy weights. Separated needs two
GPUs, colocated one, cpu none (SmolLM2-135M's shape in float32). `wall` is the trainer's clock around send_weights(), device idle
before and after; `times` is the median over that of the mode's floor, the fastest that the hardware does: a bare NCCL send, one
_foreach_copy_, a memcpy and the packing. Extra memory is what the device has in use after the syncs over what it had before
connecting; `record s` is what the engine needs, once, to plan; `equal` counts the timed syncs after which every parameter's checksum was
the trainer's (on a CPU after sending once more, since what is packed is summed up as it comes). Rows are printed, and written to DIR, as they come.
"""

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

from hack.bench.weight_base import SHAPES, local_ray, on, write_model
from hack.bench.weight_sync_actors import REPEAT, BenchEngine, BenchTrainer, memory, settle

START_SECONDS, RUN_SECONDS = 300.0, 240.0
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
COLUMNS = ["mode", "shape", "way", "median ms", "min ms", "GB/s", "times", "events min ms", "connect s", "record s", "extra MiB trainer", "extra MiB engine", "equal"]


@dataclass(frozen=True)
class Mode:
    """gpus: what the trainer and the engine see. backends: each is an engine's for life, with the ways (keys of WAYS) that it serves."""

    gpus: tuple[str, str]
    device: str
    dtype: str
    backends: dict[str, list[str]]
    floor: tuple[str, ...]  # ways whose times add up to what cannot be beaten

    @property
    def shares(self) -> bool:
        return self.device == "cuda" and self.gpus[0] == self.gpus[1]


MODES = {
    "separated": Mode(
        ("0", "1"), "cuda", "bfloat16", {"nccl": ["bare NCCL send", "vLLM nccl packed", "one RPC a parameter"], "planned": ["ours, NCCL"]},
        ("bare NCCL send",),
    ),
    "colocated": Mode(
        ("0", "0"), "cuda", "bfloat16", {"ipc": ["_foreach_copy_ alone", "vLLM ipc as it comes", "vLLM ipc packed"], "planned": ["ours, IPC"]},
        ("_foreach_copy_ alone",),
    ),
    "cpu": Mode(
        ("", ""), "cpu", "float32", {"planned": ["memcpy of the bytes", "packing alone", "ours, shared memory", "ours, gloo"]}, ("memcpy of the bytes", "packing alone"),
    ),
}


class Ends:
    """A trainer and an engine with one backend, started when first needed and thrown away after a failure."""

    def __init__(self, mode: Mode, shape: str, backend: str, model: Path) -> None:
        self.mode, self.shape, self.backend, self.model = mode, shape, backend, model
        self.trainer: Any = None
        self.engine: Any = None

    def start(self) -> None:
        """Raises what the actors raise."""
        if self.trainer is not None:
            return
        environment = CPU_ENVIRONMENT if self.mode.device == "cpu" else {}
        gpus = [on(gpu, environment) for gpu in self.mode.gpus]
        self.trainer = ray.remote(BenchTrainer).options(**gpus[0]).remote(self.shape, self.mode.dtype, self.mode.device)
        if self.mode.shares:  # vLLM measures the GPU while it starts, so nobody else may grow then
            ray.get(self.trainer.bytes.remote(), timeout=START_SECONDS)
        self.engine = ray.remote(BenchEngine).options(**gpus[1]).remote()
        started = self.engine.start.remote(self.backend, model=str(self.model), dtype=self.mode.dtype, device=self.mode.device)
        ray.get([started, self.trainer.bytes.remote()], timeout=START_SECONDS)

    def memory(self) -> list[dict[str, float]]:
        found: list[dict[str, float]] = ray.get([self.trainer.memory.remote(), self.engine.collective.remote(memory)], timeout=RUN_SECONDS)
        return found

    def measure(self, way: str) -> dict[str, Any]:
        """Raises what the actors raise, GetTimeoutError included."""
        size, held = ray.get(self.trainer.bytes.remote()), [self.memory()]
        connected = ray.get(self.trainer.connect.remote(way, self.engine), timeout=RUN_SECONDS)
        held.append(self.memory())
        samples, verdicts = ray.get(self.trainer.syncs.remote(), timeout=RUN_SECONDS)
        held.append(self.memory())
        ray.get(self.trainer.close.remote(), timeout=RUN_SECONDS)
        ray.get(self.engine.collective.remote(settle), timeout=RUN_SECONDS)
        return {
            **connected, "bytes": size, "samples": [asdict(sample) for sample in samples], "equal": verdicts,
            "memory_mib": dict(zip(["before", "connected", "synced"], held, strict=True)),
        }

    def close(self) -> None:
        if self.engine is not None:
            try:
                ray.get(self.engine.close.remote(), timeout=30)
            except Exception as error:  # it is thrown away in any case
                print(f"closing the engine: {error!r}", file=sys.stderr, flush=True)
        for actor in filter(None, [self.trainer, self.engine]):
            ray.kill(actor)
        self.trainer = self.engine = None


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
    figures = [1e3 * median(row), 1e3 * min(walls), row["bytes"] / min(walls) / 1e9, median(row) / floor, 1e3 * min(events)]
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


def measure(name: str, shape: str, only: str, report: Report) -> None:
    """Every way of one mode with one shape. A way that fails is reported, and the next one gets processes of its own."""
    mode = MODES[name]
    model = Path(tempfile.mkdtemp(prefix=f"bench-{shape}-"))
    write_model(model, shape, mode.dtype)
    for backend, ways in mode.backends.items():
        ends = Ends(mode, shape, backend, model)
        wanted = [way for way in ways if only in way]
        for index, way in enumerate(wanted):
            found, started = attempt(ends, way)
            report.add({"mode": name, "shape": shape, "way": way, **found})
            if not started:
                for left in wanted[index + 1 :]:
                    report.add({"mode": name, "shape": shape, "way": left, "error": "as above"})
                break
        ends.close()


def attempt(ends: Ends, way: str) -> tuple[dict[str, Any], bool]:
    """What was measured, or the error; and whether both ends had started."""
    started = False
    try:
        ends.start()
        started = True
        return ends.measure(way), started
    except Exception as error:
        ends.close()
        return {"error": " ".join(str(error).split()) or repr(error)}, started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["separated", "colocated"])
    parser.add_argument("--shapes", nargs="+", choices=[shape for shape in SHAPES if shape != "135M"], default=["0.6B", "8B"], help="of the GPU modes")
    parser.add_argument("--only", default="", help="only ways whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "weight-sync", help="weight_sync.json and weight_sync.md go here")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    report = Report(given.out)
    print(f"median and minimum of {REPEAT}\n\n" + markdown([]), flush=True)
    with local_ray():
        for mode in given.modes:
            for shape in ["135M"] if mode == "cpu" else given.shapes:
                measure(mode, shape, given.only, report)
    print("\n" + markdown(report.rows), flush=True)


if __name__ == "__main__":
    from hack.bench import weight_sync  # by its name, so that the actors' processes import it too

    weight_sync.main()
