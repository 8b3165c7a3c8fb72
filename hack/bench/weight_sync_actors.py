"""Both ends of the weight-sync benchmark: a trainer with random weights, an engine with dummy ones, and every way from
one to the other.

A way is a function from (trainer, engine) to a `Connected`; what is timed is its `send`, in the trainer's process, as
vLLM's API drives a sync from there. """

import gc
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from hack.bench.weight_base import Sample, free_ports, parameters, timed
from rlhf_worker.engines.engine import Engine
from rlhf_worker.weights.backends import IPC_BUFFER_BYTES, describe
from rlhf_worker.weights.client import EnginesClient
from rlhf_worker.weights.compare import compare
from rlhf_worker.weights.plugin import register
from rlhf_worker.weights.sender import PlannedTrainerInitInfo
from rlhf_worker.weights.source import PolicySource

HOST = "127.0.0.1"
DEADLINE_SECONDS = 120.0
WARMUP, REPEAT = 2, 20
MIB = 1 << 20


def memory(_: Any = None) -> dict[str, float]:
    """MiB of this process's GPU: torch's own, and all that the device has in use. Nothing on a CPU. Also runs in vLLM's
    worker.
    """
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated() / MIB, "reserved": torch.cuda.memory_reserved() / MIB,
        "device": (total - free) / MIB,
    }


def open_files(_: Any = None) -> int:
    """Of this process. Also runs in vLLM's worker."""
    return len(list(Path("/proc/self/fd").iterdir()))


