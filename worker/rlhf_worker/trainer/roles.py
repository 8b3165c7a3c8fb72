"""A role on one rank: its sharded model, the optimizer of one that is trained, and their way to the host's memory and
back.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from rlhf_api.run import TRAINED, RunConfig
from rlhf_worker.errors import BadSpec, RewardFailed
from rlhf_worker.experience import Batching, PackedBatch, TrainSequence
from rlhf_worker.pretrained import context_length, load_tokenizer, model_field
from rlhf_worker.trainer import flash
from rlhf_worker.trainer.attention import PACKED_ATTENTION
from rlhf_worker.trainer.context import check_rope
from rlhf_worker.trainer.flops import Flops
from rlhf_worker.trainer.model import (
    RoleModule,
    abandoned,
    attentions,
    gathered,
    load_critic,
    load_policy,
    load_reward,
    released,
    shard,
)
from rlhf_worker.trainer.offload import Shelf
from rlhf_worker.trainer.selftest import choose

Text = str | list[dict[str, Any]]  # a prompt as the data has it: text, or chat messages


class Role:
    """`policy`, `critic`, `reference` or `reward:<name>`; `optimizer` is None for a frozen one."""

    def __init__(
        self, config: RunConfig, name: str, mesh: DeviceMesh, cp_mesh: DeviceMesh | None, device: torch.device,
    ) -> None:
        """mesh: the role's ranks; cp_mesh: those that share this one's batches. Raises BadSpec."""
        self.name = name
        self.path = config.roles[name].path
        self.module: Any = _load(config, name, whole=mesh.get_rank() == 0)
        if name not in TRAINED:
            self.module.requires_grad_(False)
        shard(self.module, mesh, cp_mesh, config.roles[name].dtype)
        self.module.to(device)
        self.flops = Flops.of(self.module.lm, self.module.output)
        if self.module.attention == PACKED_ATTENTION and config.roles[name].dtype == "bfloat16":
            flash.choose(flash.Heads.of(self.module.lm.config), device)
        self.batching = _tried(config, name, self.module, device)
        # With adapters most of the weights lie in their products' type already: a second copy would gain nothing.
        whole = config.shards(mesh.size()) == 1
        self.alone = whole and all(parameter.requires_grad for parameter in self.module.parameters())
        self.optimizer: AdamW | None = None
        if name in TRAINED:
            spec, cuda = config.trainer, device.type == "cuda"
            groups, betas = decayed(self.module, spec.weight_decay), (spec.adam_beta1, spec.adam_beta2)
            self.optimizer = AdamW(groups, betas=betas, eps=spec.adam_epsilon, fused=cuda)
        self.tokenizer: Any = load_tokenizer(
            config.roles[name], model_field(name),
        ) if name.startswith("reward:") else None
        self.steps = 0  # steps of the run in which it was trained, or was left out of
        self.fits = False  # whether a whole update's passes found room
        self._parameters, self._state = Shelf(), Shelf()

    def read(self, index: int, prompt: Text, completion: str) -> TrainSequence:
        """A sample as this reward model reads it: by its chat template, if it has one. Raises BadSpec, RewardFailed."""
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": completion}], tokenize=False,
            )
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        elif isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt + completion)
        else:
            raise BadSpec(f"{self.name}: prompts are chat messages, but the tokenizer of {self.path} has no chat "
                "template: add one to it")
        limit = context_length(self.module.lm.config)
        if limit and len(tokens) > limit:
            raise RewardFailed(
                f"{self.name}: a sample of {len(tokens)} tokens by its own tokenizer, but the model's context is "
                f"{limit}: lower data.maxPromptTokens or rollout.maxTokens"
            )
        if max(tokens) >= (size := self.module.lm.get_input_embeddings().num_embeddings):
            token = f"{max(tokens)} ({self.tokenizer.convert_ids_to_tokens(max(tokens))!r})"
            raise BadSpec(
                f"{self.name}: the tokenizer of {self.path} gives token {token}, its model has {size}: "
                "use a tokenizer of that model"
            )
        return TrainSequence.plain(tokens, index)

    def each(self, batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
        """The micro-batches of one update, for a pass with a gradient each. Copies are reduced with the last one; their
        shards each time, because a whole gradient has no room.
        """
        for number, batch in enumerate(batches, 1):
            self.module.set_requires_all_reduce(number == len(batches))
            if self.alone:
                gathered(self.module, last=number == len(batches))
            yield batch
        if self.alone:
            released(self.module)

    def gradient_norm(self, limit: float) -> Tensor:
        """Of all ranks' gradients, before they are clipped to `limit`."""
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, rate: float) -> None:
        assert self.optimizer is not None
        self._state.fetch()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def abandon(self) -> None:
        """After an exception in a pass: its update begins anew, for what it had summed up is lost."""
        assert self.optimizer is not None
        abandoned(self.module)
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def fetch(self, *, state: bool = False) -> None:
        """Parameters, and with `state` the optimizer's too, to where they are used."""
        self._parameters.fetch()
        if state:
            self._state.fetch()

    def put_away(self, *, parameters: bool = True) -> None:
        """The optimizer's state, and the parameters, to the host."""
        if self.optimizer is not None:
            self._state.put_away(value for state in self.optimizer.state.values() for value in state.values())
        if parameters:
            self.module.reshard()
            self._parameters.put_away(self.module.parameters())


def decayed(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained: biases, weights of norms and whatever has one dimension do not decay."""
    free = {
        parameter for owner in module.modules() for name, parameter in owner.named_parameters(recurse=False)
        if parameter.ndim < 2 or name.endswith("bias") or "norm" in type(owner).__name__.lower()
    }  # fmt: skip
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [([p for p in trained if p not in free], decay), ([p for p in trained if p in free], 0.0)]
    return [{"params": parameters, "weight_decay": rate} for parameters, rate in groups if parameters]


def _tried(config: RunConfig, name: str, module: RoleModule, device: torch.device) -> Batching:
    def worst(apart: float) -> float:
        value = torch.tensor(apart, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    spec = config.roles[name]
    what = f"{model_field(name)}: {spec.path} ({module.lm.config.model_type})"
    batching = choose(module, attentions(module, config.trainer), spec.dtype, device, worst, what)
    module.reshard()  # type: ignore[operator]  # of FSDP
    return batching


def _load(config: RunConfig, name: str, *, whole: bool) -> RoleModule:
    module = _module(config, name, whole=whole)
    check_rope(module.lm.config, config.data.max_prompt_tokens + config.rollout.max_tokens, model_field(name))
    return module


def _module(config: RunConfig, name: str, *, whole: bool) -> RoleModule:
    spec, trainer, field = config.roles[name], config.trainer, model_field(name)
    if name.startswith("reward:"):
        return load_reward(spec, trainer, field, whole=whole)
    if name == "critic":
        return load_critic(spec, trainer, field, whole=whole)
    module = load_policy(spec, config.rollout.temperature, trainer, field, whole=whole)
    module.entropy_gradient = bool(config.algorithm.entropy_coefficient or config.algorithm.loss)
    return module
