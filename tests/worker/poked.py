"""The engine's actor with a door: a test reaches into vLLM's worker process."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

from rlhf_worker.engines.engine import Engine


class PokedEngine(Engine):
    async def poke(self, function: Callable[..., Any]) -> Any:
        """function(worker) in the worker process of the first rank."""
        return (await self._running().collective_rpc(function))[0]

    async def sleeps(self) -> bool:
        return bool(await self._running().is_sleeping())


def flip_one_element(worker: Any) -> str:
    """The lowest bit of one element of a parameter that vLLM computes with as it came. Returns its name."""
    name, parameter = next(
        (n, p) for n, p in worker.model_runner.get_model().named_parameters() if p.numel() and "norm" in n
    )
    parameter.data.view(torch.int32)[5] ^= 1
    return str(name)


def freeze(worker: Any) -> int:
    """Soon after this call (its answer must still go out) this process neither works nor dies. Returns its number."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    return os.getpid()
