"""A sync over links: NCCL between GPUs, gloo between CPUs. Each rank runs its part of the plan's waves."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup, stateless_init_torch_distributed_process_group

from rlhf_worker.addresses import listen
from rlhf_worker.errors import DeadlineExceeded, LinkBroken
from rlhf_worker.weights.plan import Hop, Leg, Piece
from rlhf_worker.weights.views import copy_all

STAGE_BYTES = 32 << 20  # a rank packs this much ahead of the link, twice: one half is filled while the other is sent
# that are packed: NCCL's send costs as much as 4 MB on the link (docs/benchmarks.md), packing next to nothing
SMALL_BYTES = {"nccl": 16 << 20, "gloo": 0}
ALIGNMENT = 256
POLL_SECONDS = 2e-5
LOOK_SECONDS = 0.05  # between looks at whether a peer has failed

Resolve = Callable[[Piece], Tensor]
Pairs = tuple[list[Tensor], list[Tensor]]  # destinations and sources


@dataclass(frozen=True, slots=True)
class Address:
    meeting: tuple[str, int]  # host and port, of rank 0
    rank: int
    world: int
    deadline_seconds: float


class Channel(Protocol):
    """A group of ranks. What is called within a session happens wave by wave; the session's end waits for it."""

    def session(self, failed: Callable[[], bool]) -> AbstractContextManager[None]: ...
    def pack(self, wave: int, pairs: Pairs) -> None: ...
    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None: ...
    def unpack(self, pairs: Pairs) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Wave:
    """One rank's part of a wave. What is packed for a peer lies in one stretch of the stage, in one order at both ends.
    """

    before: Pairs = field(default_factory=lambda: ([], []))  # into the stage
    sends: list[tuple[Tensor, int]] = field(default_factory=list)
    receives: list[tuple[Tensor, int]] = field(default_factory=list)
    after: Pairs = field(default_factory=lambda: ([], []))  # out of the stage


def make_stage(waves: Sequence[Sequence[Hop]], me: int, device: torch.device) -> list[Tensor]:
    """Two halves, each as large as this rank's largest wave needs."""
    need = max(
        (
            sum(_padded(hop.piece.nbytes) for hop in hops if hop.piece.packed and me in (hop.sender, hop.receiver))
            for hops in waves
        ),
        default=0
    )
    return [torch.empty(need, dtype=torch.uint8, device=device) for _ in range(2)]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def make_wave(
    hops: Sequence[Hop], me: int, resolve: Resolve, dtype: Callable[[Piece], torch.dtype], stage: Tensor,
) -> Wave:
    """resolve: the view that a piece is sent from, or received into; dtype: of the piece on the wire; stage: bytes for
    what is packed.
    """
    wave, used = Wave(), 0
    by_pair: dict[tuple[int, int], list[Piece]] = {}
    for hop in hops:
        if me in (hop.sender, hop.receiver):
            by_pair.setdefault((hop.sender, hop.receiver), []).append(hop.piece)
    for (sender, receiver), pieces in by_pair.items():
        sending, start = sender == me, used
        ends, peer = (wave.sends, receiver) if sending else (wave.receives, sender)
        for piece in pieces:
            view = resolve(piece)
            if not piece.packed:
                ends.append((view, peer))
                continue
            flat = stage[used : used + piece.nbytes].view(dtype(piece)).view(view.shape)
            used += _padded(piece.nbytes)
            into, out = (wave.before if sending else wave.after)
            into.append(flat if sending else view)
            out.append(view if sending else flat)
        if used > start:
            ends.append((stage[start:used], peer))
    return wave


def run(channel: Channel, waves: Sequence[Wave], failed: Callable[[], bool]) -> None:
    """failed: asked now and then whether there is still anyone to wait for. Raises DeadlineExceeded or LinkBroken; what
    came is worthless then.
    """
    with channel.session(failed):
        for number, wave in enumerate(waves):
            channel.pack(number, wave.before)
            channel.exchange(wave.sends, wave.receives)
            channel.unpack(wave.after)


class Link:
    """A member's end of a leg, whose waves `prepare` makes of `hops`."""

    def __init__(
        self, leg: Leg, me: int, channel: Channel, hops: Sequence[Sequence[Hop]], device: torch.device,
    ) -> None:
        self.leg, self.me, self.channel, self.hops, self.device = leg, me, channel, hops, device
        self.waves: list[Wave] = []

    def prepare(self, resolve: Resolve, dtype: Callable[[Piece], torch.dtype], stage: list[Tensor]) -> None:
        """As for `make_wave`; stage: its two halves."""
        self.waves = [make_wave(hops, self.me, resolve, dtype, stage[n % 2]) for n, hops in enumerate(self.hops)]

    def run(self, failed: Callable[[], bool]) -> None:
        run(self.channel, self.waves, failed)

    def once(self, hops: Sequence[Hop], resolve: Resolve, dtype: torch.dtype, failed: Callable[[], bool]) -> None:
        """What is no part of the waves: a tensor that load_weights takes."""
        stage = make_stage([hops], self.me, self.device)[0]
        run(self.channel, [make_wave(hops, self.me, resolve, lambda _: dtype, stage)], failed)


def shared_stage(links: Sequence[Link], device: torch.device) -> list[Tensor]:
    """The two halves, for links that run one after the other."""
    stages = [make_stage(link.hops, link.me, device) for link in links]
    return max(stages, key=lambda halves: halves[0].numel(), default=[])


