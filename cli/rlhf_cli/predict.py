"""What a spec will take, before it runs: memory of a GPU, seconds of a step, and the numbers to change. Pure.

Memory of roles and engines is what the worker's preflight counts (`rlhf_api.memory`), with activations added; time is a
roofline with the efficiencies that docs/benchmarks.md measured on an H200. Both are held against its tables by a test:
memory within 15 %, a trainer's update and generation within 25 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_api import API_VERSION, KIND, memory
from rlhf_api.job import PlacementMode, RLHFJob, RLHFJobSpec
from rlhf_api.memory import GIB, engine_share
from rlhf_api.run import RunConfig, resolve
from rlhf_cli.model_shape import Shape

HALF_BYTES = 2  # of a number in bfloat16
RESERVE_BYTES = 2 * GIB  # CUDA's own, the allocator's gaps and NCCL's buffers
# Measured on an H200 (docs/benchmarks.md): an update at 1.7B used 47.6 % of the GPU's products, at 4B 45.8 %; without
# trainer.compile 31.4 %. 512 sequences at 1.7B took 12.7 ms a token, 7.2 of them the host's.
COMPILED, EAGER = 0.46, 0.314
HOST_SECONDS = 7.2e-3 / 512  # of one sequence in one step of an engine
BANDWIDTH_SHARE = 0.8
SYNC_SECONDS, SYNC_BYTES = 0.002, {PlacementMode.COLOCATED: 1617e9, PlacementMode.SEPARATED: 338e9}


@dataclass(frozen=True, slots=True)
class Gpu:
    """`flops`: dense, in bfloat16; `bandwidth`: bytes a second. By its data sheet; only the H200 was measured."""

    name: str
    bytes: int
    flops: float
    bandwidth: float


GPUS = {gpu.name: gpu for gpu in (
    Gpu("h200", 139 * GIB, 989e12, 4.8e12), Gpu("h100", 79 * GIB, 989e12, 3.35e12),
    Gpu("a100", 79 * GIB, 312e12, 2.04e12), Gpu("l40s", 44 * GIB, 362e12, 0.864e12),
)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moment:
    """What one GPU holds at the same time, in bytes."""

    name: str
    roles: int
    activations: int
    engine: int

    @property
    def bytes(self) -> int:
        return self.roles + self.activations + self.engine + RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one step's phases. `overlapped`: generation goes on while the trainer works (rollout.staleness)."""

    generate: float
    forward: float
    train: float
    sync: float
    overlapped: bool

    @property
    def step(self) -> float:
        worked = self.forward + self.train
        return (max(self.generate, worked) if self.overlapped else self.generate + worked) + self.sync


def resolved(spec: RLHFJobSpec) -> RunConfig:
    """The run that it becomes on GPUs."""
    job = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "x", "namespace": "default"}, "spec": spec}
    return resolve(RLHFJob.model_validate(job)).on("cuda")


# memory


def moments(spec: RLHFJobSpec, shape: Shape, gpu: Gpu) -> Iterator[Moment]:
    """Of a trainer's GPU while it trains and while engines generate; of an engine's own GPU where it has one."""
    config, colocated = resolved(spec), spec.placement.mode is PlacementMode.COLOCATED
    engine = int(engine_share(config) * gpu.bytes) if spec.rollout.engine == "vllm" else 0
    activations = shape.activation_bytes(
        micro_batch(config, shape, gpu), spec.trainer.gradient_checkpointing, keeps_attention(config, shape, gpu)
    )
    counts = parameters(config, shape)
    for need in memory.moments(config, counts, spec.trainer.gpus, engine if colocated else 0):
        yield Moment(need.moment, need.roles, activations if need.moment == "training" else 0, need.engine)
    if not colocated:
        yield Moment("an engine", 0, 0, engine)


def parameters(config: RunConfig, shape: Shape) -> dict[str, int]:
    """Of each role that shares the trainer's GPUs. Reward models are not counted: nothing tells their size."""
    return {
        name: shape.parameters for name in config.roles
        if name not in config.placement.role_slots and not name.startswith("reward:")
        and not (name == "reference" and config.reference_in_policy)
    }


