"""A reward service: POST {"samples": [{"prompt", "completion", ...row}]} -> {"rewards": [float, ...]}."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, arguments, failed, finite

BATCH = 64  # most samples of one request
BACKOFF_LIMIT = 30.0  # seconds


class HttpReward:
    """Asks the service in batches, `spec.workers` at a time; each batch has a deadline and is retried with a doubling pause."""

    def __init__(self, spec: RewardSpec, backoff: float = 0.5) -> None:
        if spec.url is None:
            raise BadSpec(f"rewards[{spec.name}].url is missing")
        self.spec, self._url, self._backoff = spec, spec.url, backoff

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One value a sample, in order. Raises RewardFailed. Must not be called from a thread that runs an event loop."""
        return asyncio.run(self._score(samples))

    async def _score(self, samples: Sequence[Sample]) -> list[float]:
        size = max(1, min(BATCH, -(-len(samples) // self.spec.workers)))
        gate = asyncio.Semaphore(self.spec.workers)
        async with httpx.AsyncClient(timeout=None, follow_redirects=True) as client:
            batches = [samples[start : start + size] for start in range(0, len(samples), size)]
            answers = await asyncio.gather(*(self._batch(client, gate, batch) for batch in batches))
        return [value for answer in answers for value in answer]

    async def _batch(self, client: httpx.AsyncClient, gate: asyncio.Semaphore, batch: Sequence[Sample]) -> list[float]:
        reason = Failure("never tried")
        async with gate:
            for attempt in range(self.spec.retries + 1):
                if attempt:
                    await asyncio.sleep(min(BACKOFF_LIMIT, self._backoff * 2 ** (attempt - 1)))
                try:
                    return await self._post(client, batch)
                except Failure as failure:
                    reason = failure
        raise failed(self.spec, batch[0], reason)

    async def _post(self, client: httpx.AsyncClient, batch: Sequence[Sample]) -> list[float]:
        body = _body(batch)
        try:
            async with asyncio.timeout(self.spec.timeout_seconds):
                response = await client.post(self._url, content=body, headers={"content-type": "application/json"})
        except TimeoutError:
            raise Failure(f"{self._url}: no answer within {self.spec.timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise Failure(f"{self._url}: {type(error).__name__}: {error}") from None
        try:
            return _values(response, len(batch))
        except Failure as failure:
            raise Failure(f"{self._url}: {failure}") from None

    def close(self) -> None:
        """Nothing outlives a call."""


def _body(batch: Sequence[Sample]) -> bytes:
    try:
        return json.dumps({"samples": [arguments(sample) for sample in batch]}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise Failure(f"a column of the data is no JSON, so it cannot be sent: {error}") from None


def _values(response: httpx.Response, count: int) -> list[float]:
    if response.status_code != httpx.codes.OK:
        raise Failure(f"HTTP {response.status_code}: {response.text[:300]!r}")
    try:
        answer: Any = response.json()
        rewards = list(answer["rewards"])
    except (ValueError, KeyError, TypeError):
        raise Failure(f'the answer must be {{"rewards": [number, ...]}}: {response.text[:300]!r}') from None
    if len(rewards) != count:
        raise Failure(f"{len(rewards)} rewards for {count} samples")
    return [finite(value) for value in rewards]
