"""A function on several ranks of a gloo group, each a process of its own."""

import io
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEADLINE_SECONDS = 240.0
# Ranks are forked from one process that has imported what takes them seconds each, and started nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rlhf_worker.trainer.rank", "hack.tiny_model", "pytest"])


def over_ranks(world: int, function: Callable[..., Any], *arguments: Any, lost: Sequence[int] = ()) -> list[Any]:
    """function(rank, world, *arguments) on every rank; the results by rank, None of those in `lost`, which die. Raises
    what a rank raised, as text.
    """
    with tempfile.TemporaryDirectory() as meeting:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            CONTEXT.Process(target=_rank, args=(pipes[i][1], i, world, meeting, function, arguments))
            for i in range(world)
        ]
        for rank in ranks:
            rank.start()
        try:
            found = [None if rank in lost else _answer(pipe) for rank, (pipe, _) in enumerate(pipes)]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return found


def _answer(pipe: Connection) -> Any:
    return torch.load(
        io.BytesIO(pipe.recv_bytes()), weights_only=False,
    ) if pipe.poll(DEADLINE_SECONDS) else TimeoutError("no answer")


def _rank(
    pipe: Connection, rank: int, world: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(meeting) / 'rendezvous'}", rank=rank, world_size=world)
    try:
        answer = function(rank, world, *arguments)
    except Exception as error:
        answer = RuntimeError(f"rank {rank}: {error!r}")
    whole = io.BytesIO()  # a pipe by itself would send a tensor as a name in this process's memory
    torch.save(answer, whole)
    pipe.send_bytes(whole.getvalue())
