"""Is this speed normal? What a step's times say of its GPUs, which phase holds the run back, and what to change. Pure.

Phases are shares of a step: `generate` without its scoring, `score`, `forward`, `train`, `sync`, and `data`, which is
all of the driver's own: prompts, advantages, packing, reports.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rlhf_api.job import PlacementMode
from rlhf_api.memory import GIB
from rlhf_api.progress import Speed
from rlhf_api.run import RunConfig

SECONDS = "seconds/"
DONE = "done/"  # before the names of what ranks tell of their work
FEW = 0.25  # of an engine's most sequences: with fewer its GPU is idle
TAIL = 1 / 3  # of the time in which an engine generates
WAITS = 0.1  # of a step: a trainer that waits for more than this is held back by its samples
FULL_BATCH = 8192  # tokens of a micro-batch from which on a GPU is busy with its products
FULL_ENGINE = 64  # sequences from which on an engine's step costs more than reading the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What was measured of one step.

    `seconds`: by phase, and of `step`; `generate` contains `score`. `loads`: of each engine that answers the seconds by
    number of sequences under way; none where that is not known. `tokens`: generated. `flops`, `trained` (tokens,
    prompts and each epoch among them) and `micro_batches` are of all ranks; so are `peak` and `memory` (bytes, of each
    rank the most at a time), NaN where a device is not known. `weights`: bytes that a sync brings to an engine, 0 where
    none does.
    """

    seconds: Mapping[str, float]
    tokens: float
    trained: float
    micro_batches: float
    flops: float
    peak: float
    memory: float
    weights: float
    trainer_gpus: int
    engine_gpus: int
    colocated: bool
    overlaps: bool  # generation goes on while the trainer works
    loads: Sequence[Mapping[int, float]] = field(default=())

    def of(self, phase: str) -> float:
        return self.seconds.get(phase, 0.0)

    @property
    def generating(self) -> float:
        """Seconds in which an engine has anything to do."""
        busy = [sum(seconds for running, seconds in load.items() if running) for load in self.loads]
        return fmean(busy) if busy else max(0.0, self.of("generate") - self.of("score"))

    @property
    def thinnest(self) -> tuple[float, int]:
        """Sequences of all engines: the mean of the third of their time with the fewest, and the most."""
        return sum(map(_thinnest, self.loads)), sum(max(load, default=0) for load in self.loads)

    @property
    def mfu(self) -> float:
        """Of the training phase; NaN where no peak is known."""
        return self.flops / (self.of("train") * self.peak) if self.of("train") else math.nan


def of_ranks(name: str) -> bool:
    """Whether a metric is what ranks tell of their work, which is none of telemetry's."""
    return name.removeprefix("critic/").startswith(DONE)


def measured(config: RunConfig, values: Mapping[str, float], loads: Sequence[Mapping[int, float]]) -> Pace:
    """values: metrics of the step. What critic and policy do on the same ranks counts together."""
    own = [""] if "critic" in config.placement.role_slots else ["", "critic/"]
    done = {
        name: sum(values.get(f"{role}{DONE}{name}", 0.0) for role in own)
        for name in ("flops", "tokens", "micro_batches")
    }
    peaks, memory = (
        [value for role in own if (value := values.get(f"{role}{DONE}{name}")) is not None]
        for name in ("peak", "memory")
    )
    weights = values.get(f"{DONE}weights", 0.0) if config.rollout.engine == "vllm" else 0.0
    gpus = len(config.placement.trainer_slots)
    return Pace(
        seconds={name.removeprefix(SECONDS): value for name, value in values.items() if name.startswith(SECONDS)},
        tokens=values["rollout/tokens_per_second"] * values["seconds/step"], trained=done["tokens"],
        micro_batches=done["micro_batches"], flops=done["flops"], peak=peaks[0] if peaks else math.nan,
        memory=max(memory, default=math.nan), weights=weights,
        trainer_gpus=gpus, engine_gpus=sum(map(len, config.placement.engine_slots)) or gpus, loads=loads,
        colocated=config.placement.mode is PlacementMode.COLOCATED, overlaps=config.rollout.staleness > 0,
    )  # fmt: skip


