"""What is predicted, against what docs/benchmarks.md measured, and the words about what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hack.bench.weight_base import SHAPES
from rlhf_api.job import RLHFJobSpec
from rlhf_api.memory import GIB, keeps_attention, room_tokens, shape_of
from rlhf_api.parse import parse_job
from rlhf_cli.app import app
from rlhf_cli.exits import Exit
from rlhf_cli.model_shape import Shape
from rlhf_cli.predict import (
    COMPILED,
    EAGER,
    GPUS,
    fixes,
    generation,
    micro_batch,
    misfits,
    moments,
    resolved,
    seconds,
)
from tests.api.specs import a_job

H200 = GPUS["h200"]
BENCHMARKS = Path("docs/benchmarks.md").read_text()


def shape(name: str, **changes: Any) -> Shape:
    family, values = SHAPES[name]
    return Shape.of({**values, **changes, "model_type": family.lower()}, name)


def spec(**changes: Any) -> RLHFJobSpec:
    return parse_job(a_job(checkpoint__path="s3://b/r", **changes)).spec


def test_parameters_are_counted_as_the_benchmarks_count_them() -> None:
    assert "596,049,920 parameters" in BENCHMARKS
    assert shape("0.6B").parameters == 596_049_920


@pytest.mark.parametrize("name", ["0.6B", "1.7B", "4B", "8B", "135M"])
def test_parameters_are_those_of_the_library(name: str) -> None:
    from math import prod

    from hack.bench.weight_base import parameters

    assert shape(name).parameters == sum(map(prod, parameters(name).values()))


@pytest.mark.parametrize(
    ("name", "changes", "tokens", "row", "gib"),
    [
        ("1.7B", {"vocab_size": 49152}, 10_240, "at most", 46.8),
        ("4B", {}, 8_192, "101.5 GiB at most", 101.5),
    ],
)
def test_memory_is_within_15_percent_of_what_was_measured(
    name: str, changes: Any, tokens: int, row: str, gib: float,
) -> None:
    assert row in BENCHMARKS
    asked = spec(placement__mode="Separated", data__maxPromptTokens=32,
        trainer={"steps": 1, "tokensPerMicroBatch": tokens, "gradientCheckpointing": False})
    training = next(moments(asked, shape(name, **changes), H200))
    assert training.bytes / GIB == pytest.approx(gib, rel=0.15)


@pytest.mark.parametrize(
    ("name", "changes", "tokens", "headed", "length", "rate", "measured"),
    [
        ("1.7B", {"vocab_size": 49152}, 295_000, 262_232, 384, COMPILED, 5.79),
        ("4B", {}, 32_768, 24_576, 1024, COMPILED, 1.77),
        ("4B", {}, 32_768, 24_576, 1024, EAGER, 2.58),
    ],
)
def test_an_update_is_within_25_percent_of_what_was_measured(
    name: str, changes: Any, tokens: int, headed: int, length: int, rate: float, measured: float,
) -> None:
    assert f"{measured:.2f}" in BENCHMARKS
    found = 3 * shape(name, **changes).forward_flops(tokens, headed, length) / (H200.flops * rate)
    assert found == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    ("changes", "prompts", "row", "measured"),
    [({}, 64, "**40,202**", 64 * 8 * 512 / 40_202), ({"vocab_size": 49152}, 128, "| 13.70 |", 13.70)],
)
def test_generation_is_within_25_percent_of_what_was_measured(
    changes: Any, prompts: int, row: str, measured: float,
) -> None:
    """Prompts of 32 tokens x 8 samples x 512 tokens at 1.7B: an engine alone, and in a whole step."""
    assert row in BENCHMARKS
    asked = spec(placement__mode="Separated", data__maxPromptTokens=32,
        rollout={"promptsPerStep": prompts, "samplesPerPrompt": 8, "maxTokens": 512})
    found = generation(asked, shape("1.7B", **changes), H200, 8 * prompts, 512)
    assert found == pytest.approx(measured, rel=0.25)


def test_what_costs_memory_and_time_does_so() -> None:
    large, base = shape("8B"), spec(trainer__gpus=8, rollout__engines=8)

    def need(**changes: Any) -> int:
        given = {"trainer__gpus": 8, "rollout__engines": 8, "trainer__tokensPerMicroBatch": 32768}
        asked = spec(**given | changes)
        return max(one.bytes for one in moments(asked, large, H200))

    def took(**changes: Any) -> float:
        return seconds(spec(**{"trainer__gpus": 8, "rollout__engines": 8, **changes}), large, H200, 512).step

    assert need(trainer__gradientCheckpointing=False) > need() > need(trainer__offload=True, placement__fractions={
        "trainer": 0.4, "rollout": 0.1})
    assert need(algorithm={"name": "ppo"}) > need(algorithm={"kl": {"coefficient": 0.1}}) > need()
    assert need(model__lora={}) < need()
    shared = {"trainer": 0.4, "rollout": 0.5}
    assert need(placement__fractions=shared) < need(placement__fractions=shared, rollout__sleep=False)
    assert took(rollout__maxTokens=4096) == took()
    assert took(trainer__gradientCheckpointing=False) < took() < took(trainer__compile=False)
    assert took(trainer__epochs=2) > took()
    separated = {"trainer__gpus": 4, "rollout__engines": 4, "placement__mode": "Separated"}
    assert took(**separated, rollout__staleness=1) < took(**separated)
    assert misfits(base, large, H200) == []


@pytest.mark.parametrize("name", ["0.6B", "4B", "30B-A3B"])
def test_the_micro_batch_of_a_run_is_the_one_that_its_ranks_find_room_for(name: str) -> None:
    """By what transformers says of the model there, on a GPU that is free as far as the trainer may fill it."""
    from transformers import AutoConfig

    config, (family, values) = resolved(spec(trainer__gpus=8, rollout__engines=8)), SHAPES[name]
    theirs = shape_of(AutoConfig.for_model(family.lower().replace("moe", "_moe"), **values))
    counts, room = {"policy": shape(name).parameters}, int(config.placement.trainer_fraction * H200.bytes)
    found = room_tokens(config, counts, {"policy": theirs}, 8, room, attention=False)
    assert micro_batch(config, shape(name), H200) == found > 1536


def test_long_attention_is_predicted_as_a_run_keeps_it() -> None:
    long = spec(trainer__gpus=8, rollout__engines=8, rollout__maxTokens=16_384)
    config, small = resolved(long), shape("4B")
    counts, room = {"policy": small.parameters}, int(config.placement.trainer_fraction * H200.bytes)
    asked = config, counts, {"policy": small.of_activations}, 8, room
    assert keeps_attention(*asked)
    found = room_tokens(*asked, attention=True)
    assert micro_batch(config, small, H200) == found < room_tokens(*asked, attention=False)
    anew, kept = (small.activation_bytes(1, recomputed=True, attention=each) for each in (False, True))
    assert kept - anew == 36 * 2 * 32 * 128


def test_a_fix_is_a_change_after_which_it_fits() -> None:
    asked = spec(trainer={"steps": 1, "gradientCheckpointing": False, "tokensPerMicroBatch": 65536})
    small = shape("4B")
    assert "training takes" in misfits(asked, small, H200)[0]
    assert "set trainer.gradientCheckpointing" not in fixes(asked, small, GPUS["a100"])
    lighter = spec(trainer={"steps": 1, "gradientCheckpointing": False, "tokensPerMicroBatch": 32768})
    found = fixes(lighter, shape("1.7B"), H200)
    assert found[0] == "set trainer.gradientCheckpointing"
    assert found[1].startswith("lower trainer.tokensPerMicroBatch to")
    assert fixes(spec(), shape("8B", num_hidden_layers=36), GPUS["l40s"])


def test_copies_on_every_node_are_counted_and_dividing_them_is_a_fix() -> None:
    """Two nodes of four GPUs: a rank holds a quarter of the model, not an eighth."""
    given: dict[str, Any] = {"trainer__gpus": 8, "rollout__engines": 8, "placement__gpusPerNode": 4,
        "placement__fractions": {"trainer": 0.9, "rollout": 0.6}}  # fmt: skip
    full, hybrid = spec(**given), spec(**given, trainer__sharding="Hybrid")
    (whole, half), model = [next(moments(one, shape("8B"), H200)).roles for one in (hybrid, full)], shape("8B")
    assert whole == pytest.approx(2 * half, rel=1e-6)
    assert misfits(hybrid, model, GPUS["l40s"]) and not misfits(full, model, GPUS["l40s"])
    assert "set trainer.sharding to Full" in fixes(hybrid, model, GPUS["l40s"])


def test_an_engine_without_room_for_a_sequence() -> None:
    (words,) = [one for one in misfits(spec(placement__fractions={"trainer": 0.4, "rollout": 0.1}), shape("8B"), H200)
        if "an engine" in one]
    assert "no room for one sequence of 1536 tokens" in words


def config_of(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SHAPES[name][1], "model_type": "qwen3"}))
    return path


def test_a_manifest_is_explained(tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(a_job("maths", trainer__gpus=2, rollout__engines=2)))
    runner = CliRunner()
    bare = runner.invoke(app, ["explain", "-f", str(manifest)])
    assert bare.exit_code == 0, bare.output
    for part in ("maths: grpo, Colocated, 2 GPUs", "trainer: 1 pod of 2 GPUs", "trainer 1 0.90  engine 1 0.78",
        "2 x {GPU: 1, rlhf-trainer: 1}", "give its config.json"):  # fmt: skip
        assert part in bare.stdout, part
    whole = runner.invoke(app, ["explain", "-f", str(manifest), "--config", str(config_of(tmp_path, "0.6B"))])
    assert whole.exit_code == 0, whole.output
    for part in ("0.60 B parameters", "training", "generate", "10 steps are"):
        assert part in whole.stdout, part
    large = ["explain", "-f", str(manifest), "--config", str(config_of(tmp_path, "8B"))]
    tight = runner.invoke(app, [*large, "--gpu", "l40s"])
    assert tight.exit_code == Exit.USAGE
    assert "TOO MUCH" in tight.stdout
    assert "any one of these is enough" in tight.stdout
    facts = json.loads(runner.invoke(app, [*large, "--gpu", "l40s", "-o", "json"]).stdout)
    assert facts["pods"][1] == {"role": "trainer", "pods": 1, "gpusPerPod": 2}
    assert facts["misfits"]
    assert facts["fixes"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "h20"], "did you mean h200?"),
        (["--config", "/absent"], "no config.json of a model"),
        (["--length", "0"], "Invalid value for '--length'"),
    ],
)
def test_what_is_given_wrong(tmp_path: Path, words: list[str], told: str) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(a_job("maths")))
    result = CliRunner().invoke(app, ["explain", "-f", str(manifest), *words])
    assert (result.exit_code, told in result.stderr) == (Exit.USAGE, True), result.output


@pytest.mark.parametrize("text", ["{}", "[]", '{"hidden_size": "many"}', "{"])
def test_a_config_that_is_no_decoders(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(a_job("maths")))
    result = CliRunner().invoke(app, ["explain", "-f", str(tmp_path / "job.yaml"), "--config", str(tmp_path)])
    assert result.exit_code == Exit.USAGE
    assert str(tmp_path / "config.json") in result.stderr
