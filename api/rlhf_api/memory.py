"""What lies on a GPU, and when: pure arithmetic, in bytes of one GPU.

Colocated, trainer and engine take turns where engines sleep: while one works the other keeps what it cannot give away.
Counted are weights, gradients and moments, which are known; activations are estimated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_api.job import PlacementMode
from rlhf_api.run import TRAINED, RunConfig

GIB = 2**30
ALONE = 0.9  # of its GPU's memory, that an engine takes which shares it with nobody: as vLLM by itself
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
TRAINED_BYTES = 16  # a parameter: float32 weight, gradient and two moments
SAVED_BYTES = 12  # weight and two moments
LOADED_BYTES = 4  # weight
OUTSIDE_BYTES = GIB  # of an engine, at least, beyond its share and while it sleeps: CUDA's context, and graphs asleep
GRAPH_BYTES = GIB  # of an engine's share, for CUDA graphs
HEAD_BYTES = 3 * GIB  # of the trainer's head: chunks of float32 logits, and what is computed from them
USABLE = 0.9  # of the memory left for a micro-batch: the allocator leaves gaps, and the estimate is one
PAYS = 1 / 8  # of the rest of a layer's forward pass, that its attention must be for its results to be kept
ROUND_TOKENS = 1024  # so that a run that is resumed finds the same budget in nearly as much memory


@dataclass(frozen=True, slots=True)
class Need:
    """What a device must hold at the same moment, at least: without activations and gathered layers."""

    moment: str
    roles: int
    engine: int
    fix: str  # which fields to change

    @property
    def bytes(self) -> int:
        return self.roles + self.engine


def needed_bytes(config: RunConfig, counts: Mapping[str, int], world: int, engine: int) -> Need:
    """The worst of `moments`."""
    return max(moments(config, counts, world, engine), key=lambda need: need.bytes)


def moments(config: RunConfig, counts: Mapping[str, int], world: int, engine: int) -> list[Need]:
    """Of one rank. counts: parameters of each role; engine: bytes that one beside it takes, else 0.

    While a step trains, its roles are there with gradients, and an engine, or what it keeps asleep; while engines
    generate, what is not offloaded stays: weights and moments. With offload one role is there at a time, and none while
    engines generate; but each is loaded beside an engine that is awake.
    """
    offload, awake = config.trainer.offload, not config.engines_sleep
    most, outside = max if offload else sum, OUTSIDE_BYTES if engine else 0
    idle = most(_shards(config, counts, world, LOADED_BYTES if offload else SAVED_BYTES))
    training = training_bytes(config, counts, world)
    return [
        Need("training", training, outside + (engine if awake else 0), _fix(config, bool(engine) and awake)),
        Need("loading" if offload else "generating", idle, engine + outside, _fix(config, bool(engine))),
    ]


def training_bytes(config: RunConfig, counts: Mapping[str, int], world: int) -> int:
    """Of the roles of one rank: all with their gradients, or with offload the largest. A rank with a whole copy also
    keeps what it multiplies with over an update (`model.gathered`), in its own type.
    """
    copies = int(config.shards(world) == 1)
    return (max if config.trainer.offload else sum)(_shards(config, counts, world, TRAINED_BYTES, copies))


def _shards(
    config: RunConfig, counts: Mapping[str, int], world: int, trained_bytes: int, copies: int = 0
) -> list[int]:  # fmt: skip
    """A rank's part of each role. A frozen one keeps its weights in its own type."""
    own, whole = {role: DTYPE_BYTES[config.roles[role].dtype] for role in counts}, trained_whole(config)
    sizes = {role: trained_bytes + copies * own[role] if role in whole else own[role] for role in counts}
    return [count * sizes[role] // config.shards(world) for role, count in counts.items()]


def trained_whole(config: RunConfig) -> tuple[str, ...]:
    """Adapters are a small part of a model: they are left out of the least that a run needs."""
    return tuple(role for role in TRAINED if role != "policy" or config.model.lora is None)


def _fix(config: RunConfig, beside_engine: bool) -> str:
    more = "raise spec.trainer.gpus" if config.trainer.sharding == "Full" else "set spec.trainer.sharding to Full"
    steps = [more, *([] if config.trainer.offload else ["set spec.trainer.offload"])]
    if beside_engine and not config.engines_sleep:
        steps.append("remove spec.rollout.sleep")
    steps.append(f"lower {share_field(config) if beside_engine else 'the size of the model'}")
    return f"{', '.join(steps[:-1])}, or {steps[-1]}"


def engine_share(config: RunConfig) -> float:
    """Of a GPU's memory, that an engine takes."""
    shared = config.placement.mode is PlacementMode.COLOCATED
    own = config.placement.engine_fraction if shared else ALONE
    return float(config.rollout.engine_args.get("gpu_memory_utilization", own))


def share_field(config: RunConfig) -> str:
    given = "gpu_memory_utilization" in config.rollout.engine_args
    return "spec.rollout.engineArgs.gpu_memory_utilization" if given else "spec.placement.fractions.rollout"


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder, what its activations grow with."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the feed-forward layer; of experts, those that one token uses
    vocabulary: int


def shape_of(config: Any) -> Shape:
    """config: transformers' PreTrainedConfig. What it does not say is taken to be as in most decoders."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    experts = (getattr(text, "num_experts_per_tok", None) or 0) * (getattr(text, "moe_intermediate_size", None) or 0)
    dense = getattr(text, "intermediate_size", None)
    return Shape(
        layers=text.num_hidden_layers, hidden=text.hidden_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        inner=max(experts, dense if isinstance(dense, int) else 4 * text.hidden_size), vocabulary=text.vocab_size,
    )


def kv_bytes(shape: Shape, width: int, ranks: int = 1) -> int:
    """Of one token, on each of an engine's `ranks`. width: bytes of a number. Ranks beyond the heads repeat them."""
    return 2 * shape.layers * max(1, shape.kv_heads // ranks) * shape.head_dim * width


def engine_activations(
    shape: Shape, width: int, ranks: int = 1, tokens: int = 16384, sequences: int = 1024
) -> int:  # fmt: skip
    """What graphs and a batch of the largest size take beside the weights. vLLM measures both; these are its sizes on
    an H100.
    """
    of_layer = tokens * width * (4 * shape.hidden + (2 * shape.heads * shape.head_dim + 3 * shape.inner) // ranks)
    logits = 3 * sequences * shape.vocabulary * 4  # float32, their log probabilities, a copy
    return of_layer + logits + GRAPH_BYTES


def kv_tokens(card: int, share: float, weights: int, activations: int, per_token: int) -> int:
    """Tokens that fit into an engine's cache, as vLLM counts: of its share of the card, what weights and the largest
    batch leave.
    """
    return max(0, int(share * card) - weights - activations) // per_token


def activation_bytes(shape: Shape, width: int, *, checkpointing: bool, attention: bool = False) -> int:
    """Of one token of a micro-batch, from its forward to its backward pass. width: bytes of a number; attention:
    whether `keeps_attention` holds.

    A layer keeps the inputs of its norms, products, attention and activation; checkpointed, its own input, and one
    layer at a time is computed anew and has gradients as large. By docs/benchmarks.md a layer of Qwen3-4B's shape keeps
    0.85 of this uncompiled and 0.5 compiled.
    """
    results = shape.layers * shape.heads * (width * shape.head_dim + 4) if checkpointing and attention else 0
    rotated = 2 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = width * (12 * shape.hidden + rotated + 5 * shape.inner)
    kept = shape.layers * width * shape.hidden + 2 * layer if checkpointing else (shape.layers + 1) * layer
    return kept + results + 16 * shape.hidden  # around the head, in float32


def gathered_bytes(shape: Shape, parameters: int, width: int) -> int:
    """What FSDP holds in whole beside the shards: embedding and head in the products' type with a gradient, two layers
    with gradients in that type and in float32.
    """
    around = 2 * shape.vocabulary * shape.hidden
    return 2 * width * around + 2 * (2 * width + 4) * max(0, parameters - around) // shape.layers


def keeps_attention(
    config: RunConfig, counts: Mapping[str, int], shapes: Mapping[str, Shape], world: int, room: int
) -> bool:  # fmt: skip
    """Whether layers that are computed anew in the backward pass find their attention's results kept from the forward
    pass: where that is a good part of their work, and micro-batches have room for it. Arguments are `room_tokens`' own.
    """
    trainer = config.trainer
    if not trainer.gradient_checkpointing or trainer.compile is False:
        return False
    tokens = max(trainer.tokens_per_micro_batch or 0, _longest_part(config))
    left, per_token = _left(config, counts, shapes, world, room, attention=True)
    pays = any(attention_share(shapes[role], _longest(config)) >= PAYS for role in counts if role in TRAINED)
    return pays and tokens * per_token <= USABLE * left


def attention_share(shape: Shape, length: int) -> float:
    """Operations of a layer's causal attention over those of its weights, in a sequence of `length` tokens."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return length * queries / (shape.hidden * (2 * queries + 2 * keys + 3 * shape.inner))


def room_tokens(
    config: RunConfig, counts: Mapping[str, int], shapes: Mapping[str, Shape], world: int, room: int, *,
    attention: bool,
) -> int:  # fmt: skip
    """Tokens of a micro-batch on one rank, of `room` bytes that are its alone. counts, shapes: of each of its roles;
    attention: what `keeps_attention` says.
    """
    rollout, longest = config.rollout, _longest_part(config)
    parts = max(1, world // config.trainer.context_parallel)
    sequences = -(-rollout.prompts_per_step * rollout.samples_per_prompt // parts)
    left, per_token = _left(config, counts, shapes, world, room, attention=attention)
    return token_budget(left, per_token, least=longest, most=longest * sequences)


def _left(
    config: RunConfig, counts: Mapping[str, int], shapes: Mapping[str, Shape], world: int, room: int, *,
    attention: bool,
) -> tuple[int, int]:  # fmt: skip
    """Bytes for a micro-batch beside the roles, and those that one of its tokens takes."""
    widths = {role: DTYPE_BYTES[config.roles[role].dtype] for role in counts}
    held = training_bytes(config, counts, world) + HEAD_BYTES
    held += max(gathered_bytes(shapes[role], counts[role], widths[role]) for role in counts)
    checkpointing = config.trainer.gradient_checkpointing
    per_token = [
        activation_bytes(shapes[role], widths[role], checkpointing=checkpointing, attention=attention)
        for role in counts
    ]
    return room - held, max(per_token)


def _longest(config: RunConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def _longest_part(config: RunConfig) -> int:
    """Of the ranks that share a sample, the tokens of one."""
    return -(-_longest(config) // config.trainer.context_parallel)


def token_budget(room: int, per_token: int, *, least: int, most: int) -> int:
    """Tokens of a micro-batch for which there is room: at least the longest sequence, at most all of a step."""
    tokens = max(0, int(USABLE * room)) // per_token
    return max(least, min(most, tokens // ROUND_TOKENS * ROUND_TOKENS))
