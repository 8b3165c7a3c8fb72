"""The benchmarks of the worker on a CPU, as small as they get: what changes around them must not leave them behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hack.generate import ROOT as CLONE
from hack.tiny_model import write

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]


def printed(module: str, *arguments: str) -> str:
    """What it prints. It ends well only if no row of it failed."""
    command = [sys.executable, f"hack/bench/{module}.py", *arguments]
    done = subprocess.run(command, cwd=CLONE, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_way_of_the_weight_sync_is_timed_and_proven(tmp_path: Path) -> None:
    printed("weight_sync", "--modes", "cpu", "--shapes", "tiny", "--out", str(tmp_path))
    rows = {row["way"]: row for row in json.loads((tmp_path / "weight_sync.json").read_text())}
    assert set(rows) == {"memcpy of the bytes", "packing alone", "ours, shared memory", "ours, gloo"}
    assert all(row["samples"] for row in rows.values())
    assert all(all(rows[way]["equal"]) for way in ("ours, shared memory", "ours, gloo"))


def test_a_sharded_models_whole_sync_is_timed_and_proven() -> None:
    """Of experts, by two trainer ranks, into an engine of two."""
    found = json.loads(printed("weight_sharded", "--shape", "tiny-moe", "--dtype", "float32", "--syncs", "2")
                       .splitlines()[-1])  # fmt: skip
    assert found["backend"] == "shm" and len(found["seconds"]) == 4 and found["worst"] >= found["median"] > 0
    assert found["equal"] > 0 and found["wrong"] == []


def test_generation_is_timed_beside_vllm_s_own() -> None:
    small = ("--prompts", "2", "--samples", "2", "--tokens", "8", "--rounds", "1", "--device", "cpu")
    lines = printed("generation", "--shapes", "tiny", "--dtype", "float32", *small).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["row"] for row in rows] == ["vLLM offline", "vLLM offline, log probabilities", "ours"]
    assert all(row["of_offline"] > 0 and len(row["rounds"]) == 1 for row in rows)


def test_a_step_of_an_engine_is_timed() -> None:
    """And many tokens go in one message, which no clock is needed for."""
    lines = printed("engine_step", "--sequences", "4", "--tokens", "66").splitlines()
    none, single, merged = (json.loads(line) for line in lines if line.startswith("{"))
    assert none["outputs"] == single["outputs"] == 4
    assert merged["outputs"] < 0.5


def test_training_steps_are_timed() -> None:
    small = ("--shape", "tiny", "--updates", "3", "--device", "cpu", "--dtype", "float32")
    even = ("--tokens", "1024", "--micro-batches", "2")
    varied = ("--tokens", "256", "--sequences", "16", "--longest", "48", "--vocabulary", "2048", "--profile")
    for arguments in (even, varied):
        found = json.loads(printed("training", *small, *arguments).splitlines()[-1])
        assert found["tokens_per_second"] > 0 and found["grad_norm"] > 0 and found["utilisation"] > 0
        assert len(found["seconds"]) == 3 and found["worst_over_median"] == 1.0
        assert min(found["micro_batches"]) >= 2


def test_engine_and_trainer_agree_on_a_token_s_log_probability(tmp_path: Path) -> None:
    """Also where the engine draws from a part of the vocabulary."""
    write(tmp_path / "model")
    small = ("--steps", "1", "--prompts", "2", "--device", "cpu", "--dtype", "float32", "--most", "1e-4")
    lines = printed("mismatch", "--model", str(tmp_path / "model"), "--runs", "plain", "nucleus", *small).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(row["run"], row["steps"]) for row in rows] == [("plain", 1), ("nucleus", 1)]


def test_a_whole_step_is_timed_by_phase(tmp_path: Path) -> None:
    sizes = ("--vocabulary", "256", "--prompts", "2", "--samples", "2", "--tokens", "8", "--steps", "3")
    small = (*sizes, "--micro-batch", "512", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path))
    found = json.loads(printed("step", "--shape", "tiny", *small).splitlines()[-1])
    assert [len(values) for values in found["seconds"].values()] == [3] * 5
    assert found["worst_over_median"] == 1.0, "one step after two"
    assert found["median"]["step"] >= found["median"]["generate"] > 0


def test_the_driver_s_work_a_token_is_measured_by_phase() -> None:
    small = ("--prompts", "2", "--samples", "2", "--tokens", "8", "--prompt-tokens", "4", "--steps", "1")
    found = json.loads(printed("driver", *small, "--engines", "1", "--ranks", "1").splitlines()[-1])
    assert found["tokens"] == 32 and found["us_a_token"]["step"] > 0
    assert set(found["us_a_token"]) == {"generate", "forward", "shape", "train", "sync", "rest", "step"}
