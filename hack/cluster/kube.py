"""The few API server calls this package needs, on the standard library.

``Api`` is one identity at one server. Paths are what the server serves (``/api/v1/nodes/x``); objects are plain dicts.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Object = dict[str, Any]
MERGE = "application/merge-patch+json"


class ApiError(Exception):
    """The server refused: ``code`` is the HTTP status (0 when it could not be reached), ``str()`` is its message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Api:
    host: str
    port: int
    token: str = field(repr=False)
    ca: str = field(repr=False)  # PEM

    @classmethod
    def from_kubeconfig(cls, path: Path) -> Api:
        """Read a kubeconfig that :func:`hack.cluster.components.kubeconfig` wrote (JSON, one context)."""
        config = json.loads(path.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        url = urllib.parse.urlsplit(cluster["server"])
        ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
        return cls(url.hostname or "", url.port or 443, user["token"], ca)

    def get(self, path: str) -> Object:
        return self._call("GET", path)

    def text(self, path: str) -> str:
        """What is served as plain text: a log."""
        return self._exchange("GET", path).decode(errors="replace")

    def find(self, path: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def create(self, path: str, body: Object) -> Object:
        return self._call("POST", path, body, "application/json")

    def replace(self, path: str, body: Object) -> Object:
        return self._call("PUT", path, body, "application/json")

    def patch(self, path: str, body: Object, kind: str = MERGE) -> Object:
        return self._call("PATCH", path, body, kind)

    def delete(self, path: str, body: Object | None = None) -> None:
        """Delete; an object that is already gone is no error."""
        try:
            self._call("DELETE", path, body, "application/json")
        except ApiError as error:
            if error.code != 404:
                raise

    def ready(self) -> bool:
        """Whether the server says that it is ready (/readyz)."""
        try:
            connection = self._connect(timeout=5)
            connection.request("GET", "/readyz", headers=self._headers())
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False

    def watch(self, path: str, version: str, selector: str = "", seconds: int = 300) -> Iterator[Object]:
        """Events after ``version``; ends when the server closes the stream. A too old version raises ApiError 410."""
        query = {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(seconds), "allowWatchBookmarks": "1"}
        if selector:
            query["labelSelector"] = selector
        connection = self._connect(timeout=seconds + 30)
        try:
            connection.request("GET", f"{path}?{urllib.parse.urlencode(query)}", headers=self._headers())
            response = connection.getresponse()
            if response.status != 200:
                raise ApiError(response.status, response.read().decode(errors="replace"))
            for line in response:
                event: Object = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(int(event["object"].get("code", 0)), str(event["object"].get("message")))
                yield event
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"the watch of {path} broke: {error}") from error
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: Object | None = None, content: str | None = None) -> Object:
        result: Object = json.loads(self._exchange(method, path, body, content))
        return result

    def _exchange(self, method: str, path: str, body: Object | None = None, content: str | None = None) -> bytes:
        connection = self._connect(timeout=30)
        headers = self._headers() | ({"Content-Type": content} if content and body is not None else {})
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"{self.host}:{self.port} is not reachable: {error}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise ApiError(response.status, _message(answer))
        return answer

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Accept": "application/json, */*"}

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=_context(self.ca))


_contexts: dict[str, ssl.SSLContext] = {}


def _context(ca: str) -> ssl.SSLContext:
    if ca not in _contexts:
        _contexts[ca] = ssl.create_default_context(cadata=ca)
    return _contexts[ca]


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace").strip()