def settle(_: Any = None) -> None:
    """Gives back what nobody uses, so that the next way's memory is its own. Also runs in vLLM's worker."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


class BenchEngine(Engine):
    """The product's engine actor, without a job: what a client of the weight transfer calls is the same code."""

    def __init__(self) -> None:
        no_job: Any = None
        super().__init__(no_job, index=0, device="", bundles=[0], gpus=[], threads=1)

    async def start(self, backend: str, *, model: str = "", dtype: str = "bfloat16", device: str = "cuda") -> str:
        """One engine has one backend for life. Returns vLLM's version."""
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args: dict[str, Any] = {
            "model": model, "dtype": dtype, "load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 8, "kv_cache_memory_bytes": 256 << 20, "disable_log_stats": True,
            "distributed_executor_backend": "uni",
            "weight_transfer_config": {"backend": backend},
        }
        args |= {"enable_chunked_prefill": False} if device == "cpu" else {"gpu_memory_utilization": 0.3}
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        return str(vllm.__version__)

    async def collective(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(worker, *args) in vLLM's worker process."""
        return (await self._running().collective_rpc(function, args=args))[0]


def nothing() -> None:
    """What most ways do before and after a sync, and to prove it."""


@dataclass
class Connected:
    """send: the timed part; returns a Sample where it was timed elsewhere. The others are not timed."""

    send: Callable[[], object]
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing
    # whether the engine holds what the trainer has; None where nothing compares them
    equal: Callable[[], bool | None] = nothing
    close: Callable[[], object] = nothing
    notes: dict[str, Any] = field(default_factory=dict)
    repeat: int = REPEAT


class BenchTrainer:
    """One process with a checkpoint's parameters, random, on its first GPU or the CPU."""

    def __init__(self, shape: str, dtype: str, device: str) -> None:
        self.device = device
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        self.tensors = {
            name: torch.empty(size, dtype=kind, device=device).normal_(std=0.02)
            for name, size in parameters(shape).items()
        }
        self.connected = Connected(nothing)
        self.deadline_seconds = DEADLINE_SECONDS

    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def memory(self) -> dict[str, float]:
        return memory()

    def settle(self) -> None:
        settle()

    def source(self) -> PolicySource:
        return PolicySource(lambda: self.tensors.items(), next(iter(self.tensors.values())).dtype)

    def files(self) -> int:
        return open_files()

    def connect(self, way: str, engine: ActorHandle, deadline_seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Returns the seconds that it took, and what is to be noted. Raises what either end raises."""
        began, self.deadline_seconds = time.perf_counter(), deadline_seconds
        self.connected = WAYS[way](self, engine)
        return {"connect_seconds": time.perf_counter() - began, **self.connected.notes}

    def send(self, count: int) -> float:
        """Seconds of so many syncs in a row."""
        began = time.perf_counter()
        for _ in range(count):
            self.connected.before()
            self.connected.send()
        return time.perf_counter() - began

    def syncs(self) -> tuple[list[Sample], list[bool | None]]:
        """Samples of the timed syncs, and the verdict on each."""
        samples, verdicts = [], []
        for _ in range(WARMUP + self.connected.repeat):
            torch._foreach_add_(list(self.tensors.values()), 1e-3)  # no sync may live on what the one before delivered
            self.connected.before()
            samples.append(self._sync())
            self.connected.after()
            verdicts.append(self.connected.equal())
        return samples[WARMUP:], verdicts[WARMUP:]

    def _sync(self) -> Sample:
        sent: list[object] = []
        sample = timed(lambda: sent.append(self.connected.send()), self.device)
        return sent[0] if isinstance(sent[0], Sample) else sample

    def close(self) -> None:
        self.connected.close()
        self.connected = Connected(nothing)
        settle()


def client_of(engine: ActorHandle) -> EnginesClient:
    return EnginesClient([engine], 1, DEADLINE_SECONDS)


def held(client: EnginesClient) -> None:
    """What comes before a sync whatever its way, and is not timed: the engine runs no step until the next resume."""
    client.begin()
    ray.get([engine.pause.remote() for engine in client.engines], timeout=DEADLINE_SECONDS)


def through_vllm(trainer: BenchTrainer, engine: ActorHandle, info: Any) -> Connected:
    """One of vLLM's backends, as it comes."""
    client = client_of(engine)
    transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=trainer.source())
    return Connected(transfer.send_weights, before=lambda: held(client), close=transfer.shutdown)


def nccl_info(*, packed: bool) -> NCCLTrainerInitInfo:
    return NCCLTrainerInitInfo(rank=0, master_address=HOST, master_port=free_ports(1)[0], world_size=2, packed=packed)


def nccl_packed(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    return through_vllm(trainer, engine, nccl_info(packed=True))


def ipc(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    return through_vllm(trainer, engine, IPCTrainerInitInfo(rank=0))


def ipc_packed(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    # it refuses a tensor that does not fit
    buffer = max(IPC_BUFFER_BYTES, *(tensor.nbytes for tensor in trainer.tensors.values()))
    made = through_vllm(trainer, engine, IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=buffer))
    made.notes["buffer_bytes"] = buffer
    return made


def one_by_one(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    """A broadcast and an RPC for every parameter: what trainers do that use vLLM's API in the plainest way."""
    client, source = client_of(engine), trainer.source()
    transfer = WeightTransferTrainerFactory.trainer_init(nccl_info(packed=False), client=client, source=source)
    pool = ThreadPoolExecutor(max_workers=1)

    def send() -> None:
        client.start_weight_update()
        for meta, (_, tensor) in zip(source.metadata(), source, strict=True):
            update = {
                "names": [meta.name], "dtype_names": [str(meta.dtype).removeprefix("torch.")],
                "shapes": [list(meta.shape)],
            }
            received = pool.submit(client.update_weights, update)
            transfer.model_update_group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            received.result()
        client.finish_weight_update()

    # seconds each: five say enough
    return Connected(send, before=lambda: held(client), close=transfer.shutdown, repeat=5)


def bare_nccl(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    """One send of one contiguous buffer of as many bytes, to a receiver that already waits: the link, and nothing else.
    """
    port, buffer = free_ports(1)[0], torch.randint(0, 256, (trainer.bytes(),), dtype=torch.uint8, device=trainer.device)
    joined = engine.collective.remote(join_bare, port, buffer.numel())
    group = stateless_init_process_group(HOST, port, 0, 2, torch.cuda.current_device())
    ray.get(joined, timeout=DEADLINE_SECONDS)

    def call(function: Callable[..., Any]) -> None:
        ray.get(engine.collective.remote(function), timeout=DEADLINE_SECONDS)

    def send() -> None:
        group.send(buffer, 1, torch.cuda.current_stream())

    # The first send and receive set the connection up, each waiting for the other on the host.
    posted = engine.collective.remote(post_bare)
    send()
    ray.get(posted, timeout=DEADLINE_SECONDS)

    def close() -> None:
        left = engine.collective.remote(leave_bare)
        group.destroy()
        ray.get(left, timeout=DEADLINE_SECONDS)

    return Connected(send, before=lambda: call(post_bare), after=lambda: call(wait_bare), close=close)


def join_bare(worker: Any, port: int, count: int) -> None:
    """In vLLM's worker."""
    worker.bare_group = stateless_init_process_group(HOST, port, 1, 2, torch.cuda.current_device())
    worker.bare_buffer = torch.empty(count, dtype=torch.uint8, device=worker.device)


def post_bare(worker: Any) -> None:
    """The receive is on its stream when this returns."""
    worker.bare_group.recv(worker.bare_buffer, 0, torch.cuda.current_stream())


def wait_bare(worker: Any) -> None:
    torch.cuda.synchronize()


def leave_bare(worker: Any) -> None:
    worker.bare_group.destroy()
    del worker.bare_group, worker.bare_buffer


def copy_alone(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    """The same tensors into a second set in the same process: on one GPU or one CPU nothing can be faster."""
    source = list(trainer.tensors.values())
    second = [torch.empty_like(tensor) for tensor in source]
    return Connected(lambda: torch._foreach_copy_(second, source))


def packing(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
    """What vLLM does on a CPU to the weights of every linear layer and of the head after they have changed."""

    def call(function: Callable[..., Any]) -> Any:
        return ray.get(engine.collective.remote(function), timeout=DEADLINE_SECONDS)

    return Connected(lambda: call(pack), before=lambda: call(unpack))


def packed_modules(worker: Any) -> list[Any]:
    """In vLLM's worker. The embedding is no matrix product, though vLLM packs it too."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return [
        module for module in worker.model_runner.get_model().modules()
        if isinstance(module, LinearBase | ParallelLMHead)
    ]


def unpack(worker: Any) -> None:
    """New random weights in the place of those that were packed away."""
    for module in packed_modules(worker):
        if module.weight.numel() == 0:
            size = module.output_size_per_partition, module.input_size_per_partition
            module.weight = torch.nn.Parameter(
                torch.empty(size, dtype=module.weight.dtype).normal_(std=0.02), requires_grad=False,
            )


def pack(worker: Any) -> Sample:
    modules = packed_modules(worker)

    def work() -> None:
        for module in modules:
            module.quant_method.process_weights_after_loading(module)

    return timed(work, "cpu")


def planned(link: str) -> Callable[[BenchTrainer, ActorHandle], Connected]:
    """Ours. link: "ipc" | "shm" | "nccl" | "gloo"."""

    def connect(trainer: BenchTrainer, engine: ActorHandle) -> Connected:
        register()
        client, source = EnginesClient([engine], 1, trainer.deadline_seconds), trainer.source()
        began = time.perf_counter()
        plans = client.plans(pickle.dumps(source.own_metas()), frozenset())
        notes = {
            "record_seconds": time.perf_counter() - began, "moves": [len(plan.moves) for plan in plans],
            "fallbacks": describe(plans)
        }
        info = PlannedTrainerInitInfo(link, HOST, rank=0, deadline_seconds=trainer.deadline_seconds)
        transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)

        def equal() -> bool:
            # what is packed away is summed up as it comes, which would be timed: send it once more
            if trainer.device == "cpu":
                client.begin()
                transfer.send_weights(proof=True)
            theirs = engine.checksums.remote()
            ours = transfer.checksums()
            return not compare([ours], [ray.get(theirs, timeout=DEADLINE_SECONDS)]).wrong

        return Connected(
            transfer.send_weights, before=lambda: held(client), equal=equal, close=transfer.shutdown, notes=notes,
        )

    return connect


WAYS: dict[str, Callable[[BenchTrainer, ActorHandle], Connected]] = {
    "bare NCCL send": bare_nccl, "vLLM nccl packed": nccl_packed, "one RPC a parameter": one_by_one,
    "ours, NCCL": planned("nccl"),
    "_foreach_copy_ alone": copy_alone, "vLLM ipc as it comes": ipc, "vLLM ipc packed": ipc_packed,
    "ours, IPC": planned("ipc"),
    "memcpy of the bytes": copy_alone, "packing alone": packing, "ours, shared memory": planned("shm"),
    "ours, gloo": planned("gloo"),
}
