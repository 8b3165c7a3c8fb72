"""Which way the weights take, and a trainer rank's end of it by vLLM's trainer factory."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from rlhf_api.job import PlacementMode
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec
from rlhf_worker.weights.plan import RankPlan

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from vllm.distributed.weight_transfer.base import TrainerInitInfo

    from rlhf_worker.weights.client import EnginesClient
    from rlhf_worker.weights.source import PolicySource

PLANNED = ("ipc", "shm", "nccl", "gloo")  # ours; the others but `adapter` are vLLM's own
ADAPTER = "adapter"  # PEFT's files through Ray, for model.lora
IPC_BUFFER_BYTES = 512 << 20  # that vLLM's ipc backend stages on a GPU, or its largest tensor, which must fit


def choose(config: RunConfig, device: str) -> str:
    """device: "cuda" or "cpu". Raises BadSpec for a wish that cannot be met."""
    if config.model.lora is not None:
        return ADAPTER
    wish = config.weight_sync.backend
    able = _able(config, device)
    if wish == "auto":
        return able[0]
    if wish not in able:
        raise BadSpec(f"spec.weightSync.backend is {wish}, but the run is {config.placement.mode.value} on {device}: "
            f"use auto, or one of {', '.join(able)}")
    return wish


def _able(config: RunConfig, device: str) -> list[str]:
    """Backends that this run can use, best first. ipc and shm reach other nodes by nccl and gloo."""
    if device == "cpu":
        return ["shm", "gloo"]
    separated = config.placement.mode is PlacementMode.SEPARATED
    return ["nccl", "vllm-nccl", "sharded_rdt"] if separated else ["ipc", "vllm-ipc"]


def engine_backend(backend: str) -> str:
    """The name under which vLLM's engine knows it."""
    return "planned" if backend in PLANNED else backend.removeprefix("vllm-")


def trainer_info(
    backend: str, rank: int, address: tuple[str, int], config: RunConfig, engines: int, source: "PolicySource",
    distrusted: frozenset[str]
) -> "TrainerInitInfo":
    """Of this trainer rank. Raises BadSpec for a backend whose packages are missing."""
    ranks, deadline = config.rollout.tensor_parallel_size, config.weight_sync.deadline_seconds
    if backend in PLANNED:
        from rlhf_worker.weights.sender import PlannedTrainerInitInfo

        return PlannedTrainerInitInfo(
            backend, address[0], len(config.placement.trainer_slots), rank=rank, deadline_seconds=deadline,
            distrusted=distrusted,
        )
    if backend == "vllm-ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        largest = max(prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(IPC_BUFFER_BYTES, largest))
    if backend == "vllm-nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            rank=rank, master_address=address[0], master_port=address[1], world_size=1 + engines * ranks, packed=True,
        )
    return _sharded_rdt(rank, engines, ranks, deadline)


class Sender:
    """A trainer rank's end. Rank 0 talks to the engines."""

    def __init__(
        self, config: RunConfig, source: "PolicySource", rank: int, engines: list["ActorHandle"], backend: str,
        address: tuple[str, int], distrusted: frozenset[str],
    ) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        from rlhf_worker.weights.client import EnginesClient
        from rlhf_worker.weights.plugin import register

        self.planned, self.adapter = backend in PLANNED, backend == ADAPTER
        self.client = EnginesClient(engines, config.rollout.tensor_parallel_size, config.weight_sync.deadline_seconds)
        if self.adapter:
            self.engine: Any = AdapterSender(config, self.client, source, rank)
            return
        register()
        info = trainer_info(backend, rank, address, config, len(engines), source, distrusted)
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=self.client, source=source)

    def send(self, version: int, *, prove: bool) -> None:
        """Raises DeadlineExceeded, LinkBroken, or what an engine raised."""
        self.client.begin()
        self.engine.send_weights(**{"proof": prove} if self.planned else {"version": version} if self.adapter else {})

    def checksums(self) -> list[dict[str, int]]:
        found: list[dict[str, int]] = self.engine.checksums()
        return found

    def notes(self) -> list[str]:
        """What is not written in place, and why."""
        return describe(self.engine.plans) if self.planned else []

    def close(self) -> None:
        self.engine.shutdown()


class AdapterSender:
    """A trainer rank's end where only adapters are trained. They are small: rank 0 hands them whole to every engine."""

    def __init__(self, config: RunConfig, client: "EnginesClient", source: "PolicySource", rank: int) -> None:
        self.model, self.engine_ranks = config.model, config.rollout.tensor_parallel_size
        self.client, self.source, self.rank = client, source, rank

    def send_weights(self, version: int) -> None:
        from rlhf_worker.lora import files

        weights = {name: tensor.cpu() for name, tensor in self.source if self.rank == 0}  # on every rank: it gathers
        if self.rank == 0:
            self.client.load_adapter(version, files(self.model, weights))

    def checksums(self) -> list[dict[str, int]]:
        """All of it is rank 0's share, and every tensor-parallel rank is given all of it. vLLM multiplies B by the
        adapters' scale as it loads it.
        """
        from rlhf_worker.lora import NAME
        from rlhf_worker.weights.checksum import whole

        assert self.model.lora is not None
        factors = {"A": 1.0, "B": self.model.lora.alpha / self.model.lora.rank}
        own = {
            name.replace(f".{NAME}.", "."): 0 if self.rank else int(whole(tensor * factors[name.split(".")[-3][-1]]))
            for name, tensor in self.source
        }
        return [own] * self.engine_ranks

    def shutdown(self) -> None:
        """There is no link."""


def describe(plans: Sequence[RankPlan]) -> list[str]:
    """What the plans leave to load_weights or leave alone, a line a reason."""
    reasons: dict[str, list[str]] = {}
    for plan in plans:
        for name, why in plan.reload.items():
            reasons.setdefault(why, []).append(name)
    lines = [
        f"{len(set(names))} tensors go through load_weights, such as {names[0]}: {why}"
        for why, names in reasons.items()
    ]
    kept = sorted({name for plan in plans for name in plan.kept})
    return lines + ([f"{len(kept)} parameters stay as vLLM loaded them, such as {kept[0]}: the trainer has no tensor "
        "for them"] if kept else [])


def _sharded_rdt(rank: int, engines: int, ranks: int, deadline: float) -> "TrainerInitInfo":
    from importlib.util import find_spec

    if find_spec("nixl") is None:
        raise BadSpec("spec.weightSync.backend is sharded_rdt, which needs the package nixl in spec.image: add it, or "
            "use auto")
    import ray
    from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerInitInfo

    return ShardedRDTTrainerInitInfo(
        rank=rank, num_consumers=engines * ranks, workers_per_replica=ranks,
        trainer_actor_namespace=ray.get_runtime_context().namespace, stall_timeout_s=deadline,
    )
