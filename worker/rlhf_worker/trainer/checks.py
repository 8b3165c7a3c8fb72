"""What a run needs, tried by name on every trainer rank before anything heavy is loaded: an import of torch and a
process group are all there is.

What only another spec can mend raises BadSpec; what may pass, such as memory that a predecessor still holds, raises
PreflightFailed, and the driver is started again. """

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_api.job import ModelSpec, PlacementMode
from rlhf_api.memory import (
    DTYPE_BYTES,
    GIB,
    SAVED_BYTES,
    Need,
    Shape,
    engine_activations,
    engine_share,
    kv_bytes,
    kv_tokens,
    needed_bytes,
    shape_of,
    share_field,
    trained_whole,
    training_bytes,
)
from rlhf_api.run import RunConfig
from rlhf_worker.engines.arguments import check_role_context
from rlhf_worker.errors import BadSpec, PreflightFailed, Problems
from rlhf_worker.pretrained import (
    check_template,
    check_vocabulary,
    check_weights,
    context_length,
    export,
    export_tokenizer,
    load_config,
    load_tokenizer,
    model_field,
    skeleton,
)

if TYPE_CHECKING:
    from rlhf_worker.trainer.rank import Trainer

REDUCE_SECONDS = 20.0
# Engine arguments by which weights or cache take another size than the model's config says.
OWN_SIZES = {"quantization", "kv_cache_dtype", "kv_cache_memory_bytes", "hf_overrides", "cpu_offload_gb"}
MEMORY_WAIT_SECONDS = 20.0  # for a dead predecessor's memory to be given back
SHM_BYTES = {"cuda": 32 << 20, "cpu": 8 << 20}  # a rank, where there are several: NCCL's and gloo's buffers


def _devices(rank: "Trainer") -> None:
    """One GPU a rank, by its UUID: two processes on one would halve each other's memory unseen."""
    import torch
    import torch.distributed as dist

    if rank.device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise PreflightFailed("torch sees no GPU in a trainer pod: is the device plugin there, and does "
            "spec.placement.resourceName name a GPU?")
    seen: list[Any] = [None] * rank.world
    dist.all_gather_object(seen, str(torch.cuda.get_device_properties(0).uuid))
    if len(set(seen)) < rank.world:
        raise PreflightFailed(f"{rank.world} trainer ranks see {len(set(seen))} GPUs "
            f"({', '.join(sorted(set(seen)))}): the device plugin gives one GPU out twice")


def _shared_memory(rank: "Trainer") -> None:
    found = os.statvfs("/dev/shm")
    check_shared_memory(found.f_blocks * found.f_frsize, rank.device.type, rank.world)


def check_shared_memory(size: int, device: str, world: int) -> None:
    """size: of /dev/shm, bytes. Whether NCCL really comes by with it, the next check tries. Raises PreflightFailed."""
    if world > 1 and size < (need := SHM_BYTES[device] * world):
        raise PreflightFailed(f"/dev/shm has {size >> 20} MiB, {need >> 20} MiB are needed: mount an emptyDir with "
            "medium Memory there (pods.trainer.volumes), or raise its sizeLimit")


def _reduce(rank: "Trainer") -> None:
    """The collective that FSDP lives on, with a deadline of its own: NCCL itself would wait for half an hour."""
    import torch
    import torch.distributed as dist

    value = torch.ones(1 << 16, device=rank.device)
    work = dist.all_reduce(value, async_op=True)
    assert work is not None
    end = time.monotonic() + REDUCE_SECONDS
    while not work.is_completed():
        if time.monotonic() > end:
            raise PreflightFailed(f"an all-reduce over {rank.world} trainer ranks did not end in {REDUCE_SECONDS:g} "
                "s: look at NCCL_SOCKET_IFNAME, NCCL_IB_DISABLE and the network between the pods "
                "(NCCL_DEBUG=INFO in pods.trainer.env tells)")
        time.sleep(0.01)
    work.wait(timedelta(seconds=REDUCE_SECONDS))
    if value.sum().item() != rank.world * value.numel():
        raise PreflightFailed(f"an all-reduce over {rank.world} trainer ranks gave a wrong sum: a GPU or a link is "
            "faulty")


