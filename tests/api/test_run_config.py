"""Run configs across versions: today's code reads those of an older operator, and an older image reads today's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rlhf_api.parse import parse_job
from rlhf_api.run import VERSION, RunConfig, resolve
from tests.api.specs import EVALUATION, JUDGE, MODEL, a_job

Raw = dict[str, Any]
OLD = yaml.safe_load((Path(__file__).parent / "run_config_e56ccc6.yaml").read_text())
FREE = ("data.reasoningGym.config", "rollout.engineArgs", "placement.roleSlots")
JOBS: dict[str, Raw] = {
    "minimal": a_job(placement__fractions={"trainer": 0.4, "rollout": 0.4}),  # the operator's default at that time
    "much": a_job(
        model={"path": "/m", "dtype": "float32", "lora": {"rank": 8, "targetModules": ["q_proj"]}},
        algorithm={"name": "ppo", "kl": {"coefficient": 0.1, "target": 0.2}, "clipLow": 0.1},
        data={"reasoningGym": {"task": "basic_arithmetic", "config": {"min_terms": 2}}, "seed": 5},
        critic={"warmupSteps": 3, "gpus": 2}, reference={}, rewards=[JUDGE, {**MODEL, "weight": 0.5}],
        evaluation=[{**EVALUATION, "samples": 2, "temperature": 0.5}],
        placement={"mode": "Separated", "gpusPerNode": 4},
        rollout={"engines": 4, "staleness": 1, "environment": {"function": "m:E"},
                 "engineArgs": {"max_model_len": 64, "quantization": None}},
        trainer={"steps": 7, "gpus": 2, "learningRate": 0.0001}, checkpoint={"path": "s3://bucket/run", "keep": 2},
        telemetry={"wandb": {"project": "p"}, "tensorboard": False},
    ),
}  # fmt: skip


def dumped(raw: Raw) -> Raw:
    loaded: Raw = yaml.safe_load(resolve(parse_job(raw)).dump())
    return loaded


def fields(node: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """(path, its keys) of every object that is no free one."""
    if isinstance(node, dict) and path not in FREE:
        yield path, set(node)
        for name, child in node.items():
            yield from fields(child, f"{path}.{name}".lstrip("."))
    for item in node if isinstance(node, list) else ():
        yield from fields(item, f"{path}[]")


def unreadable(config: Raw) -> list[str]:
    """What e56ccc6's closed models would have refused: fields they do not know, and fields they miss."""
    known, required = set(OLD["fields"]), set(OLD["required"])
    found = [
        (path, keys, {one.removeprefix(f"{path}.") for one in required if one.rpartition(".")[0] == path})
        for path, keys in fields(config)
    ]
    extra = [
        f"{path}.{key}".lstrip(".") for path, keys,
        _ in found for key in keys if f"{path}.{key}".lstrip(".") not in known
    ]
    return extra + [f"{path}: {missing}" for path, keys, needed in found if (missing := needed - keys)]


@pytest.mark.parametrize("name", JOBS)
def test_an_older_operators_config_means_what_it_meant(name: str) -> None:
    """Every default is written out in the old one: this fails when a default was changed that decides more than speed.
    """
    old = RunConfig.model_validate(OLD["dumps"][name])
    assert old.trainer.compile is False, "written out, it is obeyed"
    wanted = resolve(parse_job(JOBS[name]))
    speed = {"compile": False, "tokens_per_micro_batch": 8192}
    assert old == wanted.model_copy(update={"trainer": wanted.trainer.model_copy(update=speed)})


@pytest.mark.parametrize("name", JOBS)
def test_an_older_image_reads_todays_config(name: str) -> None:
    assert unreadable(OLD["dumps"][name]) == []
    assert unreadable(dumped(JOBS[name])) == []


def test_what_an_older_image_cannot_read_would_be_found() -> None:
    config = dumped(JOBS["much"])
    config["rollout"]["engines2"], config["evaluation"][0]["x"] = 1, 1
    del config["trainer"], config["rewards"][1]["name"]
    assert sorted(unreadable(config)) == [": {'trainer'}", "evaluation[].x", "rewards[]: {'name'}", "rollout.engines2"]


def test_options_of_the_operator_alone_are_not_told_to_the_image() -> None:
    assert dumped(
        a_job(checkpoint={"claim": {"size": "1Gi"}})
    ) == dumped(a_job(checkpoint={"ephemeral": True})) == dumped(a_job())


def test_defaults_are_left_out_and_what_has_none_is_whole() -> None:
    config = dumped(a_job(trainer__seed=0, algorithm__clipLow=0.2))
    assert (config["trainer"], config["weightSync"], config["telemetry"]) == ({"steps": 10}, {}, {})
    assert (config["algorithm"]["clipLow"], config["placement"]["engineFraction"]) == (0.2, 0.78)


@pytest.mark.parametrize(("changes", "version"), [
    ({}, 2), ({"placement__fractions": {"trainer": 0.6, "rollout": 0.5}}, 2),
    ({"placement__fractions": {"trainer": 0.5, "rollout": 0.5}}, 1), ({"rollout__engine": "hf"}, 1),
    ({"placement__mode": "Separated"}, 1),
])  # fmt: skip
def test_shares_that_only_take_turns_are_told_to_no_image_that_would_ask_for_both_at_once(
    changes: Raw, version: int
) -> None:
    config = dumped(a_job(**changes))
    assert config.get("version", 1) == version
    assert unreadable(config) == (["version"] if version > 1 else []), "which every older image refuses"
    assert RunConfig.model_validate(config).version == version


@pytest.mark.parametrize(("changes", "device", "sleep", "budget"), [
    ({}, "cuda", True, None), ({}, "cpu", False, 8192), ({"placement__mode": "Separated"}, "cuda", False, None),
    ({"rollout__engine": "hf"}, "cuda", False, None), ({"trainer__tokensPerMicroBatch": 7}, "cuda", True, 7),
    ({"trainer__tokensPerMicroBatch": 7, "rollout__sleep": True}, "cpu", True, 7),  # the worker refuses it
    ({"rollout__sleep": False, "placement__fractions": {"trainer": 0.5, "rollout": 0.4}}, "cuda", False, None),
])  # fmt: skip
def test_what_is_left_open_follows_from_the_device(changes: Raw, device: str, sleep: bool, budget: int | None) -> None:
    open_ = resolve(parse_job(a_job(**changes)))
    config = open_.on(device)
    assert (config.engines_sleep, config.trainer.tokens_per_micro_batch) == (sleep, budget)
    assert config.on("cpu" if device == "cuda" else "cuda").engines_sleep == sleep, "once"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": VERSION + 1}, f"newer operator (version {VERSION + 1}, the image knows {VERSION}): use a newer "
            "spec.image"),
        ({"version": 9, "fleet": {}}, f"newer operator (it sets fleet; version 9, the image knows {VERSION})"),
        ({"trainer": {"steps": 1, "zeal": 1}}, "newer operator (it sets trainer.zeal; version 2, the image knows "
            f"{VERSION})"),
    ],
)
def test_a_newer_operators_config_is_refused_in_words(changes: Raw, words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        RunConfig.model_validate({**dumped(a_job()), **changes})


def test_other_faults_keep_their_own_words() -> None:
    with pytest.raises(ValidationError, match=r"trainer\.steps"):
        RunConfig.model_validate({**dumped(a_job()), "trainer": {"steps": 0}})
