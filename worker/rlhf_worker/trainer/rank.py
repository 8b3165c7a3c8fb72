"""One rank of a group of processes that hold roles: forward passes, loss, gradients, optimizer, weights out,
checkpoints.

Every public method is a collective: all ranks of the group call it at once. The trainer's own group holds every role
that has no GPUs of its own. With trainer.offload one role at a time lies on the device, and none while engines
generate. """

import gc
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from rlhf_api.memory import GIB, Shape, keeps_attention, room_tokens, shape_of
from rlhf_api.run import TRAINED, RunConfig
from rlhf_worker import lora
from rlhf_worker.addresses import tcp
from rlhf_worker.algorithm import custom
from rlhf_worker.algorithm.losses import policy_loss, value_loss
from rlhf_worker.algorithm.schedule import learning_rate
from rlhf_worker.deadlines import collective_seconds, work_seconds
from rlhf_worker.engines.hf import Generator
from rlhf_worker.errors import Diverged, RewardFailed
from rlhf_worker.experience import (
    Batching,
    Floats,
    PackedBatch,
    Sample,
    TrainSequence,
    at_targets,
    by_sample,
    dealt,
    packed,
    taken,
    within,
)
from rlhf_worker.pace import DONE
from rlhf_worker.pretrained import export, export_tokenizer, identity, load_config, make_readable
from rlhf_worker.rollout.episode import Request
from rlhf_worker.storage import Store
from rlhf_worker.trainer.checkpoint import Outcome, Restored, RunState, Saver
from rlhf_worker.trainer.flops import device_peak
from rlhf_worker.trainer.model import PREFIX, mesh_of, policy_pass, scores_of, values_of, wrap_layers
from rlhf_worker.trainer.roles import Role, Text
from rlhf_worker.weights.backends import Sender
from rlhf_worker.weights.layout import layout_of
from rlhf_worker.weights.source import PolicySource

LIMIT = "tokens-per-micro-batch"  # file: what a start before found to be the most, after it ran out of memory


def _driver() -> str:
    """The driver that this process belongs to. Ray counts its drivers anew in each session."""
    if not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"{context.get_session_name()}/{context.get_job_id()}"