# Runs in a fresh process beside the rank, as the engine's worker will.
OPEN_HANDLE = ("import pickle, sys; rebuild, args = pickle.load(sys.stdin.buffer); assert rebuild(*args).sum().item() "
    "== 42.0")


def _shared_gpu(rank: "Trainer") -> None:
    """CUDA IPC between processes of one pod, where the weight sync will use it."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    if rank.device.type == "cpu" or not _beside_engine(rank):
        return
    value = torch.full((42,), 1.0, device=rank.device)
    handle = pickle.dumps(reduce_tensor(value))  # type: ignore[no-untyped-call]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_HANDLE], input=handle, capture_output=True, timeout=REDUCE_SECONDS * 2, check=False,
    )
    if done.returncode:
        raise PreflightFailed("another process cannot open this GPU's memory by CUDA IPC "
            f"({done.stderr.decode().strip().splitlines()[-1:]}): set spec.weightSync.backend to vllm-ipc after "
            "mending it, or placement.mode to Separated")


def _beside_engine(rank: "Trainer") -> bool:
    """A role with GPUs of its own shares them with nobody; nor does a trainer that generates itself."""
    placement = rank.config.placement
    shared = placement.mode is PlacementMode.COLOCATED and bool(placement.engine_slots)
    return shared and "policy" in rank.names


def _model(rank: "Trainer") -> None:
    """All that can be said of the roles' models before their weights are read."""
    problems = Problems()
    for role in rank.names:
        spec, field = rank.config.roles[role], model_field(role)
        with problems:
            check_weights(spec, field)
        with problems:
            check_role_context(rank.config, role, context_length(load_config(spec, field)))
        if role == "policy" and not rank.rank and rank.config.model.lora is None:
            with problems, tempfile.TemporaryDirectory(prefix="rlhf-export-") as directory:
                export(copy(skeleton(spec)), spec, {}, Path(directory))  # what refuses at a run's end refuses now
    problems.tell()


def _memory(rank: "Trainer") -> None:
    import torch

    counts = {name: parameters(rank.config.roles[name], model_field(name)) for name in rank.names}
    if rank.device.type == "cpu":
        need = needed_bytes(rank.config, counts, rank.world, 0)
        return check_memory(need, *host_memory(Path("/proc/meminfo").read_text()), "the node of a trainer pod")
    name, total = f"GPU {torch.cuda.get_device_properties(0).uuid}", torch.cuda.mem_get_info()[1]
    engine = int(engine_share(rank.config) * total) if _beside_engine(rank) else 0
    if engine and not rank.rank:
        words = engine_memory(rank.config, counts["policy"], shape_of(load_config(rank.config.model)), total)
        least = training_bytes(rank.config, counts, rank.world) / GIB
        print(f"each GPU: {words}; the trainer needs at least {least:.1f} GiB while it trains", flush=True)
    need, end = needed_bytes(rank.config, counts, rank.world, engine), time.monotonic() + MEMORY_WAIT_SECONDS
    while True:
        try:
            return check_memory(need, torch.cuda.mem_get_info()[0], total, name)
        except PreflightFailed:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def engine_memory(config: RunConfig, parameters: int, shape: Shape, card: int) -> str:
    """What an engine's rank has of `card` bytes, in words. Raises BadSpec where not even its weights fit into that."""
    share, ranks, args = engine_share(config), config.rollout.tensor_parallel_size, config.rollout.engine_args
    width = DTYPE_BYTES[config.model.dtype]
    weights = parameters * width // ranks
    if share * card <= weights and not args.keys() & OWN_SIZES:
        given = f"{share_field(config)} is {share:g}, {share * card / GIB:.1f} of {card / GIB:.1f} GiB"
        raise BadSpec(f"{given}, but of an engine the weights alone take {weights / GIB:.1f}: raise it, or "
            "spec.rollout.tensorParallelSize")
    tokens = kv_tokens(card, share, weights, engine_activations(shape, width, ranks), kv_bytes(shape, width, ranks))
    cache = "" if args.keys() & OWN_SIZES else f", about {round(tokens, -3):,} tokens of KV cache"
    return f"an engine gets {share * card / GIB:.1f} of {card / GIB:.1f} GiB{cache}"


