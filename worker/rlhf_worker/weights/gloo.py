"""Weight transfer over gloo: what vLLM's `nccl` backend is on GPU, for CPUs. Rank 0 is the first trainer rank, then every engine's workers.

Parameters travel one by one in their checkpoint's names and shapes; the engine loads them by its own `load_weights` between
start and finish, which also repacks its linear layers.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar, Self

import torch
from torch.distributed import BroadcastOptions, ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join: `rank_offset` is its engine's first rank in a group of `world_size`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_seconds: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Name, dtype and shape of every parameter, in the order in which they come."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_seconds: float


def _join(info: GlooInitInfo | GlooTrainerInitInfo, rank: int) -> ProcessGroup:
    group = stateless_init_torch_distributed_process_group(
        info.master_address, info.master_port, rank, info.world_size, backend="gloo", timeout=timedelta(seconds=info.timeout_seconds)
    )
    assert isinstance(group, ProcessGroup)
    return group


def _broadcast(group: ProcessGroup, tensor: torch.Tensor) -> None:
    """From rank 0, in place."""
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The worker's half."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: ProcessGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.group = _join(init_info, init_info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise RuntimeError("weights were sent before init_transfer_engine")
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self.group, weight)
            self.model.load_weights([(name, weight)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # A tied head has no weights of its own to reload, so vLLM leaves its packed copy of the old embedding in place.
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        self.group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's half, on every rank; rank 0 sends, the others take part in gathering each parameter."""

    init_info_cls = GlooTrainerInitInfo
    group: ProcessGroup | None = None

    @classmethod
    def trainer_init(cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None) -> Self:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            info = GlooInitInfo(init_info.master_address, init_info.master_port, 1, init_info.world_size, init_info.timeout_seconds)
            with ThreadPoolExecutor(max_workers=1) as pool:
                workers = pool.submit(client.init_weight_transfer_engine, asdict(info))
                engine.group = _join(init_info, 0)
                workers.result()
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            received = pool.submit(self.client.update_weights, asdict(self._update_info()))
            assert self.group is not None
            for _, tensor in self.source:
                _broadcast(self.group, tensor.contiguous())
            received.result()
        finally:
            # A receiver that hangs must not turn an error here into a hang of the trainer.
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def _update_info(self) -> GlooUpdateInfo:
        assert self.source is not None
        meta = self.source.metadata()
        return GlooUpdateInfo([m.name for m in meta], [str(m.dtype).removeprefix("torch.") for m in meta], [list(m.shape) for m in meta])

    def shutdown(self) -> None:
        self.group = None
