"""The benchmarks of the worker on a CPU, as small as they get: what changes around them must not leave them behind."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hack.bench import compare, gpu_placement, learning, row, step
from hack.generate import ROOT as CLONE
from hack.tiny_model import write
from rlhf_worker.local import configure

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]


Rows = list[dict[str, Any]]
Smokes = dict[str, Future[Rows]]


def printed(module: str, *arguments: str) -> Rows:
    """Its rows. It ends well only if none of them failed."""
    command = [sys.executable, f"hack/bench/{module}.py", *arguments]
    done = subprocess.run(command, cwd=CLONE, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = list(compare.rows(done.stdout.splitlines()))
    assert {(one["benchmark"], one["card"], one["versions"]["torch"]) for one in rows} == {
        (module, row.card(), row.versions()["torch"])
    }
    return rows


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def smokes(out: Path) -> Iterator[Smokes]:
    """Two at a time: each is a process that starts others, and waits for them a third of its time."""
    write(out / "tiny")  # not `model`: the shoot-out writes its own there
    on_cpu = ("--device", "cpu", "--dtype", "float32")
    few = ("--prompts", "2", "--samples", "2", "--tokens", "8")
    trained = ("training", "--shape", "tiny", "--updates", "3", *on_cpu)
    commands: dict[str, tuple[str, ...]] = {
        "weight_sync": ("weight_sync", "--modes", "cpu", "--shapes", "tiny", "--out", str(out)),
        "weight_faults": ("weight_faults", "--modes", "cpu", "--shape", "tiny", "--syncs", "3"),
        "weight_link": ("weight_link", "--device", "cpu", "--shapes", "tiny"),
        "weight_sharded": ("weight_sharded", "--shape", "tiny-moe", "--dtype", "float32", "--syncs", "2"),
        "shared_gpus": ("shared_gpus", "--gpus", "2", "--shape", "tiny-moe", "--steps", "1", *on_cpu),
        "generation": ("generation", "--shapes", "tiny", *few, "--rounds", "1", *on_cpu),
        "engine_step": ("engine_step", "--sequences", "4", "--tokens", "66"),
        "even": (*trained, "--tokens", "1024", "--length", "512", "--micro-batches", "2", "--lora", "4",
            "--gradient-checkpointing"),
        "varied": (*trained, "--tokens", "256", "--sequences", "16", "--longest", "48", "--vocabulary", "2048",
            "--profile"),
        "mismatch": ("mismatch", "--model", str(out / "tiny"), "--runs", "plain", "nucleus", "--steps", "1",
            "--prompts", "2", *on_cpu, "--most", "1e-4"),
        "shootout": ("shootout", "--rows", "ours", "--shape", "tiny", "--vocabulary", "256", *few, "--steps", "3",
            "--micro-batch", "512", *on_cpu, "--out", str(out)),
        "driver": ("driver", *few, "--prompt-tokens", "4", "--steps", "1", "--engines", "1", "--ranks", "1"),
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(printed, *command) for name, command in commands.items()}


def test_every_way_of_the_weight_sync_is_timed_and_proven(smokes: Smokes, out: Path) -> None:
    made = smokes["weight_sync"].result()
    rows = {row["way"]: row for row in json.loads((out / "weight_sync.json").read_text())}
    assert set(rows) == {"memcpy of the bytes", "packing alone", "ours, shared memory", "ours, gloo"}
    assert [one["configuration"]["way"] for one in made] == list(rows)
    assert all(row["samples"] for row in rows.values())
    assert all(all(rows[way]["equal"]) for way in ("ours, shared memory", "ours, gloo"))


def test_weight_syncs_in_a_row_and_one_whose_engine_is_killed(smokes: Smokes) -> None:
    soaked, killed = smokes["weight_faults"].result()
    assert soaked["more"]["after"]["engine"] == soaked["more"]["before"]["engine"]
    assert "LinkBroken" in killed["more"]["raised"]


def test_copies_of_a_model_are_timed(smokes: Smokes) -> None:
    rows = smokes["weight_link"].result()
    assert {one["configuration"]["variant"] for one in rows} >= {"_foreach_copy_", "loop of copy_"}
    assert all(one["lower"]["link_ms"] > 0 for one in rows)


def test_a_sharded_models_whole_sync_is_timed_and_proven(smokes: Smokes) -> None:
    """Of experts, by two trainer ranks, into an engine of two."""
    (found,) = smokes["weight_sharded"].result()
    told, lower = found["more"], found["lower"]
    assert told["backend"] == "shm" and len(told["seconds"]) == 4 and lower["worst"] >= lower["median"] > 0
    assert told["equal"] > 0 and told["wrong"] == []


def test_pairs_share_their_gpus_and_engines_hold_what_the_trainer_has_zeros_too(smokes: Smokes) -> None:
    """Two trainer ranks, an engine of two."""
    (found,) = smokes["shared_gpus"].result()
    seats, more = found["more"]["seats"], found["more"]
    assert seats["engine 0"] == [*seats["trainer 0"], *seats["trainer 1"]] and len(set(seats["engine 0"])) == 2
    assert more["equal"] == [more["of_zeros"]] != [0] and more["wrong"] == []


def test_generation_is_timed_beside_vllm_s_own(smokes: Smokes) -> None:
    rows = smokes["generation"].result()
    assert [one["configuration"]["row"] for one in rows] == ["vLLM offline", "vLLM offline, log probabilities", "ours"]
    assert all(one["more"]["of_offline"] > 0 and len(one["more"]["rounds"]) == 1 for one in rows)


def test_a_step_of_an_engine_is_timed(smokes: Smokes) -> None:
    """And many tokens go in one message, which no clock is needed for."""
    none, single, merged = (one["lower"] for one in smokes["engine_step"].result())
    assert none["outputs"] == single["outputs"] == 4
    assert merged["outputs"] < 0.5


@pytest.mark.parametrize("batches", ["even", "varied"])
def test_training_steps_are_timed(smokes: Smokes, batches: str) -> None:
    (found,) = smokes[batches].result()
    more, higher = found["more"], found["higher"]
    assert higher["tokens_per_second"] > 0 and more["grad_norm"] > 0 and higher["tflops"] > 0
    assert len(more["seconds"]) == 3 and more["worst_over_median"] == 1.0
    assert min(more["micro_batches"]) >= 2


def test_engine_and_trainer_agree_on_a_token_s_log_probability(smokes: Smokes) -> None:
    """Also where the engine draws from a part of the vocabulary."""
    rows = smokes["mismatch"].result()
    assert [(one["configuration"]["run"], one["more"]["steps"]) for one in rows] == [("plain", 1), ("nucleus", 1)]


@pytest.fixture(scope="module")
def stepped(smokes: Smokes, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of this project in a shoot-out, and what its run told."""
    (found,) = smokes["shootout"].result()
    told: dict[str, Any] = json.loads((out / "step.json").read_text())
    return found, told


