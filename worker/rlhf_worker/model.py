"""The policy as one torch module: load, packed forward to log probabilities, FSDP2.

The forward pass is always packed: sequences end to end in one row, attention block-diagonal by `cu_seqlens`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from rlhf_api.job import ModelSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import PackedBatch
from rlhf_worker.pretrained import load_config

PACKED_ATTENTION = "rlhf_packed"
HEAD_CHUNK = 2048  # positions whose logits exist at the same time
PREFIX = "lm."


class PolicyModule(nn.Module):
    """Packed tokens in, log probabilities of the targets out. The root of FSDP, so that the head's weights are whole in `forward`."""

    def __init__(self, lm: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature

    def forward(self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int, where: Tensor, targets: Tensor) -> Tensor:
        """token_ids, position_ids (T,); cu_seqlens (S + 1,); where (N,) positions whose next token `targets` (N,) names -> (N,) float32."""
        hidden = self.lm.base_model(
            input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False,
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=max_length, max_length_k=max_length,
        ).last_hidden_state[0]
        # An empty micro-batch has no target, and must still reach every parameter for FSDP's collectives.
        if not where.numel():
            return self._chunk(hidden, token_ids).sum()[None] * 0.0
        picked = hidden[where]
        parts = zip(torch.split(picked, HEAD_CHUNK), torch.split(targets, HEAD_CHUNK), strict=True)
        return torch.cat([checkpoint(self._chunk, h, t, use_reentrant=False) for h, t in parts])

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm.get_output_embeddings()(hidden).float() / self.temperature
        return -F.cross_entropy(logits, targets, reduction="none")


def load_policy(spec: ModelSpec, temperature: float, *, gradient_checkpointing: bool) -> PolicyModule:
    """The checkpoint in float32 on the CPU. Raises BadSpec."""
    load_config(spec)
    lm = AutoModelForCausalLM.from_pretrained(
        spec.path, dtype=torch.float32, attn_implementation=PACKED_ATTENTION, trust_remote_code=spec.trust_remote_code,
    )
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.train()
    return PolicyModule(lm, temperature)


def shard(module: PolicyModule, mesh: DeviceMesh, dtype: str) -> None:
    """FSDP2: a unit each decoder layer, the rest in the root. Weights stay float32; products are made in `dtype`, gradients summed in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for layer in module.lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def logprobs_of(module: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
    """Log probabilities of the batch's targets at the temperature, (N,) float32 on `device`; for an empty batch (1,) of a zero with a gradient."""
    where = batch.target_mask.nonzero().squeeze(1)
    tensors = (batch.token_ids, batch.position_ids, batch.cu_seqlens)
    tokens, positions, cu_seqlens = (t.to(device) for t in tensors)
    result: Tensor = module(tokens, positions, cu_seqlens, batch.max_length, where.to(device), batch.targets[where].to(device))
    return result


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D). Causal within each sequence."""
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q: call the model through PolicyModule")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        window = (sliding_window - 1 if sliding_window else -1, 0)
        out = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1]
        )
        assert isinstance(out, Tensor)
        return out[None], None
    return _by_sequence(q, k, v, cu_seq_lens_q.diff().tolist(), scaling, sliding_window)[None], None


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None, window: int | None) -> Tensor:
    """(T, H, D) each: one attention a run of equally long neighbours, so that a batch of one length is one call."""
    if window is not None and window < max(lengths):
        raise BadSpec(f"spec.model.path: sliding-window attention ({window}) over longer sequences ({max(lengths)}) is trained on GPU in bfloat16 only")
    out, start = [], 0
    for length, count in _runs(lengths):
        parts = (x[start : start + length * count].reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        query, key, value = parts
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out.append(made.transpose(1, 2).reshape(count * length, *q.shape[1:]))
        start += length * count
    return torch.cat(out)


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """[5, 5, 3] -> [(5, 2), (3, 1)]"""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask is `cu_seqlens`."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