def micro_batch(config: RunConfig, shape: Shape, gpu: Gpu) -> int:
    """Tokens of the largest on one rank: the spec's, or those that the run will find room for; at least the longest
    sample.
    """
    trainer, rollout = config.trainer, config.rollout
    if trainer.tokens_per_micro_batch is not None:
        least = (config.data.max_prompt_tokens + rollout.max_tokens) // trainer.context_parallel
        return max(trainer.tokens_per_micro_batch, least)
    attention = keeps_attention(config, shape, gpu)
    return memory.room_tokens(*_rank(config, shape, gpu), attention=attention)


def keeps_attention(config: RunConfig, shape: Shape, gpu: Gpu) -> bool:
    return memory.keeps_attention(*_rank(config, shape, gpu))


def _rank(config: RunConfig, shape: Shape, gpu: Gpu) -> tuple[RunConfig, dict[str, int], dict[str, Any], int, int]:
    """What the run asks of its memory, on one rank."""
    counts = parameters(config, shape)
    room = int(config.placement.trainer_fraction * gpu.bytes)
    return config, counts, dict.fromkeys(counts, shape.of_activations), config.trainer.gpus, room


def longest(spec: RLHFJobSpec) -> int:
    """Tokens of the longest sample."""
    return spec.data.max_prompt_tokens + spec.rollout.max_tokens


def cached_sequences(spec: RLHFJobSpec, shape: Shape, gpu: Gpu, tokens: int) -> float:
    """Sequences of so many tokens whose keys and values one engine holds at once. Of the longest less than 1: it cannot
    start.
    """
    ranks = spec.rollout.tensor_parallel_size
    room = engine_share(resolved(spec)) * gpu.bytes - shape.parameters * HALF_BYTES / ranks - RESERVE_BYTES
    return room * ranks / (shape.kv_bytes * tokens)


# time


def seconds(spec: RLHFJobSpec, shape: Shape, gpu: Gpu, length: int) -> Seconds:
    """`length`: tokens of a mean completion. Prompts count at data.maxPromptTokens."""
    samples = spec.rollout.prompts_per_step * spec.rollout.samples_per_prompt
    prompt, ranks = spec.data.max_prompt_tokens, spec.trainer.gpus
    kept = keeps_attention(resolved(spec), shape, gpu)
    forward, anew = (
        shape.forward_flops(samples * (prompt + length), samples * length, attended) / ranks
        for attended in (prompt + length, 0 if kept else prompt + length)
    )
    rate = gpu.flops * (EAGER if spec.trainer.compile is False else COMPILED)
    again = anew if spec.trainer.gradient_checkpointing else 0.0  # one more forward pass
    updates = spec.trainer.epochs * (2 if spec.algorithm.name == "ppo" else 1)
    return Seconds(
        generate=generation(spec, shape, gpu, samples, length), forward=_passes(spec) * forward / rate,
        train=updates * (3 * forward + again) / rate,
        sync=SYNC_SECONDS + shape.parameters * HALF_BYTES / SYNC_BYTES[spec.placement.mode],
        overlapped=spec.rollout.staleness > 0,
    )  # fmt: skip


def _passes(spec: RLHFJobSpec) -> int:
    """Forward passes that a step needs before it trains (rlhf_worker.algorithm.shape.passes)."""
    updates, kl = spec.trainer.epochs * spec.trainer.updates_per_step, resolved(spec).algorithm.kl
    penalised = kl.coefficient > 0 and kl.place == "reward"
    return int(updates > 1 or penalised) + int(kl.coefficient > 0) + int(spec.algorithm.name == "ppo")


def generation(spec: RLHFJobSpec, shape: Shape, gpu: Gpu, samples: int, length: int) -> float:
    """Seconds: prompts read once a group, then a token of every running sequence at a time."""
    ranks, prompt = spec.rollout.tensor_parallel_size, spec.data.max_prompt_tokens
    own = samples / spec.rollout.engines
    held = cached_sequences(spec, shape, gpu, prompt + length)
    running = max(1.0, min(own, held, spec.rollout.engine_args.get("max_num_seqs", 1024)))
    weights = shape.parameters * HALF_BYTES
    cache = running * shape.kv_bytes * (prompt + length / 2)
    read = (weights + cache) / (gpu.bandwidth * BANDWIDTH_SHARE * ranks)
    computed = shape.forward_flops(int(running), int(running), prompt + length / 2) / (gpu.flops * COMPILED * ranks)
    each = max(read, computed) + HOST_SECONDS * running
    prompts = own / spec.rollout.samples_per_prompt * prompt
    prefill = shape.forward_flops(int(prompts), 0, prompt) / (gpu.flops * COMPILED * ranks)
    return float(prefill + each * length * own / running)