class GlooChannel:
    def __init__(self, address: Address) -> None:
        try:
            group = stateless_init_torch_distributed_process_group(
                *address.meeting, address.rank, address.world, backend="gloo",
                timeout=timedelta(seconds=address.deadline_seconds)
            )
        except RuntimeError as error:
            raise DeadlineExceeded(f"weight sync: not all of {address.world} ranks joined within "
                f"{address.deadline_seconds:g} s: {error}") from error
        assert isinstance(group, torch.distributed.ProcessGroup)
        self.group = group

    @contextmanager
    def session(self, failed: Callable[[], bool]) -> Iterator[None]:
        """gloo notices by itself that a peer is gone, or that the time is up."""
        try:
            yield
        except RuntimeError as error:
            raise LinkBroken(f"weight sync over gloo: {error}") from error

    def pack(self, wave: int, pairs: Pairs) -> None:
        self.unpack(pairs)

    def unpack(self, pairs: Pairs) -> None:
        copy_all(*pairs)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        # Posted in one order on both sides of a pair, so that one tag serves.
        work = [self.group.recv([tensor], peer, 0) for tensor, peer in receives]
        work += [self.group.send([tensor], peer, 0) for tensor, peer in sends]
        for item in work:
            item.wait()

    def close(self) -> None:
        del self.group


def join(address: Address, device: torch.device) -> Channel:
    """Raises DeadlineExceeded when not every rank comes."""
    return GlooChannel(address) if device.type == "cpu" else NcclChannel(address, device)


class _Communicator(PyNcclCommunicator):
    """vLLM's, without the reduction by which it warms up: that connects rings of all ranks, half a gigabyte on each,
    for collectives that never come.
    """

    def all_reduce(
        self, in_tensor: Tensor, out_tensor: Tensor | None = None, op: object = None, stream: object = None,
    ) -> None:
        return None


class NcclChannel:
    """Grouped sends and receives on a stream of their own; packing on another, so that a wave is packed while the one
    before it travels.
    """

    def __init__(self, address: Address, device: torch.device) -> None:
        self.deadline_seconds = address.deadline_seconds
        store = StatelessProcessGroup.create(  # whose own server is of IPv4
            *address.meeting, address.rank, address.world, store_timeout=max(1, int(address.deadline_seconds)),
            listen_socket=None if address.rank else listen(*address.meeting),
        )
        try:
            store.barrier(timeout=address.deadline_seconds)  # NCCL's own start has no deadline
        except (RuntimeError, TimeoutError) as error:
            raise DeadlineExceeded(f"weight sync: not all of {address.world} ranks joined within "
                f"{address.deadline_seconds:g} s") from error
        self.nccl = _Communicator(store, device)
        self.link, self.packing = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self.carried: list[torch.cuda.Event] = []  # a wave each
        self.unpacked: list[torch.cuda.Event] = []
        self.receives = self.expired = False

    @contextmanager
    def session(self, failed: Callable[[], bool]) -> Iterator[None]:
        # The first send to a peer waits for it inside NCCL; only from another thread can it be ended.
        end = time.monotonic() + self.deadline_seconds
        timer = threading.Timer(self.deadline_seconds, self._expire)
        timer.daemon = True
        if not self.carried:
            timer.start()
        self.carried, self.unpacked = [], []
        for stream in (self.link, self.packing):
            stream.wait_stream(torch.cuda.current_stream())
        try:
            yield
            self._wait(end, failed)
        except RuntimeError as error:
            if not self.expired:
                raise LinkBroken(f"weight sync over NCCL: {error}") from error
        finally:
            timer.cancel()
        if self.expired:
            raise DeadlineExceeded(f"weight sync: a rank did not send or receive within {self.deadline_seconds:g} s")

    def _wait(self, end: float, failed: Callable[[], bool]) -> None:
        """Until all that was enqueued is done. Aborting is the one way to end kernels that wait for a peer that is
        gone.
        """
        ends = [stream.record_event() for stream in (self.link, self.packing)]
        look = time.monotonic() + LOOK_SECONDS
        while not self.expired and not all(event.query() for event in ends):
            time.sleep(POLL_SECONDS)
            if (now := time.monotonic()) > end:
                self._expire()
            elif now > look:
                look = now + LOOK_SECONDS
                if failed():
                    self.nccl.destroy()
                    raise LinkBroken("weight sync over NCCL: an engine failed")

    def _expire(self) -> None:
        self.expired = True
        self.nccl.destroy()

    def pack(self, wave: int, pairs: Pairs) -> None:
        """Into the half of the stage that wave - 2 has left. What a rank passes on came with wave - 1, and is packed
        after that.
        """
        if pairs[0]:
            self._copy(pairs, after=self.carried[-1:] if self.receives else self.carried[-2:-1])
            self.link.wait_event(self.packing.record_event())

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        self.receives = self.receives or bool(receives)
        for event in self.unpacked[-2:-1]:  # of wave - 2, whose half of the stage this wave receives into
            self.link.wait_event(event)
        self.nccl.group_start()
        for tensor, peer in sends:
            self.nccl.send(tensor, peer, self.link)
        for tensor, peer in receives:
            self.nccl.recv(tensor, peer, self.link)
        self.nccl.group_end()
        self.carried.append(self.link.record_event())

    def unpack(self, pairs: Pairs) -> None:
        if pairs[0]:
            self._copy(pairs, after=self.carried[-1:])
        self.unpacked.append(self.packing.record_event())

    def _copy(self, pairs: Pairs, after: Sequence[torch.cuda.Event]) -> None:
        for event in after:
            self.packing.wait_event(event)
        with torch.cuda.stream(self.packing):
            copy_all(*pairs)

    def close(self) -> None:
        self.nccl.destroy()
