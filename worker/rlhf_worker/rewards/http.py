"""A reward service: POST {"samples": [{"prompt", "completion", ...row}]} -> {"rewards": [float, ...]}."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, Once, Reward, arguments, finite


class Service(Reward):
    """Asks a URL; each request has a deadline, and waits before it is repeated.

    What is asked and how the answer is read is the subclass's: `question` and `values`, which raise Failure.
    """

    def __init__(self, spec: RewardSpec, backoff: float = 0.5) -> None:
        super().__init__(spec)
        assert spec.url is not None
        try:
            httpx.URL(spec.url)
        except httpx.InvalidURL as error:
            raise BadSpec(f"rewards[{spec.name}].url: {spec.url!r} is no URL: {error}") from None
        self._url, self.backoff = spec.url, backoff
        self.headers: dict[str, str] = {}

    def question(self, batch: Sequence[Sample], attempt: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def values(self, answer: Any, count: int) -> list[float]:
        """`count` finite values from the answer's JSON."""
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Once]:
        limits = httpx.Limits(max_connections=self.spec.workers)
        async with httpx.AsyncClient(timeout=None, follow_redirects=True, headers=self.headers, limits=limits) as client:
            yield partial(self._once, client)

    async def _once(self, client: httpx.AsyncClient, batch: Sequence[Sample], attempt: int) -> list[float]:
        body = _json(self.question(batch, attempt))
        try:
            async with asyncio.timeout(self.spec.timeout_seconds):
                response = await client.post(self._url, content=body, headers={"content-type": "application/json"})
            return self._read(response, len(batch))
        except TimeoutError:
            raise Failure(f"{self._url}: no answer within {self.spec.timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise Failure(f"{self._url}: {type(error).__name__}: {error}") from None
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
