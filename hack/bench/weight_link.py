"""What the link between two processes' GPUs gives to a model's parameters: NCCL in several groupings, CUDA IPC read and
written.

usage: python hack/bench/weight_link.py [--shapes 0.6B 8B] [--parts nccl ipc local colocated] [--nccl-env A=1,B=2 ...]
  [--only TEXT]

No engine: two processes with the same tensors, separately allocated as a model's are, and one buffer of as many bytes.
Every variant prints a row of Markdown and one of `row.py` as soon as it is measured: minimum and median of 10 after 2
warm-ups. `link` is the smaller of both sides' CUDA event times (the other side's includes waiting for its peer), `wall`
the sender's (opener's) clock from an idle device to an idle device, `host` the part of it until everything was
enqueued. A variant that fails or hangs is reported and passed over. """

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.row import printed
from hack.bench.weight_base import SHAPES, Sample, elements, free_ports, local_ray, on, parameters, timed

WARMUP, REPEAT = 2, 10
COMMUNICATORS = 4
START_SECONDS, DEADLINE_SECONDS = 200.0, 60.0
MIB = 1 << 20
Work = Callable[[], object]


def graphed(work: Work) -> Work:
    """The same as one CUDA graph: what is left when launching costs nothing."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def forked(jobs: list[Work]) -> None:
    """Each job on a stream of its own, between what the current stream did and what it does next."""
    main = torch.cuda.current_stream()
    for job, stream in zip(jobs, STREAMS, strict=False):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            job()
        main.wait_stream(stream)


STREAMS: list[torch.cuda.Stream] = []  # filled in the actors


class Side:
    """One process; its GPU is the first that it sees. Rank 0 has the trainer's values, rank 1 zeros."""

    def __init__(self, shape: str, rank: int, device: str) -> None:
        self.rank, self.device = rank, device
        self.tensors = [torch.zeros(size, dtype=torch.bfloat16, device=device) for size in parameters(shape).values()]
        self.flat = torch.zeros(sum(t.numel() for t in self.tensors), dtype=torch.bfloat16, device=device)
        self.comms: list[Any] = []
        self.views: list[Tensor] = []
        self.flat_view = self.flat
        if device == "cuda":
            torch.cuda.set_device(0)
            STREAMS.extend(torch.cuda.Stream() for _ in range(COMMUNICATORS))  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """New values on rank 0, zeros on rank 1."""
        for tensor in [*self.tensors, self.flat]:
            tensor.normal_() if self.rank == 0 else tensor.zero_()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def digest(self, flat: bool) -> list[int]:
        found = self.flat.split(16 * MIB) if flat else self.tensors  # type: ignore[no-untyped-call]
        sums: list[int] = torch.stack([t.view(torch.int16).sum(dtype=torch.int64) for t in found]).tolist()
        return sums

    def memory(self) -> dict[str, float]:
        """MiB: what torch holds, and what the whole device has in use; nothing of a CPU."""
        if self.device == "cpu":
            return {}
        free, total = torch.cuda.mem_get_info()
        return {"reserved": torch.cuda.memory_reserved() / MIB, "device": (total - free) / MIB}

    def connect(self, port: int) -> str:
        """One more NCCL communicator, as a sync has it. Returns NCCL's version."""
        from rlhf_worker.weights.wire import Address, NcclChannel

        self.comms.append(
            NcclChannel(Address(("127.0.0.1", port), self.rank, 2, START_SECONDS), torch.device("cuda", 0)).nccl
        )
        return str(self.comms[0].nccl.ncclGetVersion())

    def nccl(self, name: str) -> list[Sample]:
        """Runs on both sides at once."""
        work = NCCL[name](self)
        found = []
        for _ in range(WARMUP + REPEAT):
            self.comms[0].group.all_gather_obj(None)
            found.append(timed(work))
        return found[WARMUP:]

    def export(self) -> list[Any]:
        """Handles of the tensors and, last, of the buffer."""
        from torch.multiprocessing.reductions import reduce_tensor

        return [reduce_tensor(t)[1] for t in [*self.tensors, self.flat]]  # type: ignore[no-untyped-call]

    def open(self, handles: list[Any]) -> None:
        """As memory of this process's own device, whichever it is on: the kernels then read or write over peer access.
        """
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        opened = [rebuild_cuda_tensor(*[*args[:6], 0, *args[7:]]) for args in handles]  # type: ignore[no-untyped-call]
        self.views, self.flat_view = opened[:-1], opened[-1]

    def pull(self, name: str) -> list[Sample]:
        return self._copy(name, self.tensors, self.views, self.flat, self.flat_view)

    def push(self, name: str) -> list[Sample]:
        return self._copy(name, self.views, self.tensors, self.flat_view, self.flat)

    def local(self, name: str, device: str) -> list[Sample]:
        """Into a second set in this process, on this GPU ("cuda:0"), on the other ("cuda:1") or on the CPU."""
        others = [torch.empty_like(t, device=device) for t in self.tensors]
        return self._copy(name, others, self.tensors, torch.empty_like(self.flat, device=device), self.flat)

    def _copy(self, name: str, to: list[Tensor], of: list[Tensor], flat_to: Tensor, flat_of: Tensor) -> list[Sample]:
        work = COPY[name]([flat_to], [flat_of]) if is_flat(name) else COPY[name](to, of)
        return [timed(work, self.device) for _ in range(WARMUP + REPEAT)][WARMUP:]


