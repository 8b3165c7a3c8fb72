"""What a step's times say: the phase that holds a run back, the knob to turn, idle shares, tokens a second."""

import math
from typing import Any

import pytest

from rlhf_worker.pace import Pace, bottleneck, measured, metrics, speed
from tests.worker.configs import run_config

BUSY = {0: 40.0, 256: 60.0}  # seconds by sequences
TAIL = {0: 40.0, 8: 15.0, 16: 5.0, 256: 40.0}
SECONDS = {"step": 100.0, "generate": 62.0, "score": 2.0, "forward": 5.0, "train": 30.0, "sync": 1.0}


def pace(seconds: dict[str, float] | None = None, **changes: Any) -> Pace:
    given: dict[str, Any] = {
        "tokens": 120_000, "trained": 200_000.0, "micro_batches": 20.0, "flops": 6e15, "peak": 989e12,
        "memory": 96e9, "weights": 3e9,
        "trainer_gpus": 1, "engine_gpus": 1, "colocated": True, "overlaps": False, "loads": [BUSY],
    }
    return Pace(seconds={**SECONDS, **(seconds or {})}, **{**given, **changes})


def long(phase: str, **others: float) -> dict[str, float]:
    """A step of which this phase is most."""
    short = {"generate": 10.0, "score": 0.0, "forward": 5.0, "train": 10.0, "sync": 1.0}
    return {**short, phase: 80.0, **others}


SEPARATE = {"colocated": False, "overlaps": True}
MODEL = [{"name": "r", "type": "model", "model": {"path": "/m"}}]
HELD: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = [
    # changes of the seconds, of the rest, of the spec; the phase, and a part of the words
    ({}, {"loads": [TAIL]}, {}, "generate", "60% of a step: for a third of that time engines had 10 of 256 sequences: "
        "raise rollout.promptsPerStep or rollout.overSampling, or rollout.staleness (Separated), or lower "
        "rollout.maxTokens"),
    ({}, {"loads": [{8: 60.0}]}, {}, "generate", "engines had 8 sequences at most: raise rollout.promptsPerStep"),
    ({}, {}, {"rollout": {"engineArgs": {"enforce_eager": True}}}, "generate",
        "unset rollout.engineArgs.enforce_eager"),
    ({}, {}, {}, "generate", "raise trainer.gpus and rollout.engines together"),
    ({}, {"colocated": False}, {}, "generate", "raise rollout.engines, or rollout.staleness"),
    ({}, {"loads": []}, {}, "generate", "raise trainer.gpus and rollout.engines together"),
    (long("generate", score=70.0), {}, {}, "score", "70% of a step: raise rewards[].workers, or make"),
    (long("generate", score=70.0), {}, {"rewards": MODEL}, "score", "give rewards[].gpus, or make"),
    (long("train"), {"micro_batches": 80.0}, {"trainer": {"steps": 1, "tokensPerMicroBatch": 4096}}, "train",
        "80% of a step: 8% MFU at 2,500 tokens a micro-batch: raise trainer.tokensPerMicroBatch"),
    (long("train"), {"micro_batches": 80.0, "peak": math.nan}, {}, "train",
        "80% of a step: 2,500 tokens a micro-batch, which has room: raise rollout.promptsPerStep"),
    (long("train"), {}, {}, "train", "10,000 tokens a micro-batch: unset trainer.gradientCheckpointing"),
    (long("train"), {}, {"trainer": {"steps": 1, "gradientCheckpointing": False}}, "train", "raise trainer.gpus"),
    (long("train"), {}, {"trainer": {"steps": 1, "gradientCheckpointing": False, "compile": False}}, "train",
        "unset trainer.compile"),
    (long("forward"), {}, {"algorithm": {"name": "grpo", "kl": {"coefficient": 0.1}}}, "forward",
        "set algorithm.kl.coefficient to 0, or reference.gpus; or raise trainer.tokensPerMicroBatch"),
    (long("forward"), {}, {"trainer": {"steps": 1, "updatesPerStep": 2}}, "forward", "lower trainer.updatesPerStep"),
    (long("sync"), {}, {"weightSync": {"verifyEverySteps": 1}}, "sync", "raise weightSync.verifyEverySteps"),
    (long("sync"), {}, {"trainer": {"steps": 1, "offload": True}}, "sync", "unset trainer.offload"),
    (long("sync"), {}, {}, "sync", "the link between trainer and engines"),
    (long("train", train=5.0), {}, {}, "data", "pods.trainer.resources"),
    # while the trainer works, engines do too: a wait of the trainer is theirs, however long it trains
    (long("train", generate=15.0), SEPARATE, {}, "generate", "the trainer waits for 15% of a step: raise rollout.eng"),
    (long("train", generate=15.0), {**SEPARATE, "loads": [{0: 80.0, 64: 20.0}]}, {}, "score", "engines too: raise rew"),
    (long("train", generate=5.0), SEPARATE, {}, "train", "80% of a step"),
    (long("generate", generate=9.0, train=4.0), SEPARATE, {}, "data", "81% of a step"),
]  # fmt: skip


