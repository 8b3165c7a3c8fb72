"""Every role's model as one torch module: load, forward over a packed batch, FSDP2.

A batch is packed: sequences end to end in one row, attention block-diagonal by `cu_seqlens`. Under an attention of
transformers' own the same batch is laid out one sequence a row, padded, and the results are put end to end again.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.initialization import no_init_weights

from rlhf_api.job import ModelSpec, PolicySpec, TrainerSpec
from rlhf_worker import lora
from rlhf_worker.errors import BadSpec, Call, explained
from rlhf_worker.experience import PackedBatch, sent
from rlhf_worker.pretrained import backbone, decoder_layers, load_config, location
from rlhf_worker.trainer.attention import PACKED_ATTENTION
from rlhf_worker.trainer.compiled import compiled
from rlhf_worker.trainer.context import check_context, own_positions, packable, read_at
from rlhf_worker.trainer.head import Head, change_of, logprobs_of

PREFIX = "lm."
COPIES, SHARDS = "copies", "shards"  # dimensions of the mesh of a role that nodes hold copies of


class RoleModule(nn.Module):
    """A model of transformers under a head of ours. The root of FSDP, so that the head's weights are whole in
    `forward`.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.own_attention = self.attention  # transformers' choice
        self.compiled = False
        self.cp_mesh: DeviceMesh | None = None  # ranks that share every batch

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's. Raises BadSpec."""
        return decoder_layers(self.lm)

    @property
    def output(self) -> nn.Module:
        """What `read` multiplies hidden states with."""
        raise NotImplementedError

    @property
    def attention(self) -> str:
        """By transformers' name."""
        return str(self.lm.config._attn_implementation)

    def attend(self, attention: str) -> bool:
        """From now on by this one. False for a model that has it not."""
        try:
            self.lm.set_attn_implementation(attention)
        except ValueError:
            return False
        return self.attention == attention

    def alone(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One sequence, (L,), by the model's own forward pass -> what `selftest` compares, (..., L); targets (L,)."""
        hidden = backbone(self.lm)(input_ids=token_ids[None], use_cache=False).last_hidden_state[0]
        return hidden.float().T, torch.zeros_like(token_ids)

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int, where: Tensor,
        *targets: Tensor
    ) -> Tensor:  # fmt: skip
        """token_ids, position_ids (T,); cu_seqlens (S + 1,); where (N,): the positions that are read; targets (N,) each
        -> what `read` makes of them.
        """
        if self.cp_mesh is None:
            hidden = self._hidden(token_ids, position_ids, cu_seqlens, max_length)
            return self.read(hidden.index_select(0, where), *targets)  # hidden[where] is slow backwards: it sorts
        inputs = own_positions(self.cp_mesh, token_ids, position_ids, cu_seqlens)
        return read_at(self.cp_mesh, self.read, self._hidden(*inputs, max_length), where, *targets)

    def read(self, hidden: Tensor, *targets: Tensor) -> Tensor:
        """hidden (N, H), targets (N,) each -> (..., N) float32."""
        raise NotImplementedError

    def _hidden(self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
        """token_ids, position_ids (T,): all, or this rank's -> last hidden states (T, H)."""
        if self.attention != PACKED_ATTENTION:
            return self._by_row(token_ids, position_ids, cu_seqlens, max_length)
        borders = {f"cu_seq_lens_{of}": cu_seqlens for of in "qk"} | {f"max_length_{of}": max_length for of in "qk"}
        borders["seq_idx"] = (position_ids == 0).cumsum(0, dtype=torch.int32)[None] - 1  # for kernels of convolutions
        made: Tensor = backbone(self.lm)(
            input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, cp_mesh=self.cp_mesh, **borders
        ).last_hidden_state[0]
        return made

    def _by_row(self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
        lengths = cu_seqlens.diff()
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        tokens, mask = token_ids.new_zeros(2, len(lengths), max_length)
        tokens[rows, position_ids], mask[rows, position_ids] = token_ids, 1
        made: Tensor = backbone(self.lm)(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return made[rows, position_ids]


class PolicyModule(RoleModule):
    """Tokens in, log probabilities of the targets out."""

    def __init__(self, lm: PreTrainedModel, temperature: float) -> None:
        super().__init__(lm)
        self.temperature = temperature
        self.entropy_gradient = False

    @property
    def output(self) -> nn.Module:
        layer: nn.Module = self.lm.get_output_embeddings()
        return layer

    def read(self, hidden: Tensor, *targets: Tensor) -> Tensor:
        """targets (N,): the tokens that follow; and (N, 1 + topK) what they were drawn from, where not from all.

        -> (2, N) float32: their log probabilities, and entropies, of the distribution drawn from.
        """
        layer, size = self.output, self.lm.get_input_embeddings().num_embeddings
        head = Head(layer, change_of(self.lm.config, self.temperature), size, self.compiled)
        return logprobs_of(head, hidden, *targets, entropy_gradient=self.entropy_gradient)

    def alone(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of the likeliest tokens, whose log probabilities round least."""
        logits = self.lm(input_ids=token_ids[None], use_cache=False).logits[0].float() / self.temperature
        likeliest = logits.log_softmax(-1).max(-1)
        return likeliest.values, likeliest.indices


class ScalarModule(RoleModule):
    """Tokens in, one number a position out: the critic's value of the state before the next token, or a reward model's
    score.
    """

    def __init__(self, lm: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__(lm)
        self.head = head

    @property
    def output(self) -> nn.Module:
        return self.head

    def read(self, hidden: Tensor, *targets: Tensor) -> Tensor:
        """-> (N,) float32. No targets."""
        made: Tensor = self.head(hidden.float())
        return made[:, 0].clone()  # a view that someone writes into would lose the hooks of FSDP


def load_policy(
    spec: ModelSpec, temperature: float, trainer: TrainerSpec, field: str = "spec.model.path", *, whole: bool = True
) -> PolicyModule:
    """The checkpoint in float32 on the CPU, with the spec's adapters; if not `whole`, memory of its shape that is never
    written and so takes none.

    Raises BadSpec, which names `field`.
    """
    module = PolicyModule(_pretrained(AutoModelForCausalLM, spec, trainer, field, whole), temperature)
    if isinstance(spec, PolicySpec) and spec.lora is not None:
        lora.inject(module, module.layers, spec, trainer.seed)
    return _ready(module, trainer)


def load_critic(spec: ModelSpec, trainer: TrainerSpec, field: str, *, whole: bool = True) -> ScalarModule:
    """The backbone of the checkpoint under a value head of zeros: before the first update every value is 0. Raises
    BadSpec.
    """
    lm = _pretrained(AutoModel, spec, trainer, field, whole)
    head = nn.Linear(lm.config.hidden_size, 1, bias=False)
    nn.init.zeros_(head.weight)
    return _ready(ScalarModule(lm, head), trainer)


def load_reward(spec: ModelSpec, trainer: TrainerSpec, field: str, *, whole: bool = True) -> ScalarModule:
    """A sequence-classification checkpoint with one label, by transformers' name for its head, `score`. Raises BadSpec.
    """
    lm = _pretrained(AutoModelForSequenceClassification, spec, trainer, field, whole)
    head = getattr(lm, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise BadSpec(
            f"{field}: {spec.path}: {type(lm).__name__} must score by one linear head `score` "
            "with one label (num_labels: 1 in its config)"
        )
    return _ready(ScalarModule(backbone(lm), head), trainer)


def _pretrained(kind: Any, spec: ModelSpec, trainer: TrainerSpec, field: str, whole: bool) -> PreTrainedModel:
    config = load_config(spec, field)
    check_context(config, trainer.context_parallel, field)
    options = {"dtype": torch.float32, "trust_remote_code": spec.trust_remote_code}
    if not whole:
        with explained(Call.MODEL, f"{field}: {spec.path}"), no_init_weights():
            empty: PreTrainedModel = kind.from_config(config, **options)
        empty.tie_weights()
        return empty
    with explained(Call.WEIGHTS, f"{field}: {spec.path}"):
        lm, loaded = kind.from_pretrained(location(spec), output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        lacking = f"{len(missing)} weights of {type(lm).__name__}, such as {missing[0]}"
        raise BadSpec(f"{field}: {spec.path}: the checkpoint lacks {lacking}")
    return lm


M = TypeVar("M", bound=RoleModule)


def _ready(module: M, trainer: TrainerSpec) -> M:
    """Without dropout, which would make two passes over one batch differ."""
    module.eval()
    module.attend(attentions(module, trainer)[0])
    return module


def attentions(module: RoleModule, trainer: TrainerSpec) -> list[str]:
    """The ones that may serve, best first: packed batches; padded ones by transformers' choice, by plain code."""
    padded = [] if trainer.context_parallel > 1 else [module.own_attention, "eager"]
    packed = [PACKED_ATTENTION] if trainer.batching == "packed" and packable(module.lm.config) else []
    return list(dict.fromkeys([*packed, *padded]))


def wrap_layers(module: RoleModule, trainer: TrainerSpec, *, attention: bool) -> None:
    """Compile and checkpoint decoder layers, in place. A checkpoint lies in the graph: its backward pass computes anew
    what it reads, and no more. attention: that keeps what attention made.

    transformers' own checkpoints want layers in training mode, in which some have dropout.
    """
    module.compiled = compiles(trainer, next(module.parameters()).device)
    for layer in module.layers:
        # Not the module: FSDP's hooks stay outside, and names as they are.
        if trainer.gradient_checkpointing:
            layer.forward = _recomputed(layer.forward, KEPT if attention and module.compiled else {})
        if module.compiled:
            layer.forward = compiled(layer.forward)


def _recomputed(forward: Callable[..., Any], contexts: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def call(*arguments: Any, **options: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts, **options)

    return call


def _of_attention(_: SelectiveCheckpointContext, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    kept = operator is torch.ops.torch_attn._varlen_attn.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


KEPT = {"context_fn": partial(create_selective_checkpoint_contexts, _of_attention)}


def compiles(trainer: TrainerSpec, device: torch.device) -> bool:
    return device.type == "cuda" if trainer.compile is None else trainer.compile


def shard(module: RoleModule, mesh: DeviceMesh, cp_mesh: DeviceMesh | None, dtype: str) -> None:
    """FSDP2 over `mesh`, of shards, or of copies and shards: a unit each decoder layer, the rest in the root. Products
    are made in `dtype`, gradients summed in float32, a scalar head is float32.

    cp_mesh: the ranks that share this one's batches, if any. Weights of a model that is trained stay float32; those of
    a frozen one are kept in `dtype`, which gives the same products. The first rank's weights become everyone's. """
    module.cp_mesh = cp_mesh
    first = mesh.get_rank() == 0
    lower = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32)
    for parameter in module.lm.parameters():
        if not parameter.requires_grad:
            kind = getattr(torch, dtype)
            parameter.data = parameter.data.to(kind) if first else torch.empty_like(parameter, dtype=kind)
    weights = {name: parameter.data for name, parameter in module.named_parameters()} if first else {}
    if isinstance(module, ScalarModule):
        fully_shard(module.head, mesh=mesh)
    for layer in module.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(module, "alone")
    if mesh.size() > 1:
        _deal(module, mesh, weights)


def mesh_of(device: str, ranks: int, shards: int) -> DeviceMesh:
    """Of a role's ranks: neighbours hold the shards of one copy."""
    if ranks == shards:
        return init_device_mesh(device, (ranks,))
    return init_device_mesh(device, (ranks // shards, shards), mesh_dim_names=(COPIES, SHARDS))


def gathered(module: RoleModule, *, last: bool) -> None:
    """Before each micro-batch of an update on a rank that holds a whole copy. Its weights are cast for the products
    once an update, and gradients added up as they come; a cast and a reduction a micro-batch read and write 36 bytes a
    parameter more.
    """
    for layer in module.layers:
        layer.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]  # of FSDP
    module.set_reshard_after_backward(last)  # type: ignore[operator]
    module.set_requires_gradient_sync(last)  # type: ignore[operator]


def released(module: RoleModule) -> None:
    """After the update: every pass leaves its layers in shards again."""
    for layer in module.layers:
        layer.set_reshard_after_forward(True, recurse=False)  # type: ignore[operator]


def abandoned(module: RoleModule) -> None:
    """After an exception in the middle of a pass: as before the update, for `reset_iter_state` leaves what whole
    gradients had been added up to.
    """
    released(module)
    module.set_reshard_after_backward(True)  # type: ignore[operator]
    module.set_requires_gradient_sync(True)  # type: ignore[operator]
    groups = (unit._get_fsdp_state()._fsdp_param_groups for unit in module.modules() if isinstance(unit, FSDPModule))
    for parameter in (parameter for unit in groups for group in unit for parameter in group.fsdp_params):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None
    module.reset_iter_state()  # type: ignore[operator]


@torch.no_grad()
def _deal(module: nn.Module, mesh: DeviceMesh, weights: dict[str, Tensor]) -> None:
    """The first rank's whole `weights`, by name, into everyone's shards; and its buffers. Others have none, and what
    they deal meanwhile is overwritten: only shards cross to other copies.
    """
    shards = mesh[SHARDS] if mesh.ndim > 1 else mesh
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = weights[name] if weights else torch.empty(parameter.shape, dtype=parameter.dtype)
        local = parameter.to_local()
        local.copy_(distribute_tensor(whole.to(mesh.device_type), shards, [parameter.placements[-1]]).to_local())
        if mesh.ndim > 1:
            dist.broadcast(local, group=mesh.get_group(COPIES), group_src=0)
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)


def policy_pass(module: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
    """Of the batch's targets at the temperature, (2, N) float32 on `device`: log probabilities and entropies; for an
    empty batch (2, 1) of zeros with a gradient.
    """
    where = _targets(batch)
    targets = [batch.targets[where]] + ([] if batch.support is None else [batch.support[where].long()])
    made: Tensor = module(*inputs_of(batch, device), *(sent(rows, device) for rows in (where, *targets)))
    return made * float(batch.target_mask.any())


def values_of(module: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
    """The critic's values before each of the batch's targets, (N,) float32 on `device`; for an empty batch (1,) of a
    zero with a gradient.
    """
    made: Tensor = module(*inputs_of(batch, device), sent(_targets(batch), device))
    return made * float(batch.target_mask.any())


def scores_of(module: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
    """A reward model's score at the last token of each sequence, (S,) float32 on `device`."""
    made: Tensor = module(*inputs_of(batch, device), (batch.cu_seqlens[1:] - 1).to(device))
    return made


def inputs_of(batch: PackedBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    tokens, positions, cu_seqlens = (
        sent(tensor, device) for tensor in (batch.token_ids, batch.position_ids, batch.cu_seqlens)
    )
    return tokens, positions, cu_seqlens, batch.max_length


def _targets(batch: PackedBatch) -> Tensor:
    """Positions (N,); the first where there is none, since every rank's pass must reach every parameter for FSDP's
    collectives.
    """
    where = batch.target_mask.nonzero().squeeze(1)
    return where if len(where) else torch.zeros(1, dtype=torch.int64)