def test_a_shoot_out_times_whole_steps(stepped: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found, told = stepped
    assert found["more"]["seconds"] == [one["seconds/step"] for one in told["steps"]]
    assert found["lower"]["median"] > 0 and found["more"]["worst_over_median"] == 1.0, "one step after two"
    assert "train/tflops_per_gpu" in found["more"]["told"]


@pytest.mark.parametrize(("module", "rows"), [
    (step, 1), (learning, len(learning.RUNS)), (gpu_placement, len(gpu_placement.MODES)),
])  # fmt: skip
def test_whole_runs_are_told_of_by_phase(
    module: Any, rows: int, stepped: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """Each manifest is one that this project takes. In place of its run, another one's record, with a proof a step."""
    proof = {"equal": 1, "indirect": 0, "proof/seconds": 0.1}
    told = {**stepped[1], "steps": [proof | one for one in stepped[1]["steps"]]}

    def run(manifest: dict[str, Any], work: Path) -> dict[str, Any]:
        (tmp_path / "job.yaml").write_text(json.dumps(manifest))
        configure(tmp_path / "job.yaml", {})
        return told

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(gpu_placement, "VOCABULARY", 256)
    write(tmp_path / "model")
    given = {
        step: ["--shape", "tiny", "--vocabulary", "256", "--device", "cpu", "--steps", "3"], gpu_placement:
        ["--layers", "1"], learning: ["--model", str(tmp_path / "model")],
    }[module]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *given, "--out", str(tmp_path / "out")])
    assert module.main() == 0
    found = list(compare.rows(capsys.readouterr().out.splitlines()))
    assert len(found) == rows and all(one["lower"]["step"] > 0 for one in found)


def test_the_driver_s_work_a_token_is_measured_by_phase(smokes: Smokes) -> None:
    (found,) = smokes["driver"].result()
    assert found["lower"]["step"] > 0
    assert set(found["lower"]) == {"generate", "forward", "shape", "train", "sync", "rest", "step"}
