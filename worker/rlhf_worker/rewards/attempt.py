"""What every reward does, whatever its type: samples in batches, several at a time, and a batch that fails again."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import RewardFailed
from rlhf_worker.experience import Sample

T = TypeVar("T")
Once = Callable[[Sequence[Sample], int], Awaitable[list[float]]]  # a batch, and the number of the try -> a finite value a sample; raises Failure
BACKOFF_LIMIT = 30.0  # seconds


class Failure(Exception):
    """One try failed; the message says how. It is tried again, or becomes what ends the run."""


async def tried(retries: int, once: Callable[[int], Awaitable[T]], backoff: float = 0.0) -> T:
    """What the first of `retries + 1` tries gives that does not fail. Raises the last one's Failure.

    `once` gets the number of the try, from 0; `backoff`: seconds before the second, twice as many before each further one.
    """
    for attempt in range(retries):
        with contextlib.suppress(Failure):
            return await once(attempt)
        await asyncio.sleep(min(BACKOFF_LIMIT, backoff * 2**attempt))
    return await once(retries)


def arguments(sample: Sample) -> dict[str, Any]:
    """What a reward gets of a sample: the prompt as the data has it, the completion, and the row's other columns."""
    return {"prompt": sample.prompt.text, **sample.prompt.fields, "completion": sample.text}


def finite(value: Any) -> float:
    """A reward must be a finite number. Raises Failure."""
    with contextlib.suppress(OverflowError):  # an integer beyond the floats
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
    raise Failure(f"returned {value!r:.200}, a finite number is needed")


class Reward:
    """`spec.workers` batches at a time, each tried up to `spec.retries` times again. What one try is, the subclass says. Threads may share it."""

    batch = 1  # most samples of one
    backoff = 0.0  # seconds before the second try

    def __init__(self, spec: RewardSpec) -> None:
        self.spec = spec

    def opened(self) -> AbstractAsyncContextManager[Once]:
        """What makes one try, for the length of one call of `score`."""
        raise NotImplementedError

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One value a sample, in order. Must not be called from a thread that runs an event loop.

        Raises RewardFailed at the first batch that has failed every try; the others are given up.
        """
        return asyncio.run(self._score(samples))

    async def _score(self, samples: Sequence[Sample]) -> list[float]:
        size = max(1, min(self.batch, -(-len(samples) // self.spec.workers)))
        gate = asyncio.Semaphore(self.spec.workers)
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        async with self.opened() as once:
            values = await asyncio.gather(*(self._tried(once, gate, batch) for batch in batches))
        return [value for found in values for value in found]

    async def _tried(self, once: Once, gate: asyncio.Semaphore, batch: Sequence[Sample]) -> list[float]:
        async with gate:
            try:
                return await tried(self.spec.retries, lambda attempt: once(batch, attempt), self.backoff)
            except Failure as reason:
                tries = f"{self.spec.retries + 1} times" if self.spec.retries else "once (retries is 0)"
                which = f"prompt {batch[0].prompt.uid}, completion {batch[0].text!r:.120}"
                raise RewardFailed(f"rewards[{self.spec.name}] failed {tries} on {which}: {reason}") from None

    def close(self) -> None:
        """Nothing that it started outlives this."""