def metrics(pace: Pace) -> dict[str, float]:
    """By their names in telemetry."""
    idle, (low, most), train = _idle(pace), pace.thinnest, pace.of("train")
    found = {"idle/trainer": idle[0], "idle/engines": idle[1]}
    found["memory/trainer_gib"] = pace.memory / pace.trainer_gpus / GIB
    if pace.generating:
        found["rollout/tokens_per_second_per_gpu"] = pace.tokens / pace.generating / pace.engine_gpus
    if pace.loads:
        found |= {
            "engines/answering": float(len(pace.loads)), "rollout/sequences_most": float(most),
            "rollout/sequences_tail": low,
        }
    if train and pace.trained:
        found["train/tokens_per_second_per_gpu"] = pace.trained / train / pace.trainer_gpus
        found["train/tflops_per_gpu"] = pace.flops / train / pace.trainer_gpus / 1e12
        found["train/mfu"] = pace.mfu
    return {name: value for name, value in found.items() if math.isfinite(value)}


def speed(pace: Pace, config: RunConfig) -> Speed:
    """The same for the status: numbers for people, with few digits."""
    values = metrics(pace)

    def told(name: str, digits: int) -> str | None:
        return f"{values[name]:.{digits}f}" if name in values else None

    phase, advice = bottleneck(pace, config)
    return Speed(
        mfu=told("train/mfu", 2),
        generate_tokens_per_gpu=told("rollout/tokens_per_second_per_gpu", 0),
        train_tokens_per_gpu=told("train/tokens_per_second_per_gpu", 0), idle_trainer=told("idle/trainer", 2),
        idle_engines=told("idle/engines", 2), bottleneck=phase, advice=advice,
    )  # fmt: skip


def _thinnest(load: Mapping[int, float]) -> float:
    """Mean number of sequences in the TAIL of the generating time of one engine with the fewest."""
    busy = sorted((running, seconds) for running, seconds in load.items() if running)
    left = whole = TAIL * sum(seconds for _, seconds in busy)
    area = 0.0
    for running, seconds in busy:
        area, left = area + running * min(left, seconds), max(0.0, left - seconds)
    return area / whole if whole else 0.0


def _idle(pace: Pace) -> tuple[float, float]:
    """Of the step, the share in which the trainer's GPUs, and the engines', had no pass to make, or less than FEW of an
    engine's most sequences. Those that are shared are idle where they serve neither.
    """
    step, passes = pace.of("step"), pace.of("forward") + pace.of("train")
    full = [
        sum(seconds for running, seconds in load.items() if running and running >= FEW * max(load))
        for load in pace.loads
    ]
    engines = fmean(full) if full else pace.generating
    both = passes + engines
    busy = (both, both) if pace.colocated else (passes, engines)
    return tuple(min(1.0, max(0.0, 1 - each / step)) if step else 0.0 for each in busy)  # type: ignore[return-value]


def shares(pace: Pace) -> dict[str, float]:
    """Of each phase, of the step."""
    score = min(pace.of("score"), pace.of("generate"))
    given = {"generate": pace.of("generate") - score, "score": score}
    given |= {phase: pace.of(phase) for phase in ("forward", "train", "sync")}
    given["data"] = max(0.0, pace.of("step") - sum(given.values()))
    return {phase: seconds / pace.of("step") for phase, seconds in given.items()}


