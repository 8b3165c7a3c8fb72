"""One FSDP2 rank of the policy: loss, gradients, optimizer, weights out, checkpoints.

Every public method is a collective: all ranks call it at once.
"""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rlhf_api.run import RunConfig
from rlhf_worker import checkpoint, losses
from rlhf_worker.errors import Diverged
from rlhf_worker.experience import PackedBatch, TrainSequence, pack
from rlhf_worker.model import PREFIX, PolicyModule, load_policy, logprobs_of, shard
from rlhf_worker.pretrained import identity, load_config, load_tokenizer, make_readable
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
        self.root = Path(config.checkpoint.path)
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
        """This rank's micro-batches of each optimizer update. Returns means over the step, the same on every rank. Raises Diverged.

        With one update a batch the policy that made the samples is the policy that is trained, so its log probabilities are
        those of the training pass itself, and the ratio is exactly 1.
        """
        old = [[self._frozen(self.module, batch) for batch in batches] for batches in updates] if len(updates) > 1 else None
        sums: dict[str, Tensor] = {}
        for index, batches in enumerate(updates):
            made = [self._backward(batch, old[index][i] if old else None) for i, batch in enumerate(batches)]
            step = self._step()
            for metrics in [*made, {name: value / self.world for name, value in step.items()}]:
                for name, value in metrics.items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value / len(updates)
            self._check_finite(sums, batches)
        return self._reduced(sums)

    def _backward(self, batch: PackedBatch, old: Tensor | None) -> dict[str, Tensor]:
        """Gradients of one micro-batch. FSDP averages over ranks, so the loss is multiplied by their number."""
        algorithm = self.config.algorithm
        logprobs = logprobs_of(self.module, batch, self.device)
        advantages, rollout, weights = self._aligned(batch)
        loss, metrics = losses.policy_loss(
            logprobs, logprobs if old is None else old, advantages, weights, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high
        )
        if self.reference is not None:
            terms = weights * losses.kl(algorithm.kl.estimator, logprobs, self._frozen(self.reference, batch))
            metrics["kl"] = terms.detach().sum()
            loss = loss + algorithm.kl.coefficient * terms.sum() if algorithm.kl.place == "loss" else loss
        torch.autograd.backward(loss * self.world)
        sampled_by = logprobs.detach() if old is None else old
        return {**metrics, **losses.mismatch(sampled_by, rollout, weights), "loss": loss.detach()}

    def _aligned(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """advantages, rollout_logprobs, loss_weights (N,) of the targets; one zero each for an empty batch, as in `logprobs_of`."""
        where = batch.target_mask
        rows = (batch.advantages, batch.rollout_logprobs, batch.loss_weights)
        picked = [(row[where] if where.any() else row[:1] * 0.0).to(self.device) for row in rows]
        return picked[0], picked[1], picked[2]

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
        path = self.root / "diverged" / f"version-{self.version}-rank-{self.rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"metrics": {name: value.item() for name, value in sums.items()}, "batches": batches}, path)
        raise Diverged(
            f"loss {sums['loss'].item():g}, gradient norm {sums['grad_norm'].item() * self.world:g} at update {self.version}: "
            f"the batch is in {path}; lower spec.trainer.learningRate or look for bad rewards"
        )

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def kl_sums(self, batches: list[PackedBatch]) -> dict[int, float]:
        """Sum over tokens of the KL estimate for each sample; `advantages` carry the sample's number here."""
        assert self.reference is not None
        sums: dict[int, float] = {}
        for batch in batches:
            estimate = losses.kl(self.config.algorithm.kl.estimator, self._frozen(self.module, batch), self._frozen(self.reference, batch))
            for number, value in zip(batch.advantages[batch.target_mask].tolist(), estimate.tolist(), strict=False):
                sums[int(number)] = sums.get(int(number), 0.0) + value
        return sums

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
        sequence = TrainSequence(token_ids=token_ids, prompt_length=1, rollout_logprobs=[0.0] * length, advantages=[0.0] * length, loss_weight=0.0)
        temperature, self.module.temperature = self.module.temperature, 1.0
        try:
            return [float(x) for x in self._frozen(self.module, pack([sequence], len(token_ids))[0]).tolist()]
        finally:
            self.module.temperature = temperature

    def save(self, step: int, sampler: dict[str, Any]) -> str:
        """The checkpoint's path."""
        state = checkpoint.RunState(step=step, version=self.version, model=self._identity(), sampler=sampler)
        return str(checkpoint.save(self.root, state, self.module, self.optimizer, self.config.checkpoint.keep))

    def restore(self) -> checkpoint.RunState | None:
        """Of the newest whole checkpoint; None when there is none. Raises BadData."""
        path = checkpoint.newest(self.root)
        if path is None:
            return None
        state = checkpoint.read_run(path, self._identity())
        checkpoint.load(path, self.module, self.optimizer)
        self.version = state.version
        return state

    def _identity(self) -> dict[str, Any]:
        return identity(self.config.model, load_config(self.config.model))

    def export(self) -> str:
        """The model as a Hugging Face checkpoint under <checkpoint.path>/export, in the engine's dtype."""
        target = self.root / "export"
        weights = {name: tensor.cpu() for name, tensor in self.source if self.rank == 0}
        if self.rank == 0:
            self.module.lm.save_pretrained(target, state_dict=weights)
            load_tokenizer(self.config.model).save_pretrained(target)
            make_readable(target)
        dist.barrier()
        return str(target)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
