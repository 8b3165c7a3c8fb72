"""The connection to the API server: `kubernetes.aio`'s dynamic client behind five calls.

Resources are built from `kinds.py` instead of being discovered: discovery reads every API group at start, and an absent CRD is
an answer here, not an error.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import ClientError
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from kubernetes.aio.dynamic import DynamicClient, Resource

from rlhf_operator import FIELD_MANAGER, metrics
from rlhf_operator.kinds import Kind

log = logging.getLogger(__name__)
Raw = dict[str, Any]
Query = Sequence[tuple[str, str]]
TIMEOUT_SECONDS = 30
PAGE = 500


class ApiError(Exception):
    """The API server said no, or nothing (`status` 0)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{reason or status}: {message}")
        self.status, self.reason, self.message = status, reason, message


class KindMissing(ApiError):
    """The API server does not know the kind: its CRD is not installed."""


class Api(Protocol):
    """What `cluster.py` needs of an API server; tests have one in memory. All raise ApiError."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Raw | None:
        """None when there is no such object."""

    async def list(self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = "") -> list[Raw]:
        """Of all namespaces for None."""

    async def create(self, kind: Kind, namespace: str, body: Raw) -> Raw:
        """With fieldValidation=Strict: an unknown field is an error in words."""

    async def apply(self, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        """Server-side apply by our field manager; with `status`, to the status subresource."""

    async def merge(self, kind: Kind, namespace: str, name: str, body: Raw) -> Raw:
        """JSON merge patch."""

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> None:
        """Of this very object: one that is gone, or has another uid, is no error."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the API server is: a kubeconfig's path, or None for the usual places (in a cluster, KUBECONFIG, ~/.kube)."""

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


class DynamicApi:
    """Api over the network."""

    def __init__(self, connection: Connection, client: ApiClient) -> None:
        self.connection, self.client = connection, client
        self._dynamic = DynamicClient(client)

    @classmethod
    async def connect(cls, connection: Connection) -> "DynamicApi":
        return cls(connection, ApiClient(configuration=await connection.configuration()))

    async def close(self) -> None:
        await self.client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Raw | None:
        try:
            return await self._call("get", kind, namespace, name)
        except KindMissing:
            raise
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = "") -> list[Raw]:
        found: list[Raw] = []
        query = [("limit", str(PAGE)), *([("labelSelector", labels)] if labels else []), *([("fieldSelector", fields)] if fields else [])]
        page: Raw = {"metadata": {"continue": None}}
        while "continue" in page["metadata"]:
            more = [("continue", page["metadata"]["continue"])] if page["metadata"]["continue"] else []
            page = await self._call("get", kind, namespace, None, query=[*query, *more])
            page["metadata"] = {k: v for k, v in page["metadata"].items() if v}
            found += page["items"]
        return found

    async def create(self, kind: Kind, namespace: str, body: Raw) -> Raw:
        return await self._call("post", kind, namespace, None, body=body, query=[("fieldValidation", "Strict"), ("fieldManager", FIELD_MANAGER)])

    async def apply(self, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        query = [("fieldManager", FIELD_MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
        return await self._call("patch", kind, namespace, body["metadata"]["name"], body=body, query=query, tail="/status" if status else "")

    async def merge(self, kind: Kind, namespace: str, name: str, body: Raw) -> Raw:
        return await self._call("patch", kind, namespace, name, body=body, content="application/merge-patch+json")

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> None:
        grace = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background", **grace}
        try:
            await self._call("delete", kind, namespace, name, body=body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _call(
        self, verb: str, kind: Kind, namespace: str | None, name: str | None, *,
        body: Raw | None = None, query: Query = (), tail: str = "", content: str = "application/apply-patch+yaml",
    ) -> Raw:
        path = _resource(kind).path(name=name, namespace=namespace) + tail
        options: Raw = {"query_params": list(query), "header_params": {}, "_request_timeout": TIMEOUT_SECONDS, "serialize": False}
        if verb == "patch":
            options["content_type"] = content
        if verb != "get":
            metrics.API_WRITES.labels(verb=verb, kind=kind.kind).inc()
        try:
            return await self._request(verb, path, body, options)
        except ApiException as error:
            raise _translated(kind, error) from None
        except (ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", f"{type(error).__name__}: {error}") from error

    async def _request(self, verb: str, path: str, body: Raw | None, options: Raw) -> Raw:
        """Once more after a 401: tokens of exec plugins and files expire."""
        try:
            response = await self._dynamic.request(verb, path, body=body, **dict(options))
        except ApiException as error:
            if error.status != 401:
                raise
            self.client.configuration.api_key = (await self.connection.configuration()).api_key
            response = await self._dynamic.request(verb, path, body=body, **dict(options, header_params={}))
        read: Raw = await response.json()
        return read


def _resource(kind: Kind) -> Resource:
    return Resource(
        prefix="apis" if kind.group else "api", group=kind.group, api_version=kind.version,
        kind=kind.kind, name=kind.plural, namespaced=True,
    )


def _translated(kind: Kind, error: ApiException) -> ApiError:
    """A 404 that is no Status object comes from the router: there is no such path, so no such kind."""
    try:
        told = json.loads(error.body or "")
        return ApiError(error.status or 0, told.get("reason", ""), told.get("message", ""))
    except (ValueError, AttributeError):
        if error.status == 404:
            return KindMissing(404, "KindMissing", f"the API server has no {kind.api_version} {kind.kind}")
        return ApiError(error.status or 0, str(error.reason or ""), str(error.body or "")[:1024])