@pytest.mark.parametrize(("seconds", "more", "spec", "phase", "words"), HELD)
def test_one_phase_holds_a_run_back_and_a_field_of_the_spec_helps(
    seconds: dict[str, float], more: dict[str, Any], spec: dict[str, Any], phase: str, words: str
) -> None:
    found, advice = bottleneck(pace(seconds, **more), run_config(**spec))
    assert (found, words in advice) == (phase, True), advice
    assert len(advice) <= 256


@pytest.mark.parametrize(("more", "trainer", "engines"), [
    ({}, 0.05, 0.05),  # they share: 60 s of full engines, 35 of passes
    ({"loads": [TAIL]}, 0.25, 0.25),  # 20 s are a tail
    ({"loads": []}, 0.05, 0.05),  # as far as the phases tell
    ({"colocated": False}, 0.65, 0.40),
    ({"colocated": False, "loads": [BUSY, TAIL]}, 0.65, 0.50),
])  # fmt: skip
def test_who_is_idle(more: dict[str, Any], trainer: float, engines: float) -> None:
    found = metrics(pace(**more))
    assert found["idle/trainer"] == pytest.approx(trainer) and found["idle/engines"] == pytest.approx(engines)


def test_tokens_a_second_and_a_gpu() -> None:
    found = metrics(pace(trainer_gpus=2, engine_gpus=4, loads=[BUSY, TAIL]))
    assert found["rollout/tokens_per_second_per_gpu"] == 500.0
    assert found["train/tokens_per_second_per_gpu"] == pytest.approx(200_000 / 30 / 2)
    assert found["train/tflops_per_gpu"] == pytest.approx(100.0)
    assert found["train/mfu"] == pytest.approx(6e15 / 30 / 989e12)
    assert (found["rollout/sequences_most"], found["rollout/sequences_tail"]) == (512.0, 256.0 + 10.0)


def test_memory_and_engines_are_told() -> None:
    found = metrics(pace(loads=[BUSY, TAIL], trainer_gpus=2))
    assert found["memory/trainer_gib"] == pytest.approx(48e9 / 2**30)
    assert found["engines/answering"] == 2.0


def test_what_is_not_known_is_left_out() -> None:
    """No peak, no FLOPs, no training: the critic alone was trained, on GPUs of its own."""
    assert "train/mfu" not in metrics(pace(peak=math.nan))
    assert "train/tflops_per_gpu" not in metrics(pace(flops=math.nan))
    apart = metrics(pace(memory=math.nan, loads=[]))
    assert not [name for name in apart if name.startswith(("memory/", "engines/"))]
    none = metrics(pace({"train": 0.0}, trained=0.0, micro_batches=0.0, flops=0.0))
    assert not [name for name in none if name.startswith("train/")]


def test_critic_and_policy_of_the_same_ranks_count_together() -> None:
    done = {"done/flops": 1e15, "done/tokens": 100.0, "done/micro_batches": 2.0, "done/peak": 1e15, "done/memory": 5e9,
        "done/weights": 2e9}
    values = {"rollout/tokens_per_second": 10.0, **{f"seconds/{phase}": each for phase, each in SECONDS.items()}}
    values |= done | {f"critic/{name}": value for name, value in done.items()}
    shared, own = (
        measured(run_config(algorithm={"name": "ppo"}, critic=critic), values, [])
        for critic in ({}, {"gpus": 1})
    )
    assert (shared.trained, shared.flops, shared.peak, shared.memory) == (200.0, 2e15, 1e15, 5e9)
    assert shared.weights == 2e9
    assert (own.trained, own.micro_batches) == (100.0, 2.0) and own.mfu == pytest.approx(1 / 30)
    assert shared.tokens == 1000


def test_the_status_gets_few_digits() -> None:
    told = speed(pace(), run_config()).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert told | {"mfu": "0.20", "generateTokensPerGpu": "2000", "trainTokensPerGpu": "6667"} == told
    assert told | {"idleTrainer": "0.05", "idleEngines": "0.05", "bottleneck": "generate"} == told
    assert "mfu" not in speed(pace(peak=math.nan), run_config()).model_dump(exclude_none=True)