def bottleneck(pace: Pace, config: RunConfig) -> tuple[str, str]:
    """The phase that holds the run back, and a sentence that names what to change."""
    share = shares(pace)
    if pace.overlaps:
        waits = share["generate"] + share["score"]
        if waits < WAITS:  # what is left of it costs nothing that more engines would give back
            share |= {"generate": 0.0, "score": 0.0}
        elif _idle(pace)[1] < 0.5:
            return "generate", f"generate: the trainer waits for {waits:.0%} of a step: {_generate(pace, config)}"
        else:
            return "score", f"score: the trainer waits for {waits:.0%} of a step, engines too: {_score(pace, config)}"
    phase = max(share, key=lambda name: share[name])
    return phase, f"{phase}: {share[phase]:.0%} of a step: {KNOBS[phase](pace, config)}"


def _generate(pace: Pace, config: RunConfig) -> str:
    low, most = pace.thinnest
    overlap = "" if pace.overlaps else ", or rollout.staleness (Separated)"
    if most and low < FEW * most:
        few = f"for a third of that time engines had {low:.0f} of {most} sequences"
        more = "" if pace.overlaps or config.rollout.environment else " or rollout.overSampling"
        return f"{few}: raise rollout.promptsPerStep{more}{overlap}, or lower rollout.maxTokens"
    if config.rollout.engine_args.get("enforce_eager"):
        return "unset rollout.engineArgs.enforce_eager"
    if most and most < FULL_ENGINE * len(pace.loads):
        return f"engines had {most} sequences at most: raise rollout.promptsPerStep"
    if pace.colocated:
        return "raise trainer.gpus and rollout.engines together, or rollout.staleness (Separated)"
    return f"raise rollout.engines{overlap}"


def _score(pace: Pace, config: RunConfig) -> str:
    models = any(reward.type == "model" for reward in config.rewards)
    others = any(reward.type != "model" for reward in config.rewards)
    knobs = [*(["raise rewards[].workers"] if others else []), *(["give rewards[].gpus"] if models else [])]
    return f"{' or '.join(knobs)}, or make the reward cheaper"


def _forward(pace: Pace, config: RunConfig) -> str:
    knobs = []
    if config.trainer.updates_per_step * config.trainer.epochs > 1:
        knobs.append("lower trainer.updatesPerStep and epochs to 1, which need no log probabilities of before")
    if config.reference is not None:
        knobs.append("set algorithm.kl.coefficient to 0, or reference.gpus")
    return "; or ".join([*knobs, "raise trainer.tokensPerMicroBatch"])


def _train(pace: Pace, config: RunConfig) -> str:
    spec, each = config.trainer, pace.trained / pace.micro_batches if pace.micro_batches else 0.0
    had = f"{pace.mfu:.0%} MFU at " if math.isfinite(pace.mfu) else ""
    had += f"{each:,.0f} tokens a micro-batch"
    if each < FULL_BATCH and 2 * each < (spec.tokens_per_micro_batch or each) * spec.context_parallel:
        fewer = ", or lower trainer.gpus" if spec.gpus > 1 else ""
        return f"{had}, which has room: raise rollout.promptsPerStep{fewer}"
    if each < FULL_BATCH:
        return f"{had}: raise trainer.tokensPerMicroBatch"
    knobs = {
        "unset trainer.offload": spec.offload, "unset trainer.gradientCheckpointing": spec.gradient_checkpointing,
        "unset trainer.compile": spec.compile is False,
    }
    return f"{had}: {next((words for words, helps in knobs.items() if helps), 'raise trainer.gpus')}"


def _sync(pace: Pace, config: RunConfig) -> str:
    verify = config.weight_sync
    if verify.verify and verify.verify_every_steps < 10:
        return "raise weightSync.verifyEverySteps"
    if config.trainer.offload:
        return "unset trainer.offload"
    return "look at the link between trainer and engines"


def _data(pace: Pace, config: RunConfig) -> str:
    return "prompts, packing and reports are the CPU's: raise the CPUs of pods.trainer.resources"


KNOBS = {
    "generate": _generate, "score": _score, "forward": _forward, "train": _train, "sync": _sync, "data": _data,
}  # fmt: skip
