"""Requests to the API server, and what its answers mean. Paths and bodies are the caller's."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlhf_api import GROUP
from rlhf_client.errors import AlreadyThere, ClientError, NoConnection, NotAllowed, NotFound, OtherVersion, Refused
from rlhf_client.kubeconfig import Connection

Raw = dict[str, Any]
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 30.0
UNKNOWN_USER = 401
UNKNOWN = re.compile(r'unknown field "([^"]+)"')


class Http:
    """One connection pool. Every call raises ClientError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        try:
            self._client = httpx.AsyncClient(
                base_url=connection.server, headers=connection.headers, proxy=connection.proxy, trust_env=True,
                verify=connection.tls if connection.tls is not None else True,
                timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            )  # fmt: skip
        except (httpx.InvalidURL, ValueError) as error:
            raise NoConnection(f"the kubeconfig's server or proxy-url cannot be used: {error}") from None
        name = connection.server_name
        self._extensions: dict[str, Any] = {"sni_hostname": name} if name else {}

    async def close(self) -> None:
        await self._client.aclose()

    async def json(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, body: Any = None,
        content: str = "application/json",
    ) -> Raw:
        """The object that the API server answers with."""
        data = None if body is None else json.dumps(body)
        given: Raw = {"params": params, "content": data, "headers": {"Content-Type": content}}
        try:
            answer = await self._client.request(method, path, **given, extensions=self._extensions)
            if answer.status_code == UNKNOWN_USER and self._renewed():
                answer = await self._client.request(method, path, **given, extensions=self._extensions)
        except httpx.HTTPError as error:
            raise self._no_answer(error) from None
        if answer.is_error:
            raise refusal(answer.status_code, answer.text)
        try:
            found: Raw = answer.json()
        except ValueError:
            raise NoConnection(f"{self._connection.server} is no API server: it answers with no JSON") from None
        return found

    async def lines(
        self, path: str, params: Mapping[str, str], *, silent_seconds: float | None = ANSWER_SECONDS,
        renew: bool = True,
    ) -> AsyncIterator[str]:
        """Of an answer that goes on. `silent_seconds`: most time between two; None: no limit. `renew`: a token that is
        refused is taken anew, once.
        """
        waits = httpx.Timeout(silent_seconds, connect=CONNECT_SECONDS)
        given: Raw = {"params": params, "timeout": waits, "extensions": self._extensions}
        try:
            async with self._client.stream("GET", path, **given) as answer:
                if not (again := renew and answer.status_code == UNKNOWN_USER and self._renewed()):
                    if answer.is_error:
                        raise refusal(answer.status_code, (await answer.aread()).decode(errors="replace"))
                    async for line in answer.aiter_lines():
                        yield line
        except httpx.HTTPError as error:
            raise self._no_answer(error) from None
        if again:
            async for line in self.lines(path, params, silent_seconds=silent_seconds, renew=False):
                yield line

    def _renewed(self) -> bool:
        """Whether there is another token than the one that was refused."""
        try:
            headers = self._connection.renew()
        except OSError as error:
            raise NotAllowed(f"the token has expired, and there is no other: {error}") from None
        before = self._client.headers.get("Authorization")
        self._client.headers.update(headers)
        return bool(self._client.headers.get("Authorization") != before)

    def _no_answer(self, error: httpx.HTTPError) -> NoConnection:
        words = str(error) or type(error).__name__
        where = urlsplit(self._connection.server)
        return NoConnection(f"the API server at {where.netloc} does not answer: {words}: is the cluster up, and is it "
            "the right context (kubectl config current-context)?")


def refusal(code: int, text: str) -> ClientError:
    """From an answer of 400 or more. `text`: a Status of the API server, or anything."""
    try:
        status = json.loads(text)
        message, reason = str(status.get("message") or text), str(status.get("reason", ""))
    except (ValueError, AttributeError):
        message, reason = text.strip()[:500] or f"it answers {code}", ""
    if code == UNKNOWN_USER:
        return NotAllowed("the API server does not know you (401): sign in again, or look at the kubeconfig's user")
    if code == 403:
        return NotAllowed(f"{message}: ask for a role that has this right (of the chart's ClusterRoles "
            "rlhf-operator-view reads, rlhf-operator-edit changes)" if GROUP in message else message)
    if code == 404:
        return NotFound(message)
    if code == 409 and reason == "AlreadyExists":
        return AlreadyThere(message)
    if code >= 500 or code == 429:
        return NoConnection(f"the API server has an error ({code}): {message}")
    if unknown := UNKNOWN.findall(message):
        return OtherVersion(f"the cluster's RLHFJob does not know {', '.join(unknown)}: its operator is older than "
            "this client: upgrade the chart with its CRD, or remove the fields")
    return Refused(message)