def host_memory(meminfo: str) -> tuple[int, int]:
    """Bytes that processes may still take, and all."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("Mem")}
    return kib["MemAvailable"] << 10, kib["MemTotal"] << 10


def parameters(spec: ModelSpec, field: str = "spec.model.path") -> int:
    """Of the whole model, from its config alone. Raises BadSpec."""
    return sum(p.numel() for p in skeleton(spec, field).parameters())


def check_memory(need: Need, free: int, total: int, where: str) -> None:
    """Bytes, all. Raises BadSpec for what can never fit, PreflightFailed for what does not fit now."""
    if need.bytes <= free:
        return
    engine = f" and the engine takes {need.engine / GIB:.1f} GiB" if need.engine else ""
    asked = f"while {need.moment} the trainer's roles need at least {need.roles / GIB:.1f} GiB{engine}"
    if need.bytes > total:
        raise BadSpec(f"{where} has {total / GIB:.1f} GiB, but {asked}: {need.fix}")
    raise PreflightFailed(
        f"{where} has {free / GIB:.1f} GiB free of {total / GIB:.1f}, but {asked}: "
        f"something else holds the rest; end it, or {need.fix}"
    )


def _checkpoint(rank: "Trainer") -> None:
    """Every rank sees what the first one writes, and a checkpoint has room."""
    import torch.distributed as dist

    name, told = f".preflight-{rank.names[0]}", [str(time.time()), ""]
    if rank.rank == 0:
        try:
            rank.store.write(name, told[0].encode())
        except OSError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, 0)
    if told[1]:
        raise PreflightFailed(f"spec.checkpoint.path ({rank.store.root}) cannot be written: {told[1]}")
    if name not in rank.store.names() or rank.store.read(name).decode() != told[0]:
        raise PreflightFailed(f"spec.checkpoint.path ({rank.store.root}) is another directory in each trainer pod: "
            "mount a volume that they share (pods.trainer.volumes)")
    saved = [role for role in rank.names if role in trained_whole(rank.config)]
    need = sum(SAVED_BYTES * parameters(rank.config.roles[role], model_field(role)) for role in saved)
    room = rank.store.room()
    if room and room[0] < need:
        raise PreflightFailed(f"spec.checkpoint.path ({rank.store.root}) has {room[0] / GIB:.1f} GiB free, a "
            f"checkpoint takes {need / GIB:.1f}: free space, lower spec.checkpoint.keep or use a larger volume")


def _tokenizer(rank: "Trainer") -> None:
    """The policy's, which an export writes; those of reward models, by which they read; the rest are the policy's."""
    problems, config = Problems(), rank.config
    for role in rank.names:
        spec, field = config.roles[role], model_field(role)
        with problems:
            if role == "policy":
                with tempfile.TemporaryDirectory(prefix="rlhf-export-") as directory:
                    export_tokenizer(spec, Path(directory))
            elif role.startswith("reward:"):
                check_template(load_tokenizer(spec, field), spec, field)
            else:
                check_vocabulary(spec, field, config.model)
    problems.tell()


def _environments(rank: "Trainer") -> None:
    """Where the trainer generates; engines try theirs themselves."""
    from rlhf_worker.rollout.environment import opened

    if rank.config.rollout.engine == "hf" and "policy" in rank.names:
        for environments in opened(rank.config, load_tokenizer(rank.config.model)).values():
            environments.close()


# In this order; each is called on every rank of a process group.
CHECKS: Mapping[str, Callable[["Trainer"], None]] = {
    "Devices": _devices, "SharedMemory": _shared_memory, "Reduce": _reduce, "SharedGPU": _shared_gpu, "Model": _model,
    "Memory": _memory, "CheckpointPath": _checkpoint, "Tokenizer": _tokenizer,
    "Environments": _environments,
}