class Trainer:
    """`join` first, then `load`; then the rest. `names`: the roles of this group."""

    def __init__(
        self, config: RunConfig, names: Sequence[str], rank: int, world: int, device: str, threads: int,
    ) -> None:
        self.config = config
        self.names = [name for name in names if name != "reference" or not config.reference_in_policy]
        self.rank = rank
        self.world = world
        self.device = torch.device(device)
        self.peak = device_peak(self.device)
        self.store = Store(config.checkpoint.path)
        self.version = 0
        self.attention = False  # whether checkpointed layers keep what theirs made
        self.budget = 0  # tokens of a micro-batch, where they are this rank's to find
        self.sender: Sender | None = None
        self.generator: Generator | None = None  # of rollout.engine hf
        self.roles: dict[str, Role] = {}
        if device == "cpu":
            torch.set_num_threads(threads)

    def join(self, address: tuple[str, int]) -> None:
        """Form the trainer's process group. gloo beside NCCL carries objects and barriers."""
        if self.device.type == "cuda":
            torch.cuda.set_device(0)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=tcp(*address), rank=self.rank, world_size=self.world,
            timeout=timedelta(seconds=collective_seconds(self.config)),
        )  # fmt: skip

    def load(self) -> dict[str, Batching]:
        """Every role's model, one after the other; how each wants its batches. Raises BadSpec."""
        self.custom_loss = custom.loss(self.config, self.device)
        cp = self.config.trainer.context_parallel
        mesh, cp_mesh = mesh_of(self.device.type, self.world, self.config.shards(self.world)), None
        if cp > 1:
            cp_mesh = init_device_mesh(self.device.type, (self.world // cp, cp), mesh_dim_names=("dp", "cp"))["cp"]
        for name in self.names:
            self.roles[name] = Role(self.config, name, mesh, cp_mesh, self.device)
            self._rest()
        self.attention = keeps_attention(self.config, *self._sizes(), self.world, self._share())
        for role in self.roles.values():
            wrap_layers(role.module, self.config.trainer, attention=self.attention)
        if "policy" in self.roles:
            module = self.roles["policy"].module
            sent = [
                name
                for name, parameter in module.named_parameters()
                if parameter.requires_grad or self.config.rollout.engine == "hf"
            ]
            self.places = [
                (name.removeprefix(PREFIX), module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
                for name in sent
            ]
            transient = self.config.trainer.offload and self.device.type == "cuda"
            layout = {} if self.config.model.lora else layout_of(module.lm)
            self.source = PolicySource(
                self._named, getattr(torch, self.config.model.dtype), layout, transient=transient,
            )
            if self.config.rollout.engine == "hf":
                self.generator = Generator(self.config, self.rank, self.device)
        expected = [name for name in self.config.roles if name in TRAINED]
        given, leads, seconds = self.config.checkpoint, "policy" in self.names, work_seconds(self.config)
        self.saver = Saver(given.path, given.keep, expected, _driver(), leads=leads, seconds=seconds, best=given.best)
        return {name: role.batching for name, role in self.roles.items()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters, or its adapters, sharded."""
        self.roles["policy"].module.reshard()  # a forward pass without a backward leaves the root's whole
        # Looked up in their modules each time: FSDP may replace the objects. Walking the modules anew would cost more
        # than a sync.
        return ((name, getattr(module, key)) for name, module, key in self.places)

    def _use(self, name: str, *, state: bool = False) -> Role:
        """The role with its parameters, and with `state` its optimizer's, on the device; where memory is short, without
        the others.
        """
        role = self.roles[name]
        if self.config.trainer.offload:
            for other in self.roles.values():
                if other is not role:
                    other.put_away()
            role.fetch(state=state)
        return role

    def _rest(self, *, parameters: bool = True) -> None:
        """The device is the engines'; without `parameters` those that are on it stay."""
        if self.config.trainer.offload:
            for role in self.roles.values():
                role.put_away(parameters=parameters)
        if self.config.engines_sleep:
            torch.cuda.empty_cache()  # theirs is taken anew

    @contextmanager
    def _briefly(self, name: str) -> Iterator[Role]:
        yield self._use(name)
        self._rest()

    # Forward passes.

    @torch.no_grad()
    def logprobs(self, name: str, batches: list[PackedBatch]) -> dict[int, Floats]:
        """Of the policy or the reference: the log probability of each completion token of each sample, by the sample's
        number.
        """
        bare = name not in self.roles  # a reference without weights of its own
        module = self._use("policy" if bare else name).module
        with lora.off(module) if bare else nullcontext():
            found = {
                index: row
                for batch in batches
                for index, row in by_sample(batch, policy_pass(module, batch, self.device)[0]).items()
            }
        self._rest(parameters=False)
        return found

    @torch.no_grad()
    def values(self, batches: list[PackedBatch]) -> dict[int, Floats]:
        """Of the critic: the value of the state before each completion token of each sample, by the sample's number."""
        module = self._use("critic").module
        found = {
            index: row
            for batch in batches for index, row in by_sample(batch, values_of(module, batch, self.device)).items()
        }
        self._rest(parameters=False)
        return found

    @torch.no_grad()
    def scores(self, name: str, prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        """Of a reward model, one a sample, in their order; every rank gets all samples and returns all. Raises BadSpec,
        RewardFailed.
        """
        sequences = [
            self.roles[name].read(index, *pair) for index, pair in enumerate(zip(prompts, completions, strict=True))
        ]
        lengths, padded = [sequence.length for sequence in sequences], self.roles[name].batching.padded
        own_batches = dealt(lengths, self.world, self.config.trainer, padded=padded)[self.rank]
        batches = taken(sequences, own_batches, self.config.trainer)
        with self._briefly(name) as role:
            own = {
                index: value
                for b in batches
                for index, value in zip(b.indices, scores_of(role.module, b, self.device).tolist(), strict=True)
            }
        found: list[dict[int, float]] = [own] * self.world
        dist.all_gather_object(found, own)
        scores = {index: value for part in found for index, value in part.items()}
        if bad := [index for index in range(len(sequences)) if not math.isfinite(scores[index])]:
            raise RewardFailed(f"{name}: the score of prompt {prompts[bad[0]]!r:.200}, completion "
                f"{completions[bad[0]]!r:.200} is {scores[bad[0]]}")
        return [scores[index] for index in range(len(sequences))]

    # Training.

    def token_budget(self) -> int:
        """Tokens of a micro-batch for which this rank has room beside its models. Asked while no engine has the
        memory; found once, so that the batches of a step fit what was asked before it.
        """
        if not self.budget:
            free, total = torch.cuda.mem_get_info()
            room = min(self._share(), free + torch.cuda.memory_reserved())
            self.budget = room_tokens(self.config, *self._sizes(), self.world, room, attention=self.attention)
            if LIMIT in self.store.names():
                self.budget = min(self.budget, int(self.store.read(LIMIT)))
            if not self.rank:
                print(f"{', '.join(self.names)}: micro-batches of up to {self.budget} tokens, in {room / GIB:.1f} of "
                    f"{total / GIB:.1f} GiB", flush=True)
        return self.budget

    def _share(self) -> int:
        """Bytes of its device that are this rank's; a host's are not counted."""
        if self.device.type != "cuda":
            return sys.maxsize
        share = self.config.placement.trainer_fraction if "policy" in self.names else 1.0
        return int(share * torch.cuda.mem_get_info()[1])

    def _sizes(self) -> tuple[dict[str, int], dict[str, Shape]]:
        """Parameters and shape of each role."""
        counts = {name: sum(p.numel() for p in role.module.parameters()) for name, role in self.roles.items()}
        return counts, {name: shape_of(role.module.lm.config) for name, role in self.roles.items()}

    def train(self, name: str, updates: list[list[PackedBatch]]) -> dict[str, float]:
        """This rank's micro-batches of each optimizer update. Returns means over the step, the same on every rank.
        Raises Diverged.
        """
        role, spec = self._use(name), self.config.trainer
        critic = self.config.critic
        left_out = critic.warmup_steps if name == "policy" and critic else 0
        base = critic.learning_rate if name == "critic" and critic else spec.learning_rate
        role.steps = max(role.steps, left_out) + 1
        # By the step, so that a run that is resumed with other updatesPerStep or epochs ends at the floor too.
        before, total = ((steps - left_out) * len(updates) for steps in (role.steps - 1, spec.steps))
        sums: dict[str, Tensor] = {}
        for number, batches in enumerate(updates, before):
            for key, value in self._update(role, batches, learning_rate(spec, base, number, total)).items():
                sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value / len(updates)
        self._rest(parameters=False)  # the policy's are wanted by the sync next
        return self._reduced(sums | self._done(role, [batch for batches in updates for batch in batches]))

    def _done(self, role: Role, batches: list[PackedBatch]) -> dict[str, Tensor]:
        """This rank's share of what the step computed, what its device could in a second, the most memory that tensors
        took since the last one, and the policy's bytes as engines get them. Fillers count nothing.
        """
        own = [batch for batch in batches if batch.indices != [-1]]
        tokens = sum(len(batch.token_ids) for batch in own)
        counts = {"flops": role.flops.of_batches(own), "tokens": tokens, "micro_batches": len(own)}
        shared = {name: count / self.config.trainer.context_parallel for name, count in counts.items()}
        found = shared | {"peak": self.peak, "memory": self._most_memory()}
        if role.name == "policy":
            found["weights"] = sum(one.numel() for one in self.source.local_tensors()) * self.source.dtype.itemsize
            found["weights"] *= self.config.shards(self.world) / self.world  # copies hold the same
        return {f"{DONE}{name}": torch.tensor(count, device=self.device) for name, count in found.items()}

    def _most_memory(self) -> float:
        """In bytes; NaN without a GPU."""
        if self.device.type != "cuda":
            return math.nan
        most = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return float(most)

    def _update(self, role: Role, batches: list[PackedBatch], rate: float) -> dict[str, Tensor]:
        """One optimizer update; this rank's share of its metrics. Raises Diverged, with the weights as they were."""
        made = self._passes(role, batches)
        norm = role.gradient_norm(self.config.trainer.max_grad_norm)
        self._require_finite(role, made["loss"], norm, batches)
        role.update(rate)
        self.version += role.name == "policy"
        return {
            **made, "grad_norm": norm / self.world,
            "learning_rate": torch.tensor(rate / self.world, device=self.device),
        }

    def _passes(self, role: Role, batches: list[PackedBatch]) -> dict[str, Tensor]:
        """Gradients of one update; sums of its metrics. Where the first finds too little memory for a budget of this
        rank's own, it is made anew with half of that.
        """
        while True:
            if self.budget and self.world == 1:
                batches = within(batches, self.budget)
            made: dict[str, Tensor] = {}
            try:
                for batch in role.each(batches):
                    for key, value in self._backward(role, batch).items():
                        made[key] = made.get(key, torch.zeros((), device=self.device)) + value
                role.fits = True
                return made
            except torch.OutOfMemoryError:
                if role.fits or not self._halved(batches):
                    raise
            gc.collect()  # out of the handler, which held what the passes had made
            role.abandon()

    def _halved(self, batches: list[PackedBatch]) -> bool:
        """Whether smaller micro-batches may go on here. Where several ranks work together the others wait in a
        collective for this one: the run ends, and its next start knows the limit.
        """
        largest = max(batches, key=lambda batch: len(batch.token_ids))
        if not self.budget or len(largest.indices) == 1:
            return False
        self.budget = len(largest.token_ids) // 2
        when = "now" if self.world == 1 else "the next start"
        print(f"out of memory with a micro-batch of {len(largest.token_ids)} tokens: {self.budget} from {when} on",
            file=sys.stderr, flush=True)
        if self.world > 1:
            self.store.write(LIMIT, str(self.budget // self.config.trainer.context_parallel).encode())
        return self.world == 1

    def _backward(self, role: Role, batch: PackedBatch) -> dict[str, Tensor]:
        """Gradients of one micro-batch. FSDP averages over ranks, so the loss is multiplied by their number."""
        columns, sequence = at_targets(batch, self.device)
        if role.name == "critic":
            loss, metrics = value_loss(self.config.algorithm, values_of(role.module, batch, self.device), columns)
        else:
            logprobs, entropy = policy_pass(role.module, batch, self.device)
            loss, metrics = policy_loss(self.config.algorithm, logprobs, entropy, columns, sequence, self.custom_loss)
        torch.autograd.backward(loss * self.world)
        # Each of the ranks that share a batch has the loss of all of it, and its metrics.
        return {
            name: value.detach() / self.config.trainer.context_parallel
            for name, value in (metrics | {"loss": loss}).items()
        }

    def _require_finite(self, role: Role, loss: Tensor, norm: Tensor, batches: list[PackedBatch]) -> None:
        """All ranks stop together; one file holds the batches of all, by rank."""
        bad = loss.isfinite().logical_and(norm.isfinite()).logical_not().float()
        dist.all_reduce(bad)
        if not bad.item():
            return
        name, parts = f"diverged-step-{role.steps}.pt", [None] * self.world if self.rank == 0 else None
        dist.gather_object(
            {"role": role.name, "loss": loss.item(), "gradient_norm": norm.item(), "batches": batches}, parts,
        )
        if self.rank == 0:
            dump = io.BytesIO()
            torch.save(parts, dump)
            self.store.write(name, dump.getvalue())
        dist.barrier()
        raise Diverged(
            f"the {role.name}'s loss is {loss.item():g} on rank {self.rank}, its gradient norm "
                f"{norm.item():g}, in step {role.steps}: "
            f"the batch is in {self.store.url(name)}; lower the learning rate, or look for bad rewards"
        )

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    # The policy's weights, out.

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """What transformers' model of the policy consists of, in the engine's dtype: whole parameters, and buffers that
        checkpoints have too.
        """
        lm = self.roles["policy"].module.lm
        yield from self.source.whole()
        buffers = dict(lm.named_buffers())
        yield from ((name, buffers[name]) for name in lm.state_dict() if name in buffers)

    def refresh(self) -> int:
        """The weights into this rank's own generator; returns their version."""
        assert self.generator is not None
        with self._briefly("policy"):
            self.generator.refresh(lora.merged(dict(self._whole()), self.config.model.lora).items(), self.version)
        return self.version

    def generate(self, requests: list[Request], deadline_seconds: float) -> list[Sample | None]:
        assert self.generator is not None
        return self.generator.generate(requests, deadline_seconds)

    def connect(
        self, engines: list[ActorHandle], backend: str, address: tuple[str, int], distrusted: frozenset[str],
    ) -> list[str]:
        """Open the way to the engines, in place of the one before. Returns what an administrator should know of it."""
        if self.sender is not None:
            self.sender.close()
        with self._briefly("policy"):
            self.sender = Sender(self.config, self.source, self.rank, engines, backend, address, distrusted)
        return self.sender.notes()

    def send(self, *, prove: bool) -> int:
        """The weights into all engines; returns their version."""
        assert self.sender is not None
        with self._briefly("policy"):
            self.sender.send(self.version, prove=prove)
        return self.version

    def checksums(self) -> list[dict[str, int]]:
        """This rank's share of what each engine rank's parameters must sum up to."""
        assert self.sender is not None
        with self._briefly("policy"):
            return self.sender.checksums()

    def probe(self, token_ids: list[int]) -> list[float]:
        """Log probability of each token after the first, at temperature 1."""
        sequence = replace(TrainSequence.plain(token_ids), prompt_length=1, mask=np.ones(len(token_ids) - 1, np.bool_))
        with self._briefly("policy") as role, torch.no_grad():
            temperature, role.module.temperature = role.module.temperature, 1.0
            try:
                return [
                    float(x)
                    for x in policy_pass(role.module, packed([sequence]), self.device)[0].tolist()
                ]
            finally:
                role.module.temperature = temperature

    # Files.

    def fence(self, job: str, attempt: int) -> None:
        """From now on only this driver writes checkpoint.path; before `restore`. Raises Fenced."""
        self.saver.fence(job, attempt)

    def save(self, step: int, sampler: dict[str, Any], loop: dict[str, Any]) -> None:
        """What the ranks hold now; it is written while they go on."""
        state = RunState(step=step, version=self.version, model=self._identity(), sampler=sampler, loop=loop)
        self.saver.begin(state, Trained(self))
        self._rest()

    def saved(self, *, wait: bool) -> list[Outcome]:
        """How the saves ended that ended since the last call. Raises Fenced."""
        return self.saver.finished(wait=wait)

    def restore(self) -> Restored:
        """Of the newest whole checkpoint, if there is one. Raises BadData, Fenced."""
        found = self.saver.restore(self._identity(), Trained(self))
        self._rest()
        if found.state:
            self.version = found.state.version
            for role in self.roles.values():
                role.steps = found.state.step
        return found

    def _identity(self) -> dict[str, Any]:
        return identity(self.config.model, load_config(self.config.model))

    def export(self, *, best: bool = False) -> str:
        """The model as a Hugging Face checkpoint, or its adapters in PEFT's format, under <checkpoint.path>/export, in
        the engine's dtype. Raises Fenced.

        best: that of the best checkpoint, under export-best; the policy is that one then. Where there is none, "".
        """
        name = "export-best" if best else "export"
        with self._briefly("policy") as role:
            if best and not self.saver.load_best(role.module):
                return ""
            weights = {name: tensor.cpu() for name, tensor in self._whole() if self.rank == 0}
        if self.rank == 0:
            adapters = self.config.model.lora is not None
            with self.saver.publishing(name, lora.CONFIG if adapters else "config.json") as target:
                if adapters:
                    lora.write(target, lora.files(self.config.model, weights))
                else:
                    export(role.module.lm, self.config.model, weights, target)
                export_tokenizer(self.config.model, target)
                make_readable(target)
        dist.barrier()
        return self.store.url(name)

    def close(self) -> None:
        if self.generator is not None:
            self.generator.close()
        if dist.is_initialized():
            self.saver.close()
            dist.destroy_process_group()


class Trained(Mapping[str, tuple[nn.Module, Optimizer]]):
    """The trained roles of a trainer for its checkpoints: each is on the device from when it is asked for until the
    next one is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __getitem__(self, name: str) -> tuple[nn.Module, Optimizer]:
        role = self.trainer._use(name, state=True)
        assert role.optimizer is not None
        return role.module, role.optimizer

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.trainer.roles if name in TRAINED)

    def __len__(self) -> int:
        return len(list(iter(self)))
