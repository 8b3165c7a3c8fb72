"""A small API server over real HTTP: lists in pages, watches with bookmarks, applies, patches, deletes, leases. And
its bad days: away, an error or a 410 in the middle of a watch, watches that fall silent, answers of 429 and 500."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from rlhf_operator.kinds import CRDS, LEASES, NAMESPACED, Kind

Raw = dict[str, Any]
Place = tuple[str, str, str]
NAMESPACES = Kind("", "v1", "namespaces", "Namespace", ())
OF_PLURAL = {kind.plural: kind for kind in (*NAMESPACED, LEASES, CRDS)}
BOOKMARK_SECONDS = 0.2


@dataclass
class ApiServer:
    """`down`: every request gets a 503 and every watch is cut. `silent`: watches tell nothing and stay open.
    `answers`: what the next requests of a method get instead, as (status, headers). `who` counts writes by the token
    of the one who writes."""

    absent: set[str] = field(default_factory=set)
    objects: dict[Place, Raw] = field(default_factory=dict)
    history: list[tuple[int, str, Raw, str]] = field(default_factory=list)
    version: int = 1
    compacted: int = 0
    down: bool = False
    silent: bool = False
    answers: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    watches: Counter[str] = field(default_factory=Counter)
    url: str = ""
    logs: dict[tuple[str, str], str] = field(default_factory=dict)  # of a pod's container
    _cuts: list[asyncio.Queue[Raw]] = field(default_factory=list)

    # what tests do

    def put(self, kind: Kind, raw: Raw) -> Raw:
        """As it is now: added or changed."""
        meta = raw["metadata"]
        meta.setdefault("namespace", "default")
        meta.setdefault("uid", f"{kind.plural}-{meta['name']}-{self.version}")
        place = (kind.plural, meta["namespace"], meta["name"])
        event = "MODIFIED" if place in self.objects else "ADDED"
        raw.update(apiVersion=kind.api_version, kind=kind.kind)
        self._tell(event, place, raw)
        return raw

    def remove(self, kind: Kind, name: str, *, told: bool = True) -> None:
        """`told` False: so that no watch learns of it."""
        raw = self.objects.pop((kind.plural, "default", name))
        self.version += 1
        if told:
            raw["metadata"]["resourceVersion"] = str(self.version)
            self.history.append((self.version, kind.plural, _copy(raw), "DELETED"))

    def of(self, kind: Kind) -> list[Raw]:
        return [raw for (plural, _, _), raw in self.objects.items() if plural == kind.plural]

    def cut(self, error: Raw | None = None) -> None:
        """Every watch ends, with this ERROR event if there is one."""
        for cuts in self._cuts:
            cuts.put_nowait(error or {})

    def writes(self, token: str) -> int:
        return sum(who == token and method != "GET" and "/leases" not in path for method, path, who in self.requests)

    def kubeconfig(self, folder: Path, token: str) -> str:
        path = folder / f"{token}.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                    "users": [{"name": "u", "user": {"token": token}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                }
            )
        )
        return str(path)

    # HTTP

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator["ApiServer"]:
        app = web.Application(middlewares=[self._moods])
        app.add_routes(
            [
                web.get("/api", self._versions),
                web.get("/apis", self._groups),
                web.get("/api/v1", self._resources),
                web.get("/apis/{group}/{version}", self._resources),
                *(
                    web.route("*", root + tail, self._serve)
                    for root in ("/api/{version}", "/apis/{group}/{version}")
                    for tail in (
                        "/{plural}",
                        "/namespaces/{ns}/{plural}",
                        "/namespaces/{ns}/{plural}/{name}",
                        "/namespaces/{ns}/{plural}/{name}/{sub}",
                    )
                ),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.cut()
            await runner.cleanup()

    @web.middleware
    async def _moods(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests.append(
            (request.method, request.path, request.headers.get("Authorization", "").removeprefix("Bearer "))
        )
        if self.down:
            return _status(503, "ServiceUnavailable")
        if self.answers.get(request.method):
            status, headers = self.answers[request.method].pop(0)
            return _status(status, "Told", headers)
        return await handler(request)

    async def _versions(self, _: web.Request) -> web.Response:
        return web.json_response({"versions": ["v1"]})

    async def _groups(self, _: web.Request) -> web.Response:
        there = {(k.group, k.version) for k in OF_PLURAL.values() if k.group and k.plural not in self.absent}
        return web.json_response(
            {
                "groups": [
                    {"name": g, "preferredVersion": {"version": v}, "versions": [{"version": v}]}
                    for g, v in sorted(there)
                ]
            }
        )

    async def _resources(self, request: web.Request) -> web.Response:
        group, version = request.match_info.get("group", ""), request.match_info.get("version", "v1")
        kinds = [
            k
            for k in (*OF_PLURAL.values(), NAMESPACES)
            if (k.group, k.version) == (group, version) and k.plural not in self.absent
        ]
        return web.json_response(
            {
                "resources": [
                    {
                        "name": k.plural,
                        "kind": k.kind,
                        "singularName": k.kind.lower(),
                        "namespaced": k not in (CRDS, NAMESPACES),
                        "verbs": ["get", "list", "watch", "create", "patch", "delete"],
                    }
                    for k in kinds
                ]
            }
        )

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        plural, name = request.match_info["plural"], request.match_info.get("name")
        if plural in self.absent or plural not in OF_PLURAL:
            return web.Response(status=404, text="404 page not found")
        if request.match_info.get("sub") == "log":
            text = self.logs.get((request.match_info["name"], request.query["container"]))
            return web.Response(text=text) if text is not None else _status(404, "NotFound")
        if name is None and request.method == "GET":
            return await self._watch(request, plural) if "watch" in request.query else self._list(request, plural)
        body = json.loads(await request.read() or "{}")
        name = name or body["metadata"]["name"]
        return self._one(request, (plural, request.match_info["ns"], name), body)

    def _list(self, request: web.Request, plural: str) -> web.Response:
        found = [raw for place, raw in self.objects.items() if place[0] == plural and _selected(request, raw)]
        begin = int(request.query.get("continue") or 0)
        end = begin + int(request.query.get("limit") or len(found) or 1)
        more = str(end) if end < len(found) else ""
        return web.json_response(
            {"metadata": {"resourceVersion": str(self.version), "continue": more}, "items": found[begin:end]}
        )

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        self.watches[plural] += 1
        since, cuts = int(request.query.get("resourceVersion") or self.version), asyncio.Queue[Raw]()
        stream = web.StreamResponse()
        stream.enable_chunked_encoding()
        await stream.prepare(request)
        if since < self.compacted:
            await _line(stream, "ERROR", {"kind": "Status", "code": 410, "reason": "Expired"})
            return stream
        self._cuts.append(cuts)
        try:
            while True:
                while not self.silent and (
                    news := [h for h in self.history if h[0] > since and h[1] == plural and _selected(request, h[2])]
                ):
                    since = news[0][0]
                    await _line(stream, news[0][3], news[0][2])
                try:
                    async with asyncio.timeout(BOOKMARK_SECONDS / 4):
                        error = await cuts.get()
                except TimeoutError:
                    if request.transport is None or request.transport.is_closing():
                        return stream
                    continue
                if error:
                    await _line(stream, "ERROR", error)
                return stream
        finally:
            self._cuts.remove(cuts)

    def _one(self, request: web.Request, place: Place, body: Raw) -> web.Response:
        there, method = self.objects.get(place), request.method
        if method == "POST":
            if there is not None:
                return _status(409, "AlreadyExists")
            if "dryRun" in request.query:
                return self._answer(201, body)
            body["metadata"].update(
                namespace=place[1],
                uid=f"{place[0]}-{place[2]}-{self.version}",
                creationTimestamp="2026-01-01T00:00:00Z",
            )
            return self._answer(201, self._tell("ADDED", place, body))
        if there is None:
            return _status(404, "NotFound")
        if method == "GET":
            return self._answer(200, there)
        if method == "DELETE":
            self.objects.pop(place)
            self.version += 1
            self.history.append((self.version, place[0], _copy(there), "DELETED"))
            return web.json_response({"kind": "Status", "status": "Success"})
        version = body["metadata"].get("resourceVersion") if "metadata" in body else None
        if version not in (None, there["metadata"]["resourceVersion"]):
            return _status(409, "Conflict")
        new = _copy(there)
        if request.match_info.get("sub") == "status":
            new["status"] = {
                **body["status"],
                **{k: v for k, v in (there.get("status") or {}).items() if k == "progress"},
            }
        else:
            _merge(new, {k: v for k, v in body.items() if k not in ("apiVersion", "kind")})
        return self._answer(200, there if new == there else self._tell("MODIFIED", place, new))

    def _tell(self, event: str, place: Place, raw: Raw) -> Raw:
        self.version += 1
        raw["metadata"]["resourceVersion"] = str(self.version)
        self.objects[place] = raw
        self.history.append((self.version, place[0], _copy(raw), event))
        return raw

    def _answer(self, status: int, raw: Raw) -> web.Response:
        return web.json_response(raw, status=status)


def _copy(raw: Raw) -> Raw:
    """However deep it nests."""
    copied: Raw = json.loads(json.dumps(raw))
    return copied


async def _line(stream: web.StreamResponse, event: str, raw: Raw) -> None:
    await stream.write(json.dumps({"type": event, "object": raw}).encode() + b"\n")


def _status(code: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(
        {"kind": "Status", "code": code, "reason": reason, "message": reason}, status=code, headers=headers
    )


def _selected(request: web.Request, raw: Raw) -> bool:
    """Of label selectors only `key` and `key=value`, of field selectors only `type` and `metadata.name`."""
    label, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
    labels = raw["metadata"].get("labels") or {}
    selected = ("", *labels, *(f"{key}={value}" for key, value in labels.items()))
    return label in selected and fields in ("", f"type={raw.get('type')}", f"metadata.name={raw['metadata']['name']}")


def _merge(there: Raw, patch: Raw) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(there.get(key), dict):
            _merge(there[key], value)
        elif value is None:
            there.pop(key, None)
        else:
            there[key] = value
