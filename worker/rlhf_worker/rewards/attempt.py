"""What every reward does, whatever its type: samples in batches, several at a time, and a batch that fails again."""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadData, RewardFailed
from rlhf_worker.experience import Sample

T = TypeVar("T")
BACKOFF_LIMIT = 30.0  # seconds
METRIC = re.compile(r"[a-z][a-z0-9_]{0,39}")
METRICS = 32  # names of one reward in a run: each is a series of its own in telemetry


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one sample: a finite value and metrics beside it; NaN with a `failure`, which says why there is none."""

    value: float
    metrics: dict[str, float] = field(default_factory=dict)
    failure: str = ""


Once = Callable[[Sequence[Sample], int], Awaitable[list[Judgement]]]  # a batch, the number of the try; raises Failure


class Failure(Exception):
    """One try failed; the message says how. It is tried again, or becomes what ends the run."""


async def tried(retries: int, once: Callable[[int], Awaitable[T]], backoff: float = 0.0) -> T:
    """What the first of `retries + 1` tries gives that does not fail. Raises the last one's Failure.

    `once` gets the number of the try, from 0; `backoff`: seconds before the second, twice as many before each further
    one. """
    for attempt in range(retries):
        with contextlib.suppress(Failure):
            return await once(attempt)
        await asyncio.sleep(min(BACKOFF_LIMIT, backoff * 2**attempt))
    return await once(retries)


def arguments(sample: Sample) -> dict[str, Any]:
    """What a reward gets of a sample: the prompt as the data has it, the completion, and the row's other columns."""
    return {"prompt": sample.prompt.text, **sample.prompt.fields, "completion": sample.text}


def of_group(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a reward gets of all samples of a prompt: as above, with `completions` in their order. Raises BadData."""
    row = arguments(samples[0])
    del row["completion"]
    if "completions" in row:
        uid = samples[0].prompt.uid
        raise BadData(f"prompt {uid}: a reward of scope group gets `completions`, so no column may have that name")
    return {**row, "completions": [sample.text for sample in samples]}


def no_json(fields: Mapping[str, Any]) -> str:
    """Which of them cannot be sent, and why; empty where all can."""
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            return f"column {name!r} is no JSON ({error})"
    return ""


def groups(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Neighbours of one prompt."""
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.prompt.uid)]


def finite(value: Any) -> float:
    """A reward must be a finite number. Raises Failure."""
    with contextlib.suppress(OverflowError):  # an integer beyond the floats
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
    raise Failure(f"returned {value!r:.200}, a finite number is needed")


class Reward:
    """`spec.workers` batches at a time, each tried up to `spec.retries` times again. Threads may share it.

    What one try is, the subclass says.
    """

    batch = 1  # most samples of one, where spec.scope is sample
    backoff = 0.0  # seconds before the second try

    def __init__(self, spec: RewardSpec) -> None:
        self.spec = spec
        self._metrics = frozenset[str]()

    def opened(self) -> AbstractAsyncContextManager[Once]:
        """What makes one try, for the length of one call of `score`."""
        raise NotImplementedError

    def score(self, samples: Sequence[Sample]) -> list[Judgement]:
        """One a sample, in order; samples of one prompt stand together. Not from a thread that runs an event loop.

        Raises RewardFailed at the first batch that has failed every try, unless spec.onFailure is redraw: then its
        judgements hold the failure. Raises BadData and BadSpec for what no further try can mend.
        """
        return asyncio.run(self._score(samples))

    async def _score(self, samples: Sequence[Sample]) -> list[Judgement]:
        gate = asyncio.Semaphore(self.spec.workers)
        async with self.opened() as once:
            judged = await asyncio.gather(*(self._gated(once, gate, batch) for batch in self._batches(samples)))
        return [judgement for batch in judged for judgement in batch]

    def _batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        if self.spec.scope == "group":
            return list(groups(samples))
        size = max(1, min(self.batch, -(-len(samples) // self.spec.workers)))
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    async def _gated(self, once: Once, gate: asyncio.Semaphore, batch: Sequence[Sample]) -> list[Judgement]:
        async with gate:
            return await self._tried(once, batch, self.spec.retries)

    async def _tried(self, once: Once, batch: Sequence[Sample], retries: int) -> list[Judgement]:
        try:
            return await tried(retries, lambda attempt: once(batch, attempt), self.backoff)
        except Failure as reason:
            tries = f"{self.spec.retries + 1} times" if self.spec.retries else "once (retries is 0)"
            which = f"prompt {batch[0].prompt.uid}, completion {batch[0].text!r:.120}"
            words = f"rewards[{self.spec.name}] failed {tries} on {which}: {reason}"
        if self.spec.on_failure == "stop":
            raise RewardFailed(words)
        if self.spec.scope == "sample" and len(batch) > 1:  # whose fault it is
            return [judgement for sample in batch for judgement in await self._tried(once, [sample], 0)]
        return [Judgement(math.nan, failure=words)] * len(batch)

    def judgements(self, entries: Sequence[tuple[Any, dict[str, Any]]], count: int) -> list[Judgement]:
        """Of `count` samples, from numbers with metrics beside them. Raises Failure."""
        if len(entries) != count:
            raise Failure(f"{len(entries)} rewards for {count} samples")
        names = self._metrics.union(*(metrics for _, metrics in entries))
        if bad := sorted(name for name in names if not METRIC.fullmatch(name)):
            raise Failure(f"the name of a metric must match {METRIC.pattern}: {bad[0]!r:.80}")
        if len(names) > METRICS:
            raise Failure(f"{len(names)} names of metrics so far, {METRICS} are the most of a run: use fixed names")
        self._metrics = names
        return [
            Judgement(finite(value), {key: finite(of) for key, of in metrics.items()}) for value, metrics in entries
        ]

    def close(self) -> None:
        """Nothing that it started outlives this."""
