"""One FSDP2 rank of the policy: loss, gradients, optimizer, weights out, checkpoints.

Every public method is a collective: all ranks call it at once.
"""

import io
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rlhf_api.run import RunConfig
from rlhf_worker.algorithm.losses import policy_loss
from rlhf_worker.checkpoint import Outcome, Restored, Roles, RunState, Saver
from rlhf_worker.errors import Diverged
from rlhf_worker.experience import PackedBatch, TrainSequence, at_targets, by_sample, pack
from rlhf_worker.model import PREFIX, PolicyModule, load_policy, logprobs_of, shard
from rlhf_worker.pretrained import identity, load_config, load_tokenizer, make_readable
from rlhf_worker.storage import Store
from rlhf_worker.weights.backends import Sender
from rlhf_worker.weights.source import PolicySource

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
ADAM_BETAS = (0.9, 0.95)


def learning_rate(base: float, warmup: int, update: int) -> float:
    """Linear warm-up over the first `warmup` updates, then constant. `update` counts from 0."""
    return base * min(1.0, (update + 1) / warmup) if warmup else base


class Trainer:
    """`join` first, then `load`; then the rest."""

    def __init__(self, config: RunConfig, rank: int, device: str, threads: int) -> None:
        self.config = config
        self.rank = rank
        self.world = len(config.placement.trainer_slots)
        self.device = torch.device(device)
        self.store = Store(config.checkpoint.path)
        self.version = 0
        self.sender: Sender | None = None
        if device == "cpu":
            torch.set_num_threads(threads)

    def join(self, address: tuple[str, int]) -> None:
        """Form the trainer's process group. gloo beside NCCL carries objects and barriers."""
        if self.device.type == "cuda":
            torch.cuda.set_device(0)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        host, port = address
        dist.init_process_group(backend, init_method=f"tcp://{host}:{port}", rank=self.rank, world_size=self.world, timeout=COLLECTIVE_TIMEOUT)

    def load(self) -> None:
        """Model, optimizer and, for a KL term, the frozen reference. Raises BadSpec."""
        trainer, algorithm = self.config.trainer, self.config.algorithm
        self.mesh = init_device_mesh(self.device.type, (self.world,))
        self.module = self._module()
        self.places = [
            (name.removeprefix(PREFIX), self.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in self.module.named_parameters()
        ]
        self.source = PolicySource(self._named, getattr(torch, self.config.model.dtype))
        self.reference = self._module().requires_grad_(False) if algorithm.kl.coefficient > 0 else None
        attempt = ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""
        self.saver = Saver(self.config.checkpoint.path, self.config.checkpoint.keep, ["policy", "critic"] if self.config.critic else ["policy"], attempt)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=trainer.learning_rate, betas=ADAM_BETAS, weight_decay=trainer.weight_decay, fused=self.device.type == "cuda"
        )

    def _module(self) -> PolicyModule:
        config = self.config
        module = load_policy(config.model, config.rollout.temperature, gradient_checkpointing=config.trainer.gradient_checkpointing)
        shard(module, self.mesh, config.model.dtype)
        return module.to(self.device)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by their checkpoint names, sharded."""
        self.module.reshard()  # type: ignore[operator]  # a forward pass without a backward leaves the root's whole
        # Looked up in their modules each time: FSDP may replace the objects. Walking the modules anew would cost more than a sync.
        return ((name, getattr(module, key)) for name, module, key in self.places)

    def train(self, updates: list[list[PackedBatch]]) -> dict[str, float]:
        """This rank's micro-batches of each optimizer update. Returns means over the step, the same on every rank. Raises Diverged."""
        sums: dict[str, Tensor] = {}
        for batches in updates:
            made = [self._backward(batch) for batch in batches]
            step = self._step()
            for metrics in [*made, {name: value / self.world for name, value in step.items()}]:
                for name, value in metrics.items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value / len(updates)
            self._check_finite(sums, batches)
        return self._reduced(sums)

    def _backward(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Gradients of one micro-batch. FSDP averages over ranks, so the loss is multiplied by their number."""
        loss, metrics = policy_loss(self.config.algorithm, logprobs_of(self.module, batch, self.device), *at_targets(batch, self.device))
        torch.autograd.backward(loss * self.world)
        return {**metrics, "loss": loss.detach()}

    def logprobs(self, role: str, batches: list[PackedBatch]) -> dict[int, list[float]]:
        """Log probability of each completion token of each sample, by the policy or the reference."""
        module = self.reference if role == "reference" else self.module
        assert module is not None
        return {index: row for batch in batches for index, row in by_sample(batch, self._frozen(module, batch)).items()}

    @torch.no_grad()
    def _frozen(self, module: PolicyModule, batch: PackedBatch) -> Tensor:
        return logprobs_of(module, batch, self.device)

    def _step(self) -> dict[str, Tensor]:
        """One optimizer update."""
        trainer = self.config.trainer
        rate = learning_rate(trainer.learning_rate, trainer.warmup_steps, self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), trainer.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        return {"grad_norm": norm, "learning_rate": torch.tensor(rate, device=self.device)}

    def _check_finite(self, sums: dict[str, Tensor], batches: list[PackedBatch]) -> None:
        """The gradient's norm is global, so all ranks stop together, each with its own batch dumped."""
        bad = sums["loss"].isfinite().logical_and(sums["grad_norm"].isfinite()).logical_not().float()
        dist.all_reduce(bad)
        if not bad.item():
            return
        name, dump = f"diverged/version-{self.version}-rank-{self.rank}.pt", io.BytesIO()
        torch.save({"metrics": {name: value.item() for name, value in sums.items()}, "batches": batches}, dump)
        self.store.write(name, dump.getvalue())
        raise Diverged(
            f"loss {sums['loss'].item():g}, gradient norm {sums['grad_norm'].item() * self.world:g} at update {self.version}: "
            f"the batch is in {self.store.url(name)}; lower spec.trainer.learningRate or look for bad rewards"
        )

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def connect(self, engines: list[ActorHandle], backend: str, address: tuple[str, int], distrusted: frozenset[str]) -> list[str]:
        """Open the way to the engines, in place of the one before. Returns what an administrator should know of it."""
        if self.sender is not None:
            self.sender.close()
        self.sender = Sender(self.config, self.source, self.rank, engines, backend, address, distrusted)
        return self.sender.notes()

    def send(self, *, prove: bool) -> int:
        """The weights into all engines; returns their version."""
        assert self.sender is not None
        self.sender.send(prove=prove)
        return self.version

    def checksums(self) -> list[dict[str, int]]:
        """This rank's share of what each engine rank's parameters must sum up to."""
        assert self.sender is not None
        return self.sender.checksums()

    def probe(self, token_ids: list[int]) -> list[float]:
        """Log probability of each token after the first, at temperature 1."""
        length = len(token_ids) - 1
        sequence = TrainSequence(token_ids=token_ids, prompt_length=1, index=0, mask=[True] * length, columns={})
        temperature, self.module.temperature = self.module.temperature, 1.0
        try:
            return [float(x) for x in self._frozen(self.module, pack([sequence], len(token_ids))[0]).tolist()]
        finally:
            self.module.temperature = temperature

    def save(self, step: int, sampler: dict[str, Any], loop: dict[str, Any]) -> None:
        """What the ranks hold now; it is written while they go on."""
        state = RunState(step=step, version=self.version, model=self._identity(), sampler=sampler, loop=loop)
        self.saver.begin(state, self._trained())

    def saved(self, *, wait: bool) -> list[Outcome]:
        """How the saves ended that ended since the last call."""
        return self.saver.finished(wait=wait)

    def restore(self) -> Restored:
        """Of the newest whole checkpoint, if there is one. Raises BadData."""
        found = self.saver.restore(self._identity(), self._trained())
        self.version = found.state.version if found.state else 0
        return found

    def _trained(self) -> Roles:
        return {"policy": (self.module, self.optimizer)}

    def _identity(self) -> dict[str, Any]:
        return identity(self.config.model, load_config(self.config.model))

    def export(self) -> str:
        """The model as a Hugging Face checkpoint under <checkpoint.path>/export, in the engine's dtype."""
        weights = {name: tensor.cpu() for name, tensor in self.source if self.rank == 0}
        if self.rank == 0:
            with self.store.publishing("export", "config.json") as target:
                self.module.lm.save_pretrained(target, state_dict=weights)
                load_tokenizer(self.config.model).save_pretrained(target)
                make_readable(target)
        dist.barrier()
        return self.store.url("export")

    def close(self) -> None:
        if dist.is_initialized():
            self.saver.close()
            dist.destroy_process_group()
