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

from rlhf_worker.errors import DeadlineExceeded, LinkBroken
from rlhf_worker.weights.plan import Hop, Piece

STAGE_BYTES = 32 << 20  # a rank packs this much ahead of the link, twice: one half is filled while the other is sent
ALIGNMENT = 256
POLL_SECONDS = 2e-5

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

    def session(self) -> AbstractContextManager[None]: ...
    def pack(self, wave: int, pairs: Pairs) -> None: ...
    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None: ...
    def unpack(self, pairs: Pairs) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Wave:
    before: Pairs = field(default_factory=lambda: ([], []))  # into the stage
    sends: list[tuple[Tensor, int]] = field(default_factory=list)
    receives: list[tuple[Tensor, int]] = field(default_factory=list)
    after: Pairs = field(default_factory=lambda: ([], []))  # out of the stage


def make_stage(waves: Sequence[Sequence[Hop]], me: int, device: torch.device) -> list[Tensor]:
    """Two halves, each as large as this rank's largest wave needs."""
    mine = [[hop.piece for hop in hops if me in (hop.sender, hop.receiver) and hop.piece.staged] for hops in waves]
    nbytes = max((sum(_padded(piece.move.put.numel * piece.itemsize) for piece in pieces) for pieces in mine), default=0)
    return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def make_wave(hops: Sequence[Hop], me: int, take: Resolve, put: Resolve, dtype: Callable[[Piece], torch.dtype], stage: Tensor) -> Wave:
    """This rank's part. take: the view to send; put: the view to receive into; stage: bytes for what is strided or of another type."""
    wave, used = Wave(), 0
    for hop in hops:
        if me not in (hop.sender, hop.receiver):
            continue
        view, wire = (take if hop.sender == me else put)(hop.piece), dtype(hop.piece)
        flat = view
        if view.dtype != wire or not view.is_contiguous():
            nbytes = view.numel() * wire.itemsize
            flat = stage[used : used + nbytes].view(wire).view(view.shape)
            used += _padded(nbytes)
            into, out = (flat, view) if hop.sender == me else (view, flat)
            pairs = wave.before if hop.sender == me else wave.after
            pairs[0].append(into)
            pairs[1].append(out)
        (wave.sends if hop.sender == me else wave.receives).append((flat, hop.receiver if hop.sender == me else hop.sender))
    return wave


def run(channel: Channel, waves: Sequence[Wave]) -> None:
    """Raises DeadlineExceeded or LinkBroken; what was received until then is in place, and worthless."""
    with channel.session():
        for number, wave in enumerate(waves):
            channel.pack(number, wave.before)
            channel.exchange(wave.sends, wave.receives)
            channel.unpack(wave.after)


class GlooChannel:
    def __init__(self, address: Address) -> None:
        try:
            group = stateless_init_torch_distributed_process_group(
                *address.meeting, address.rank, address.world, backend="gloo", timeout=timedelta(seconds=address.deadline_seconds)
            )
        except RuntimeError as error:
            raise DeadlineExceeded(f"weight sync: not all of {address.world} ranks joined within {address.deadline_seconds:g} s: {error}") from error
        assert isinstance(group, torch.distributed.ProcessGroup)
        self.group = group

    @contextmanager
    def session(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LinkBroken(f"weight sync over gloo: {error}") from error

    def pack(self, wave: int, pairs: Pairs) -> None:
        self.unpack(pairs)

    def unpack(self, pairs: Pairs) -> None:
        for into, out in zip(*pairs, strict=True):
            into.copy_(out)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        # Posted in one order on both sides of a pair, so that one tag serves.
        work = [self.group.recv([tensor], peer, 0) for tensor, peer in receives]
        work += [self.group.send([tensor], peer, 0) for tensor, peer in sends]
        for item in work:
            item.wait()

    def abort(self) -> None:
        """gloo notices by itself that a peer is gone, or that the time is up."""

    def close(self) -> None:
        del self.group


class NcclChannel:
    """Grouped sends and receives on a stream of their own; packing on another, so that a wave is packed while the one before it travels."""

    def __init__(self, address: Address, device: torch.device) -> None:
        self.deadline_seconds = address.deadline_seconds
        store = StatelessProcessGroup.create(
            *address.meeting, address.rank, address.world, store_timeout=max(1, int(address.deadline_seconds))
        )
        try:
            store.barrier(timeout=address.deadline_seconds)  # NCCL's own start has no deadline
        except (RuntimeError, TimeoutError) as error:
            raise DeadlineExceeded(f"weight sync: not all of {address.world} ranks joined within {address.deadline_seconds:g} s") from error
        self.nccl = PyNcclCommunicator(store, device)
        self.link, self.packing = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self.carried: list[torch.cuda.Event] = []  # a wave each
        self.receives = self.expired = self.aborted = False

    @contextmanager
    def session(self) -> Iterator[None]:
        timer = threading.Timer(self.deadline_seconds, self._expire)
        timer.daemon = True
        timer.start()
        self.carried = []
        for stream in (self.link, self.packing):
            stream.wait_stream(torch.cuda.current_stream())
        try:
            yield
            ends = [stream.record_event() for stream in (self.link, self.packing)]
            while not all(event.query() for event in ends) and not self.aborted:
                time.sleep(POLL_SECONDS)
        except RuntimeError as error:
            if not self.aborted:
                raise LinkBroken(f"weight sync over NCCL: {error}") from error
        finally:
            timer.cancel()
        if self.expired:
            raise DeadlineExceeded(f"weight sync: a rank did not send or receive within {self.deadline_seconds:g} s")
        if self.aborted:
            raise LinkBroken("weight sync over NCCL: an engine failed")

    def _expire(self) -> None:
        self.expired = True
        self.abort()

    def abort(self) -> None:
        """The one way to end kernels, and calls of NCCL, that wait for a peer that is gone."""
        self.aborted = True
        self.nccl.destroy()

    def pack(self, wave: int, pairs: Pairs) -> None:
        """Into the half of the stage that wave - 2 has left. What a rank passes on came with wave - 1, and is packed after that."""
        if pairs[0]:
            self._copy(pairs, after=self.carried[-1:] if self.receives else self.carried[-2:-1])

    def unpack(self, pairs: Pairs) -> None:
        if pairs[0]:
            self._copy(pairs, after=self.carried[-1:])

    def _copy(self, pairs: Pairs, after: Sequence[torch.cuda.Event]) -> None:
        for event in after:
            self.packing.wait_event(event)
        with torch.cuda.stream(self.packing):
            torch._foreach_copy_(*pairs)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        self.link.wait_stream(self.packing)
        self.receives = self.receives or bool(receives)
        self.nccl.group_start()
        for tensor, peer in sends:
            self.nccl.send(tensor, peer, self.link)
        for tensor, peer in receives:
            self.nccl.recv(tensor, peer, self.link)
        self.nccl.group_end()
        self.carried.append(self.link.record_event())

    def close(self) -> None:
        self.nccl.destroy()
