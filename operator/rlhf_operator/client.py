"""The connection to the API server: seven calls over the transport of `kubernetes.aio`.

Paths are built from `kinds.py` instead of being discovered: discovery reads every API group at start, and an absent
CRD is an answer here, not an error. Bodies go straight to the transport: the dynamic client copies each of them
twice on the way.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol
from urllib.parse import urlencode

from aiohttp import ClientError
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from rlhf_operator import FIELD_MANAGER, metrics
from rlhf_operator.kinds import Kind

log = logging.getLogger(__name__)
Raw = dict[str, Any]
TIMEOUT_SECONDS = 30
PAGE = 200
# An apply with a field that the CRD lacks is refused as a whole (as a 500, in Kubernetes 1.36), and names one at a
# time.
UNDECLARED = re.compile(r"(\.\S+): field not declared in schema")
UNDECLARED_SECONDS = 300.0
APPLY, MERGE, JSON = "application/apply-patch+yaml", "application/merge-patch+json", "application/json"


class ApiError(Exception):
    """The API server said no, or nothing (`status` 0). `retry_after`: seconds that it asks to be left alone."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{reason or status}: {message}")
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after


class KindMissing(ApiError):
    """The API server does not know the kind: its CRD is not installed."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, which as a whole is as of `version`. `more` asks for the next part; empty: this is the last."""

    items: list[Raw] = field(default_factory=list)
    version: int = 0
    more: str = ""