# what does not fit


def misfits(spec: RLHFJobSpec, shape: Shape, gpu: Gpu) -> list[str]:
    """Each in words, with its numbers."""
    found = [
        f"{one.name} takes {one.bytes / GIB:.1f} GiB of a GPU's {gpu.bytes / GIB:.0f}"
        for one in moments(spec, shape, gpu) if one.bytes > gpu.bytes
    ]
    held = cached_sequences(spec, shape, gpu, longest(spec)) if spec.rollout.engine == "vllm" else 1.0
    if held < 1:
        share = engine_share(resolved(spec)) * gpu.bytes / GIB
        weights = shape.parameters * HALF_BYTES / spec.rollout.tensor_parallel_size / GIB
        found.append(f"an engine has {share:.1f} GiB, of which weights take {weights:.1f}: no room for one sequence of "
            f"{longest(spec)} tokens")
    return found


def fixes(spec: RLHFJobSpec, shape: Shape, gpu: Gpu) -> list[str]:
    """Single changes after which everything fits, the cheapest first; else those that help, all together."""
    changes = list(_changes(spec))
    alone = [words for words, changed in changes if not misfits(changed, shape, gpu)]
    if alone:
        return alone
    for gpus in (2, 4, 8, 16, 32, 64):
        more = _more_gpus(spec, spec.trainer.gpus * gpus)
        cheap = _with(more, trainer={"gradient_checkpointing": True, "offload": True})
        if not misfits(cheap, shape, gpu):
            return [f"set trainer.gpus to {more.trainer.gpus} with trainer.gradientCheckpointing and trainer.offload"]
    return ["a smaller model, or a larger rollout.tensorParallelSize: nothing else is enough"]


def _changes(spec: RLHFJobSpec) -> Iterator[tuple[str, RLHFJobSpec]]:
    trainer = spec.trainer
    if not trainer.gradient_checkpointing:
        yield "set trainer.gradientCheckpointing", _with(spec, trainer={"gradient_checkpointing": True})
    tokens = trainer.tokens_per_micro_batch
    while tokens is not None and (tokens := tokens // 2) >= longest(spec):
        yield f"lower trainer.tokensPerMicroBatch to {tokens}", _with(spec, trainer={"tokens_per_micro_batch": tokens})
    if spec.placement.mode is PlacementMode.COLOCATED and "gpu_memory_utilization" not in spec.rollout.engine_args:
        for share in (0.3, 0.2, 0.6, 0.8):
            fractions = spec.placement.fractions.model_copy(update={"rollout": share})
            if resolved(spec).engines_sleep or share + fractions.trainer <= 1:
                yield f"set placement.fractions.rollout to {share}", _with(spec, placement={"fractions": fractions})
    if spec.rollout.sleep is False:
        yield "remove rollout.sleep", _with(spec, rollout={"sleep": None})
    if trainer.sharding == "Hybrid":
        yield "set trainer.sharding to Full", _with(spec, trainer={"sharding": "Full"})
    if not trainer.offload:
        yield "set trainer.offload", _with(spec, trainer={"offload": True})
    for times in (2, 4, 8):
        gpus = trainer.gpus * times
        yield f"set trainer.gpus to {gpus}{_with_engines(spec, gpus)}", _more_gpus(spec, gpus)


def _with(spec: RLHFJobSpec, **parts: dict[str, Any]) -> RLHFJobSpec:
    return spec.model_copy(update={name: getattr(spec, name).model_copy(update=own) for name, own in parts.items()})


def _with_engines(spec: RLHFJobSpec, gpus: int) -> str:
    if spec.placement.mode is PlacementMode.SEPARATED or spec.rollout.engine == "hf":
        return ""
    return f" and rollout.engines to {gpus // spec.rollout.tensor_parallel_size}"


def _more_gpus(spec: RLHFJobSpec, gpus: int) -> RLHFJobSpec:
    """Colocated, engines go with the trainer's GPUs."""
    more = _with(spec, trainer={"gpus": gpus})
    if not _with_engines(spec, gpus):
        return more
    return _with(more, rollout={"engines": gpus // spec.rollout.tensor_parallel_size})