def is_flat(name: str) -> bool:
    return "buffer" in name


def move(side: Side, tensors: Iterable[Tensor], comm: Any) -> None:
    """One group, on the current stream."""
    stream = torch.cuda.current_stream()
    comm.group_start()
    for tensor in tensors:
        if side.rank == 0:
            comm.send(tensor, 1, stream)
        else:
            comm.recv(tensor, 0, stream)
    comm.group_end()


def groups(side: Side, size: int) -> Work:
    parts = [side.tensors[i : i + size] for i in range(0, len(side.tensors), size)]

    def work() -> None:
        for part in parts:
            move(side, part, side.comms[0])

    return work


def chunks(side: Side, size: int) -> Work:
    """The buffer in sends of `size` bytes, one group."""
    parts = side.flat.split(size // side.flat.element_size())  # type: ignore[no-untyped-call]
    return lambda: move(side, parts, side.comms[0])


def dealt(side: Side, tensors: list[Tensor], count: int) -> Work:
    """Alternately over communicators, each on a stream of its own."""
    jobs: list[Work] = [
        lambda i=i: move(side, tensors[i::count], side.comms[i]) for i in range(count)  # type: ignore[misc]
    ]
    return lambda: forked(jobs)


def prepared(side: Side) -> Work:
    """One group, with every argument of the C calls made beforehand."""
    from vllm.distributed.device_communicators.pynccl_wrapper import buffer_type, cudaStream_t, ncclDataTypeEnum

    comm = side.comms[0]
    call = comm.nccl.ncclSend if side.rank == 0 else comm.nccl.ncclRecv
    dtype, stream = ncclDataTypeEnum.from_torch(torch.bfloat16), cudaStream_t(torch.cuda.current_stream().cuda_stream)
    arguments = [(buffer_type(t.data_ptr()), t.numel(), dtype, 1 - side.rank, comm.comm, stream) for t in side.tensors]

    def work() -> None:
        comm.group_start()
        for each in arguments:
            call(*each)
        comm.group_end()

    return work


def broadcasts(side: Side, tensors: list[Tensor]) -> Work:
    comm = side.comms[0]

    def work() -> None:
        stream = torch.cuda.current_stream()
        comm.group_start()
        for tensor in tensors:
            comm.broadcast(tensor, 0, stream)
        comm.group_end()

    return work


def registered(side: Side, tensors: list[Tensor], inner: Work) -> Work:
    """With the buffers known to NCCL (ncclCommRegister), so that it may write straight into them."""
    comm = side.comms[0]
    register = comm.nccl.lib.ncclCommRegister
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
    for tensor in tensors:
        handle = ctypes.c_void_p()
        failed = register(comm.comm, tensor.data_ptr(), tensor.nbytes, ctypes.byref(handle))
        if failed:
            raise RuntimeError(f"ncclCommRegister returned {failed}")
    return inner


def foreach(to: list[Tensor], of: list[Tensor]) -> Work:
    return lambda: torch._foreach_copy_(to, of)


def loop(to: list[Tensor], of: list[Tensor]) -> Work:
    def work() -> None:
        for a, b in zip(to, of, strict=True):
            a.copy_(b, non_blocking=True)

    return work


def over_streams(
    one: Callable[[list[Tensor], list[Tensor]], Work], count: int,
) -> Callable[[list[Tensor], list[Tensor]], Work]:
    def make(to: list[Tensor], of: list[Tensor]) -> Work:
        jobs = [one(to[i::count], of[i::count]) for i in range(count)]
        return lambda: forked(jobs)

    return make


def split(to: list[Tensor], of: list[Tensor]) -> Work:
    """The buffer in four equal copies on four streams."""
    return over_streams(loop, 4)(list(to[0].chunk(4)), list(of[0].chunk(4)))


NCCL: dict[str, Callable[[Side], Work]] = {
    "one buffer, one send": lambda s: lambda: move(s, [s.flat], s.comms[0]),
    "one buffer, halves on 2 communicators": lambda s: dealt(s, list(s.flat.chunk(2)), 2),
    "one buffer, quarters on 4 communicators": lambda s: dealt(s, list(s.flat.chunk(4)), 4),
    "one buffer, one broadcast": lambda s: broadcasts(s, [s.flat]),
    **{
        f"buffer in {size} MiB sends, one group": lambda s, size=size: chunks(s, size * MIB)  # type: ignore[misc]
        for size in (1, 16, 64, 256)
    },

    "tensors, one group": lambda s: groups(s, len(s.tensors)),
    "tensors, one group, calls prepared": prepared,
    "tensors, one group, CUDA graph": lambda s: graphed(groups(s, len(s.tensors))),
    **{f"tensors, groups of {size}": lambda s, size=size: groups(s, size) for size in (8, 32, 128)},  # type: ignore[misc]

    "tensors, groups of 32, CUDA graph": lambda s: graphed(groups(s, 32)),
    "tensors, 2 communicators": lambda s: dealt(s, s.tensors, 2),
    "tensors, 4 communicators": lambda s: dealt(s, s.tensors, 4),
    "tensors, 2 communicators, CUDA graph": lambda s: graphed(dealt(s, s.tensors, 2)),
    "tensors, broadcasts in one group": lambda s: broadcasts(s, s.tensors),
    "one buffer, one send, registered": lambda s: registered(s, [s.flat], lambda: move(s, [s.flat], s.comms[0])),
    "tensors, one group, registered": lambda s: registered(s, s.tensors, groups(s, len(s.tensors))),
    "tensors, one group, registered, CUDA graph": lambda s: graphed(groups(s, len(s.tensors))),  # after the one above
}
COPY: dict[str, Callable[[list[Tensor], list[Tensor]], Work]] = {
    "one buffer, one copy": loop,
    "one buffer, quarters on 4 streams": split,
    "one buffer, _foreach_copy_": foreach,
    "_foreach_copy_": foreach,
    "_foreach_copy_ on 2 streams": over_streams(foreach, 2),
    "_foreach_copy_, CUDA graph": lambda to, of: graphed(foreach(to, of)),
    "loop of copy_": loop,
    "loop of copy_ on 2 streams": over_streams(loop, 2),
    "loop of copy_ on 4 streams": over_streams(loop, 4),
    "loop of copy_, CUDA graph": lambda to, of: graphed(loop(to, of)),
    "loop of copy_ on 4 streams, CUDA graph": lambda to, of: graphed(over_streams(loop, 4)(to, of)),
}


class Pair:
    """Both processes, started again after a failure: a variant that failed on one side leaves the other waiting."""

    def __init__(
        self, shape: str, gpus: tuple[str, str], environment: dict[str, str], device: str = "cuda",
    ) -> None:
        self.shape, self.gpus, self.environment, self.device = shape, gpus, environment, device
        self.sides: list[Any] = []
        self.connected = self.opened = False

    def both(self, method: str, *args: object, seconds: float = DEADLINE_SECONDS) -> list[Any]:
        found: list[Any] = ray.get([getattr(side, method).remote(*args) for side in self.sides], timeout=seconds)
        return found

    def alone(self, rank: int, method: str, *args: object) -> list[Any]:
        return [ray.get(getattr(self.sides[rank], method).remote(*args), timeout=DEADLINE_SECONDS)]

    def start(self) -> None:
        actor = ray.remote(Side)
        self.sides = [
            actor.options(**on(gpu, self.environment)).remote(self.shape, rank, self.device)
            for rank, gpu in enumerate(self.gpus)
        ]
        self.both("memory", seconds=START_SECONDS)

    def connect(self) -> None:
        if not self.connected:
            memory = [self.both("memory")]
            for port in free_ports(COMMUNICATORS):
                version = self.both("connect", port, seconds=START_SECONDS)[0]
                memory.append(self.both("memory"))
            print(f"NCCL {version}: MiB of each side before the communicators and after each: {memory}", flush=True)
            self.connected = True

    def open(self) -> None:
        """Both sides see each other's tensors."""
        if not self.opened:
            mine, theirs = self.both("export")
            ray.get([self.sides[0].open.remote(theirs), self.sides[1].open.remote(mine)], timeout=DEADLINE_SECONDS)
            self.opened = True

    def close(self) -> None:
        for side in self.sides:
            ray.kill(side)
        self.sides, self.connected, self.opened = [], False, False

    def measure(self, plan: "Plan", name: str) -> tuple[list[list[Sample]], bool]:
        """Samples of the sides that took part, and whether both hold the same values afterwards. Raises what the actors
        raise.
        """
        if not self.sides:
            self.start()
        plan.prepare(self)
        self.both("reset")
        samples = plan.run(self, name)
        first, second = self.both("digest", is_flat(name))
        return samples, first == second


@dataclass(frozen=True)
class Plan:
    """Variants of one kind: what they need of the pair, and how one of them runs."""

    part: str
    title: str
    names: Iterable[str]
    prepare: Callable[[Pair], None]
    run: Callable[[Pair, str], list[list[Sample]]]


SEPARATED = [
    Plan("nccl", "NCCL, two GPUs", NCCL, Pair.connect, lambda pair, name: pair.both("nccl", name)),
    Plan(
        "ipc", "CUDA IPC, two GPUs, the receiver reads", COPY, Pair.open,
        lambda pair, name: pair.alone(1, "pull", name),
    ),
    Plan(
        "ipc", "CUDA IPC, two GPUs, the sender writes", COPY, Pair.open, lambda pair, name: pair.alone(0, "push", name),
    ),
    Plan(
        "local", "one process, two GPUs", COPY, lambda _: None,
        lambda pair, name: pair.alone(0, "local", name, "cuda:1"),
    ),
]
PARTS = ["nccl", "ipc", "local", "colocated"]
COLOCATED = [
    Plan(
        "colocated", "CUDA IPC, one GPU, the receiver reads", COPY, Pair.open,
        lambda pair, name: pair.alone(1, "pull", name),
    ),
    Plan(
        "colocated", "one process, one GPU", COPY, lambda _: None,
        lambda pair, name: pair.alone(0, "local", name, "cuda:0"),
    ),
]


class Report:
    """Rows as they come."""

    def __init__(self, only: str) -> None:
        self.only = only

    def heading(self, title: str) -> None:
        print(f"\n### {title}\n\n| variant | link ms, min | median | GB/s at min | wall ms, min | median | host "
            "ms, min | equal |\n|---|---|---|---|---|---|---|---|", flush=True)

    def row(self, where: dict[str, Any], name: str, size: int, samples: list[list[Sample]], equal: bool | None) -> None:
        link = [min(sample.event for sample in each) for each in zip(*samples, strict=True)]
        wall = [sample.wall for sample in samples[0]]
        host = min(sample.host for sample in samples[0])
        figures = [
            1e3 * min(link), 1e3 * statistics.median(link), size / min(link) / 1e9, 1e3 * min(wall),
            1e3 * statistics.median(wall), 1e3 * host
        ]
        print(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + f" | {equal} |", flush=True)
        printed(
            "weight_link", where | {"variant": name}, lower={"link_ms": figures[0], "wall_ms": figures[3]}, bytes=size,
            equal=equal, samples=[[asdict(s) for s in side] for side in samples],
        )  # fmt: skip

    def failed(self, where: dict[str, Any], name: str, error: Exception) -> None:
        text = " ".join(str(error).split()) or repr(error)
        print(f"| {name} | failed: {type(error).__name__}: {text[-300:]} |", flush=True)
        printed("weight_link", where | {"variant": name}, error=str(error))


def sweep(report: Report, pair: Pair, plan: Plan, size: int) -> None:
    """Every variant by itself; what one of them breaks is thrown away with its processes."""
    where = {
        "shape": pair.shape, "part": plan.title,
        "environment": " ".join(f"{k}={v}" for k, v in pair.environment.items())
    }
    report.heading(", ".join(filter(None, where.values())))
    for name in plan.names:
        if report.only not in name:
            continue
        try:
            samples, equal = pair.measure(plan, name)
            report.row(where, name, size, samples, None if "one process" in plan.title else equal)
        except Exception as error:
            report.failed(where, name, error)
            pair.close()
    if pair.sides:
        print(f"\nMiB of each side at the end: {pair.both('memory')}", flush=True)


def explore(shape: str, parts: list[str], environments: list[dict[str, str]], report: Report) -> None:
    size = 2 * elements(shape)
    pairs = [(Pair(shape, ("0,1", "1,0"), {}), SEPARATED)]
    pairs += [(Pair(shape, ("0,1", "1,0"), environment), SEPARATED[:1]) for environment in environments]
    pairs += [(Pair(shape, ("0", "0"), {}), COLOCATED)]
    for pair, plans in pairs:
        for plan in plans:
            if plan.part in parts:
                sweep(report, pair, plan, size)
        pair.close()


def alone_on_a_cpu(shape: str, report: Report) -> None:
    """Copies inside one process: whether this still runs where there is no GPU."""
    pair = Pair(shape, ("", ""), {}, "cpu")

    def copied(pair: Pair, name: str) -> list[list[Sample]]:
        return pair.alone(0, "local", name, "cpu")

    names = [name for name in COPY if "stream" not in name and "graph" not in name]
    plan = Plan("local", "one process, no GPU", names, lambda _: None, copied)
    sweep(report, pair, plan, 2 * elements(shape))
    pair.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.6B", "8B"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--nccl-env", action="append", default=[], metavar="A=1,B=2", help="one more pass of the nccl "
        "part with these variables")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: one process alone")
    given = parser.parse_args()
    environments = [dict(pair.split("=", 1) for pair in text.split(",")) for text in given.nccl_env]
    report = Report(given.only)
    with local_ray():
        for shape in given.shapes:
            if given.device == "cpu":
                alone_on_a_cpu(shape, report)
            else:
                explore(shape, given.parts, environments, report)


if __name__ == "__main__":
    from hack.bench import weight_link  # by its name, so that the actors' processes import it too

    weight_link.main()