class Api(Protocol):
    """What the operator needs of an API server; tests have one in memory. All raise ApiError, and answer with what
    is there now."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Raw | None:
        """None when there is no such object."""

    async def list(self, kind: Kind, namespace: str | None, *, labels: str = "", more: str = "") -> Page:
        """Of all namespaces for None."""

    async def create(self, kind: Kind, namespace: str, body: Raw) -> Raw:
        """With fieldValidation=Strict: an unknown field is an error in words."""

    async def apply(self, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        """Server-side apply by our field manager; with `status`, to the status subresource, where an older CRD may
        know fewer fields than we do."""

    async def merge(self, kind: Kind, namespace: str, name: str, body: Raw) -> Raw:
        """JSON merge patch."""

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None
    ) -> Raw | None:
        """Of this very object: one that is gone, or has another uid, is no error. The object while it is still
        there, else None."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the API server is: a kubeconfig's path, or None for the usual places (in a cluster, KUBECONFIG,
    ~/.kube)."""

    kubeconfig: str | None = None

    async def configuration(self) -> Configuration:
        """Raises ConfigException. Read anew at each call, since files and tokens change."""
        config = Configuration()
        if self.kubeconfig is None:
            try:
                load_incluster_config(client_configuration=config)
                return config
            except ConfigException:
                log.debug("not in a cluster: reading the kubeconfig")
        await load_kube_config(config_file=self.kubeconfig, client_configuration=config)
        return config


class KubernetesApi:
    """Api over the network. `may_write` is asked before each write: an operator that lost its lease changes nothing."""

    def __init__(self, connection: Connection, client: ApiClient) -> None:
        self.connection, self.client = connection, client
        self.may_write: Callable[[], bool] = lambda: True
        self._undeclared: dict[tuple[str, ...], float] = {}  # fields of the status that the CRD lacks, and since when

    @classmethod
    async def connect(cls, connection: Connection) -> "KubernetesApi":
        return cls(connection, ApiClient(configuration=await connection.configuration()))

    async def close(self) -> None:
        await self.client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Raw | None:
        try:
            return await self._call("GET", kind, namespace, name)
        except KindMissing:
            raise
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None, *, labels: str = "", more: str = "") -> Page:
        query = {"limit": str(PAGE), "labelSelector": labels, "continue": more}
        answer = await self._call("GET", kind, namespace, None, query={k: v for k, v in query.items() if v})
        meta = answer["metadata"]
        return Page(answer["items"], int(meta.get("resourceVersion") or 0), meta.get("continue") or "")

    async def create(self, kind: Kind, namespace: str, body: Raw) -> Raw:
        query = {"fieldValidation": "Strict", "fieldManager": FIELD_MANAGER}
        return await self._call("POST", kind, namespace, None, body=body, query=query)

    async def apply(self, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        name, tail = body["metadata"]["name"], "/status" if status else ""
        while True:
            sent = reduce(without, self._left_out(), body) if status else body
            try:
                return await self._call(
                    "PATCH", kind, namespace, name, body=sent, query=query, tail=tail, content=APPLY,
                )
            except ApiError as error:
                unknown = UNDECLARED.search(error.message) if status else None
                if unknown is None or (lacking := field_path(unknown[1])) in self._left_out():
                    raise
                log.warning(
                    "the CRD is older than this operator and lacks %s: left out until it is upgraded", unknown[1],
                )
                self._undeclared[lacking] = time.monotonic()

    def _left_out(self) -> set[tuple[str, ...]]:
        """For some minutes each: the CRD may be upgraded after the operator."""
        now = time.monotonic()
        return {lacking for lacking, since in self._undeclared.items() if now - since < UNDECLARED_SECONDS}

    async def merge(self, kind: Kind, namespace: str, name: str, body: Raw) -> Raw:
        return await self._call(
            "PATCH", kind, namespace, name, body=body, query={"fieldManager": FIELD_MANAGER}, content=MERGE
        )

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None
    ) -> Raw | None:
        grace = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background", **grace}
        try:
            answer = await self._call("DELETE", kind, namespace, name, body=body)
        except KindMissing:
            return None
        except ApiError as error:
            if error.status != 404 and not (error.status == 409 and "UID in precondition" in error.message):
                raise
            return None
        return None if answer.get("kind") == "Status" else answer

    async def _call(
        self,
        verb: str,
        kind: Kind,
        namespace: str | None,
        name: str | None,
        *,
        body: Raw | None = None,
        query: dict[str, str] | None = None,
        tail: str = "",
        content: str = JSON,
    ) -> Raw:
        if verb != "GET":
            if not self.may_write():
                raise ApiError(0, "NotLeader", "another operator leads: this one writes nothing any more")
            metrics.API_WRITES.labels(verb=verb.lower(), kind=kind.kind).inc()
        else:
            metrics.API_READS.labels(kind.kind).inc()
        url = (
            self.client.configuration.host
            + path(kind, namespace, name)
            + tail
            + (f"?{urlencode(query)}" if query else "")
        )
        try:
            status, headers, answer = await self._request(verb, url, body, content)
        except (ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", f"{type(error).__name__}: {error}") from error
        if status >= 400:
            raise refused(kind, status, answer, headers.get("Retry-After"))
        return read_object(answer)

    async def _request(self, verb: str, url: str, body: Raw | None, content: str) -> tuple[int, Any, bytes]:
        """Once more after a 401: tokens of exec plugins and files expire."""
        response = await self._send(verb, url, body, content)
        if response.status == 401:
            await response.read()
            self.client.configuration.api_key = (await self.connection.configuration()).api_key
            response = await self._send(verb, url, body, content)
        return response.status, response.headers, await response.read()

    async def _send(self, verb: str, url: str, body: Raw | None, content: str) -> Any:
        token = await self.client.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        headers = {"Accept": JSON, "Content-Type": content, **({"Authorization": token} if token else {})}
        return await self.client.rest_client.request(
            verb, url, headers=headers, body=body, _request_timeout=TIMEOUT_SECONDS
        )


def read_object(answer: bytes) -> Raw:
    """Of a proxy in between, an answer may be anything."""
    try:
        read = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ApiError(0, "Unreadable", f"the answer is no JSON: {type(error).__name__}: {error}") from error
    if not isinstance(read, dict):
        raise ApiError(0, "Unreadable", f"the answer is no object: {answer[:64]!r}")
    return read


def field_path(told: str) -> tuple[str, ...]:
    """`.status.failures[0].words`, as the API server names it, without what tells items of a list apart."""
    return tuple(re.sub(r"\[[^]]*\]", "", told).strip(".").split("."))


def without(node: Any, field: tuple[str, ...]) -> Any:
    """A copy of the object that lacks the field, in every item of a list on the way."""
    if isinstance(node, list):
        return [without(item, field) for item in node]
    if not isinstance(node, dict) or field[0] not in node:
        return node
    if len(field) == 1:
        return {key: value for key, value in node.items() if key != field[0]}
    return {**node, field[0]: without(node[field[0]], field[1:])}


def path(kind: Kind, namespace: str | None, name: str | None) -> str:
    """Names are DNS labels, which need no quoting."""
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    return f"{root}{f'/namespaces/{namespace}' if namespace else ''}/{kind.plural}{f'/{name}' if name else ''}"


def refused(kind: Kind, status: int, answer: bytes, retry_after: str | None = None) -> ApiError:
    """A 404 that is no Status object comes from the router: there is no such path, so no such kind."""
    wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
    try:
        told = json.loads(answer)
        return ApiError(status, told.get("reason", ""), told.get("message", ""), wait)
    except (ValueError, AttributeError):
        if status == 404:
            return KindMissing(404, "KindMissing", f"the API server has no {kind.api_version} {kind.kind}")
        return ApiError(status, "", answer.decode(errors="replace")[:1024], wait)
