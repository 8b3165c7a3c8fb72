"""A reward service: POST {"samples": [{"prompt", "completion", ...row}]} -> {"rewards": [float, ...]}.

Beside "rewards" may stand "metrics": [{name: number}, ...]. With scope group a request holds all samples of one prompt.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass

import httpx

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, Judgement, Once, Reward, arguments, no_json


class Service(Reward):
    """Asks a URL; each request has a deadline, and waits before it is repeated.

    What is asked and how the answer is read is the subclass's: `question` and `values`, which raise Failure. Raises
    BadSpec at once for a URL that is none, and for a proxy or certificates of the environment that cannot be used.
    """

    def __init__(self, spec: RewardSpec, backoff: float = 0.5) -> None:
        super().__init__(spec)
        assert spec.url is not None
        try:
            url = httpx.URL(spec.url)
        except httpx.InvalidURL as error:
            raise BadSpec(f"rewards[{spec.name}].url: {spec.url!r} is no URL: {error}") from None
        self._proxy, variable = proxy(url, getproxies_environment())
        try:
            self._transport()
        except (httpx.InvalidURL, ImportError, OSError, ValueError) as error:
            where = "SSL_CERT_FILE or SSL_CERT_DIR" if isinstance(error, OSError) else variable
            fix = f"correct it in pods.trainer.env, or name {url.host} in NO_PROXY"
            raise BadSpec(
                f"rewards[{spec.name}].url: {where} of the trainer pods cannot be used for it: {error}: {fix}"
            ) from None
        self._url, self.backoff = spec.url, backoff
        self.headers: dict[str, str] = {}

    def question(self, batch: Sequence[Sample], attempt: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def values(self, answer: Any, count: int) -> list[Judgement]:
        """Of `count` samples, from the answer's JSON."""
        raise NotImplementedError

    def _transport(self) -> httpx.AsyncHTTPTransport:
        """Given one, httpx reads no variables of proxies by itself: it would fail at a network in NO_PROXY."""
        return httpx.AsyncHTTPTransport(proxy=self._proxy, limits=httpx.Limits(max_connections=self.spec.workers))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Once]:
        options: dict[str, Any] = {"timeout": None, "follow_redirects": True, "headers": self.headers}
        async with httpx.AsyncClient(transport=self._transport(), **options) as client:
            yield partial(self._once, client)

    async def _once(self, client: httpx.AsyncClient, batch: Sequence[Sample], attempt: int) -> list[Judgement]:
        body = _json(self.question(batch, attempt), batch)
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

    def _read(self, response: httpx.Response, count: int) -> list[Judgement]:
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

    def values(self, answer: Any, count: int) -> list[Judgement]:
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise Failure(f'the answer must be {{"rewards": [number, ...]}}: {json.dumps(answer):.300}')
        metrics = answer.get("metrics", [{}] * len(rewards))
        if not isinstance(metrics, list) or not all(isinstance(each, dict) for each in metrics):
            raise Failure(f'"metrics" must be [{{name: number}}, ...]: {json.dumps(metrics):.300}')
        if len(metrics) != len(rewards):
            raise Failure(f"{len(metrics)} metrics for {len(rewards)} rewards")
        return self.judgements(list(zip(rewards, metrics, strict=True)), count)


def _json(question: Mapping[str, Any], batch: Sequence[Sample]) -> bytes:
    """Raises BadData for a column that JSON cannot hold."""
    try:
        return json.dumps(question, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        uid, words = next((sample.prompt.uid, words) for sample in batch if (words := no_json(arguments(sample))))
        raise BadData(f"prompt {uid}: {words}: make it text or numbers, or leave the column out") from None


def proxy(url: httpx.URL, proxies: Mapping[str, str]) -> tuple[str | None, str]:
    """Where requests to `url` go first, None for straight to it, and the variable that says so.

    `proxies`: as urllib reads the environment: by scheme, `all`, and `no` for NO_PROXY. Its networks (10.0.0.0/8,
    fd00::/8) are those of addresses in URLs; what is neither a name nor a network is left out.
    """
    scheme = url.scheme if url.scheme in proxies else "all"
    direct = proxy_bypass(url.host, dict(proxies)) or _within(url.host, proxies.get("no", ""))
    if direct or scheme not in proxies:
        return None, ""
    address = proxies[scheme]
    return address if "://" in address else f"http://{address}", f"{scheme.upper()}_PROXY"


def _within(host: str, networks: str) -> bool:
    for each in networks.split(","):
        with contextlib.suppress(ValueError):
            if ip_address(host) in ip_network(each.strip(), strict=False):
                return True
    return False
