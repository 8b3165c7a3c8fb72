"""Many requests at once, which hack.cluster.kube's one at a time cannot make."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from hack.cluster.kube import Api, ApiError, Object
from hack.cluster.steps import ClusterError

JSON, APPLY, MERGE = "application/json", "application/apply-patch+yaml", "application/merge-patch+json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
LINE_BYTES = 4 << 20  # of a watch event
T = TypeVar("T")


@dataclass
class Client:
    """An identity at the API server. Requests raise ApiError."""

    session: aiohttp.ClientSession

    @classmethod
    def connect(cls, kubeconfig: Path) -> Client:
        api = Api.from_kubeconfig(kubeconfig)
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=api.ca), limit=0)
        headers = {"Authorization": f"Bearer {api.token}"}
        base = f"https://{api.host}:{api.port}"
        return cls(aiohttp.ClientSession(base, connector=connector, headers=headers, read_bufsize=LINE_BYTES))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    async def send(self, method: str, path: str, body: Object | None = None, content: str = JSON) -> Object:
        data = json.dumps(body) if body is not None else None
        async with self.session.request(method, path, data=data, headers={"Content-Type": content}) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise ApiError(answer.status, text)
            found: Object = json.loads(text)
            return found

    async def count(self, path: str) -> int:
        return len((await self.send("GET", path))["items"])

    async def version(self, path: str) -> str:
        """The resourceVersion of a list now."""
        return str((await self.send("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"])

    async def watch(self, path: str, version: str, accept: str = JSON) -> AsyncIterator[Object]:
        """Events after this version, for ever: a stream that ends is taken up where it ended."""
        while True:
            query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": "3600"}
            endless = aiohttp.ClientTimeout(total=None)
            async with self.session.get(path, params=query, headers={"Accept": accept}, timeout=endless) as answer:
                async for line in answer.content:
                    event: Object = json.loads(line)
                    if event["type"] == "ERROR":
                        raise ApiError(int(event["object"].get("code", 0)), str(event["object"].get("message")))
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield event


@contextmanager
def one_error() -> Iterator[None]:
    """Of a group of tasks that failed, the first task's own error."""
    try:
        yield
    except ExceptionGroup as group:
        error: Exception = group
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from group


async def each(things: Iterable[T], work: Callable[[T], Awaitable[Any]], at_once: int) -> None:
    """`work` on all of them, so many at a time. The first error is raised."""
    left = iter(things)

    async def worker() -> None:
        for thing in left:
            await work(thing)

    with one_error():
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())


@asynccontextmanager
async def meanwhile(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """These run until the block ends. An error of theirs ends the block, and is raised."""
    with one_error():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
            yield
            for task in tasks:
                task.cancel()


async def until(
    what: str, reached: Callable[[], Awaitable[bool]], seconds: float, told: Callable[[], str] = str
) -> float:
    """When it was reached, by time.monotonic(). Raises ClusterError with what is `told` then."""
    deadline = time.monotonic() + seconds
    while not await reached():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{what} did not come within {seconds:.0f} s: {told()}", "see the logs that are printed above"
            )
        await asyncio.sleep(0.1)
    return time.monotonic()
