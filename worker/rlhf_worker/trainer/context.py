"""Context parallelism: the positions of one packed batch over several ranks, for sequences whose activations one GPU
cannot hold.

A rank computes its run of positions through every layer, and in attention all positions for its share of the heads
(DeepSpeed-Ulysses, arXiv:2309.14509). torch's DTensor moves the data, and the gradients back.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from transformers import PreTrainedConfig

from rlhf_worker.errors import BadSpec

# Kinds of layers, named as in transformers. In the first, attention alone looks at other positions, at any length. The
# second carry a state along: kernels that know sequence borders may pack them, which the self-test finds out.
ATTENTION = {"full_attention", "sliding_attention"}
RECURRENT = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
ELSEWHERE = {"mlp", "moe", "sparse", "dense"}  # such layers look at no other positions


def kinds_of_layers(config: PreTrainedConfig) -> set[str]:
    for field in ("layer_types", "layers_block_type"):
        if kinds := getattr(config, field, None):
            return set(kinds) - ELSEWHERE
    return ATTENTION if getattr(config, "num_attention_heads", None) else RECURRENT


def packable(config: PreTrainedConfig) -> bool:
    """Whether packed batches may serve. Other attentions (chunks, sparse ones) show in long sequences only."""
    sparse = any(getattr(config, field, None) for field in ("index_topk", "indexer_budget"))
    return not sparse and kinds_of_layers(config) <= ATTENTION | RECURRENT


def check_context(config: PreTrainedConfig, ranks: int, field: str) -> None:
    """Raises BadSpec for a model that cannot be spread over so many ranks."""
    if ranks == 1:
        return
    setting, name = f"spec.trainer.contextParallel is {ranks}", f"{config.name_or_path} ({field}, {config.model_type})"
    if other := sorted(kinds_of_layers(config) - ATTENTION) or ([] if packable(config) else ["sparse attention"]):
        why = f"layers of {', '.join(other)}, which cannot be spread over ranks"
        raise BadSpec(f"{setting}, but {name} has {why}: set it to 1")
    if config.num_attention_heads % ranks:
        raise BadSpec(f"{setting}, but {name} has {config.num_attention_heads} attention heads: use a divisor of that")


def check_rope(config: PreTrainedConfig, longest: int, field: str) -> None:
    """Raises BadSpec where a sequence of `longest` tokens would change the positions of the others in its batch."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(part for part in given.values() if isinstance(part, dict))):
        scaled = rope.get("rope_type") in ("dynamic", "longrope")
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings if scaled else longest
        if longest > limit:
            raise BadSpec(
                f"{field}: {config.name_or_path}: rope_type {rope['rope_type']} turns positions by the longest "
                f"sequence of a batch beyond {limit} tokens: "
                f"lower spec.data.maxPromptTokens or spec.rollout.maxTokens, which add up to {longest}"
            )


def own_positions(
    cp_mesh: DeviceMesh, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,), (T,), (S + 1,) -> this rank's run of both, (T'/c,), and the whole batch's cu_seqlens.

    T' is T made a multiple of the c ranks by a sequence of fillers, which nothing reads.
    """
    fill = -len(token_ids) % cp_mesh.size()
    if fill:
        token_ids = F.pad(token_ids, (0, fill))
        position_ids = torch.cat([position_ids, torch.arange(fill, device=position_ids.device)])
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + fill])
    rank = cp_mesh.get_local_rank()
    return token_ids.chunk(cp_mesh.size())[rank], position_ids.chunk(cp_mesh.size())[rank], cu_seqlens


def by_heads(cp_mesh: DeviceMesh, *projections: Tensor) -> list[Tensor]:
    """Query, key, value: (T/c, H, D) each -> (T, H/c, D). Heads of keys that are too few for the ranks are repeated."""
    ranks = cp_mesh.size()
    shares = [next(n for n in range(1, ranks + 1) if n * x.shape[1] % ranks == 0) for x in projections]
    return [
        _moved(cp_mesh, x.repeat_interleave(share, dim=1) if share > 1 else x, 0, 1)
        for x, share in zip(projections, shares, strict=True)
    ]


def by_positions(cp_mesh: DeviceMesh, made: Tensor) -> Tensor:
    """(T, H/c, D) -> (T/c, H, D)"""
    return _moved(cp_mesh, made, 1, 0)


def read_at(
    cp_mesh: DeviceMesh, read: Callable[..., Tensor], hidden: Tensor, where: Tensor, *targets: Tensor
) -> Tensor:
    """`read(hidden[where], *targets)` of the whole batch, (..., N), on every rank; each reads at its own positions of
    hidden (T/c, H).

    Every rank's loss has the same gradient then, and passes on that of its own positions.
    """
    first = cp_mesh.get_local_rank() * len(hidden)
    own = ((where >= first) & (where < first + len(hidden))).nonzero().squeeze(1)
    there = own if len(own) else own.new_zeros(1)  # every rank's pass must reach every parameter
    made = read(hidden[(where[there] - first).clamp(0, len(hidden) - 1)], *(x[there] for x in targets)) * bool(len(own))
    whole = made.new_zeros(*made.shape[:-1], len(where)).index_add(-1, there, made)
    return DTensor.from_local(whole, cp_mesh, [Partial()], run_check=False).full_tensor()


def _moved(cp_mesh: DeviceMesh, x: Tensor, sharded: int, wanted: int) -> Tensor:
    placements: list[Placement] = [Shard(sharded)]
    return (
        DTensor.from_local(x, cp_mesh, placements, run_check=False).redistribute(placements=[Shard(wanted)]).to_local()
    )
