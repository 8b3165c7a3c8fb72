"""A reward service: POST {"samples": [{"prompt", "completion", ...row}]} -> {"rewards": [float, ...]}."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, arguments, failed, finite

BACKOFF_LIMIT = 30.0  # seconds


class Service:
    """Asks a URL in batches, `spec.workers` at a time; each batch has a deadline and is retried with a doubling pause.

    What is asked and how the answer is read is the subclass's: `question` and `values`, which raise Failure.
    """

    batch = 1  # most samples of one request

    def __init__(self, spec: RewardSpec, backoff: float = 0.5) -> None:
        if spec.url is None:
            raise BadSpec(f"rewards[{spec.name}].url is missing")
        try:
            httpx.URL(spec.url)
        except httpx.InvalidURL as error:
            raise BadSpec(f"rewards[{spec.name}].url: {spec.url!r} is no URL: {error}") from None
        self.spec, self._url, self._backoff = spec, spec.url, backoff
        self.headers: dict[str, str] = {}

    def question(self, batch: Sequence[Sample], attempt: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def values(self, answer: Any, count: int) -> list[float]:
        """`count` finite values from the answer's JSON."""
        raise NotImplementedError

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One value a sample, in order. Raises RewardFailed. Must not be called from a thread that runs an event loop."""
        return asyncio.run(self._score(samples))

    async def _score(self, samples: Sequence[Sample]) -> list[float]:
        size = max(1, min(self.batch, -(-len(samples) // self.spec.workers)))
        gate = asyncio.Semaphore(self.spec.workers)
        limits = httpx.Limits(max_connections=self.spec.workers)
        async with httpx.AsyncClient(timeout=None, follow_redirects=True, headers=self.headers, limits=limits) as client:
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
                    return await self._post(client, batch, attempt)
                except Failure as failure:
                    reason = failure
        raise failed(self.spec, batch[0], reason)

    async def _post(self, client: httpx.AsyncClient, batch: Sequence[Sample], attempt: int) -> list[float]:
        body = _json(self.question(batch, attempt))
        try:
            async with asyncio.timeout(self.spec.timeout_seconds):
                response = await client.post(self._url, content=body, headers={"content-type": "application/json"})
        except TimeoutError:
            raise Failure(f"{self._url}: no answer within {self.spec.timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise Failure(f"{self._url}: {type(error).__name__}: {error}") from None
        try:
            return self._read(response, len(batch))
        except Failure as failure:
            raise Failure(f"{self._url}: {failure}") from None

    def _read(self, response: httpx.Response, count: int) -> list[float]:
        if response.status_code != httpx.codes.OK:
            raise Failure(f"HTTP {response.status_code}: {response.text[:300]!r}")
        try:
            answer: Any = response.json()
        except (ValueError, RecursionError):
            raise Failure(f"the answer is no JSON: {response.text[:300]!r}") from None
        return self.values(answer, count)

    def close(self) -> None:
        """Nothing outlives a call."""


class HttpReward(Service):
    batch = 64

    def question(self, batch: Sequence[Sample], attempt: int) -> Mapping[str, Any]:
        return {"samples": [arguments(sample) for sample in batch]}

    def values(self, answer: Any, count: int) -> list[float]:
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise Failure(f'the answer must be {{"rewards": [number, ...]}}: {json.dumps(answer):.300}')
        if len(rewards) != count:
            raise Failure(f"{len(rewards)} rewards for {count} samples")
        return [finite(value) for value in rewards]


def _json(question: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(question, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise Failure(f"a column of the data is no JSON, so it cannot be sent: {error}") from None
