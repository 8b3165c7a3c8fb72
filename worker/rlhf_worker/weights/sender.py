"""A trainer rank's end of the weight transfer, by vLLM's trainer factory."""

import torch
from ray.actor import ActorHandle
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlhf_api.run import RunConfig
from rlhf_worker.model import PolicyModule
from rlhf_worker.weights.client import EnginesClient
from rlhf_worker.weights.plugin import register
from rlhf_worker.weights.source import PolicySource
from rlhf_worker.weights.verify import Ledger

IPC_BUFFER_BYTES = 512 << 20  # staged on a GPU that trainer and engine share


class Sender:
    """Every rank has one; rank 0 talks to the engines, the others take part in gathering each parameter."""

    def __init__(
        self, config: RunConfig, module: PolicyModule, rank: int, engines: list[ActorHandle], backend: str, address: tuple[str, int]
    ) -> None:
        register()
        self.source = PolicySource(module, getattr(torch, config.model.dtype))
        ranks_per_engine = config.rollout.tensor_parallel_size
        deadline = config.weight_sync.deadline_seconds
        self.client = EnginesClient(engines, ranks_per_engine, deadline)
        world = 1 + len(engines) * ranks_per_engine
        info = _init_info(backend, rank, address, world, deadline)
        self.engine: TrainerWeightTransferEngine[TrainerInitInfo] = WeightTransferTrainerFactory.trainer_init(
            info, client=self.client, source=self.source
        )

    def send(self) -> None:
        """Raises DeadlineExceeded, or what an engine raised."""
        self.client.begin()
        self.engine.send_weights()

    def digests(self, shapes: list[dict[str, tuple[int, ...]]], packed: dict[str, list[str]]) -> list[dict[str, str]]:
        """What each rank of an engine with parameters of `shapes` must hold."""
        ledger = Ledger(shapes, packed)
        for name, tensor in self.source:
            ledger.add(name, tensor)
        return ledger.digests

    def gather_only(self) -> None:
        """The other ranks' part of `digests`."""
        for _ in self.source:
            pass


def _init_info(backend: str, rank: int, address: tuple[str, int], world: int, deadline: float) -> TrainerInitInfo:
    host, port = address
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=IPC_BUFFER_BYTES)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(rank=rank, master_address=host, master_port=port, world_size=world, packed=True)
    from rlhf_worker.weights.gloo import GlooTrainerInitInfo

    return GlooTrainerInitInfo(rank=rank, master_address=host, master_port=port, world_size=world, timeout_seconds=deadline)
