"""`kubectl rlhf dashboard`: the fleet and each run as a page of this machine that renews itself. A page, because a
terminal already has `watch`, and curves of several runs side by side need one. It reads by the user's own rights, and
changes nothing.

Only this machine reaches it, and only by its own name: a page of the internet whose name was turned to 127.0.0.1 sends
another Host, and is refused.
"""

import asyncio
import json
import re
import threading
import time
import webbrowser
from collections.abc import Coroutine
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from rlhf_cli.cluster_verbs import COLUMNS, TAIL, cells, say
from rlhf_cli.exits import Exit, Wrong, end
from rlhf_cli.history import Step, steps
from rlhf_cli.report import UPLOT_VERSION, asset
from rlhf_cli.text import utc
from rlhf_client.errors import ClientError, NotAllowed, NotFound

if TYPE_CHECKING:
    from rlhf_client.client import Client
    from rlhf_client.job import Job

T = TypeVar("T")
Raw = dict[str, Any]
HOST = "127.0.0.1"
FRESH_SECONDS = 2.0  # in which several tabs get the same answer
ANSWER_SECONDS = 45.0
WIDTH = 120  # characters of a run's page
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}  # fmt: skip


class Cluster:
    """The client, in a loop of its own, for threads that each answer one request."""

    def __init__(self, client: "Client", everywhere: bool) -> None:
        self._client, self._everywhere = client, everywhere
        self._loop, self._lock = asyncio.new_event_loop(), threading.Lock()
        self._asked, self._known = 0.0, list["Job"]()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def jobs(self) -> list["Job"]:
        """Raises ClientError."""
        with self._lock:
            if time.monotonic() - self._asked > FRESH_SECONDS:
                self._known = self._now(self._client.jobs(everywhere=self._everywhere))
                self._asked = time.monotonic()
            return self._known

    def history(self, job: "Job") -> list[Step]:
        """Of the driver's log; nothing where it is gone, or may not be read. Raises ClientError."""
        if job.namespace != self._client.namespace:
            return []
        return self._now(self._steps(job.name))

    async def _steps(self, name: str) -> list[Step]:
        try:
            return steps([line async for line in self._client.logs(name, tail=TAIL)])
        except (NotFound, NotAllowed):
            return []

    def _now(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_SECONDS)


def fleet(jobs: list["Job"]) -> Raw:
    rows = [[job.namespace, *cells(job)] for job in jobs]
    return {"columns": ["NAMESPACE", *COLUMNS], "rows": rows}


def one_run(job: "Job", history: list[Step]) -> Raw:
    """The page of `status` without its markup, and what its curves are drawn from."""
    from rich.text import Text

    from rlhf_cli.status_page import page

    lines = [Text.from_markup(line).plain for line in page(job, [], utc(), WIDTH)]
    return {"title": f"{job.namespace}/{job.name}", "text": "\n".join(lines), "steps": [asdict(one) for one in history]}


def html() -> str:
    parts = {"%UPLOT_CSS%": asset("uPlot.min.css"), "%CSS%": asset("page.css"), "%UPLOT_VERSION%": UPLOT_VERSION,
        "%UPLOT_JS%": asset("uPlot.iife.min.js"), "%JS%": asset("dashboard.js")}
    return re.sub("|".join(parts), lambda found: parts[found[0]], asset("dashboard.html"))


class Handler(BaseHTTPRequestHandler):
    """GET of / and /data, and no other."""

    server: "Server"

    def do_GET(self) -> None:  # by http.server
        if self.headers.get("Host") not in self.server.names:
            self._answer(403, "text/plain", f"this page is at http://{HOST}:{self.server.server_port}/ alone")
        elif (asked := urlsplit(self.path)).path == "/":
            self._answer(200, "text/html", self.server.page)
        elif asked.path == "/data":
            self._data(parse_qs(asked.query))
        else:
            self._answer(404, "text/plain", "there are / and /data")

    def _data(self, query: dict[str, list[str]]) -> None:
        try:
            jobs = self.server.cluster.jobs()
            wanted = query.get("run", [""])[0]
            job = next((one for one in jobs if f"{one.namespace}/{one.name}" == wanted), None)
            run = one_run(job, self.server.cluster.history(job)) if job else None
            found: Raw = {"fleet": fleet(jobs), "run": run}
        except (ClientError, TimeoutError) as error:  # the page shows it, and asks again
            found = {"error": str(error) or "the API server did not answer in time"}
        self._answer(200, "application/json", json.dumps(found))

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        own = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in (HEADERS | own).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *given: Any) -> None:  # noqa: A002  # by http.server
        """Nothing: the terminal is the user's."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, cluster: Cluster) -> None:
        """Raises Wrong for a port that is taken."""
        self.cluster, self.page = cluster, html()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise Wrong(f"--port {port}: {error.strerror}: give another, or none for any that is free") from None
        self.names = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


def serve(client: "Client", everywhere: bool, port: int, browse: bool) -> None:
    """Until it is interrupted. Raises Wrong, ClientError where the cluster cannot be read to begin with."""
    cluster = Cluster(client, everywhere)
    cluster.jobs()
    with Server(port, cluster) as server:
        url = f"http://{HOST}:{server.server_port}/"
        print(url, flush=True)
        if browse and not webbrowser.open(url):
            say("there is no browser here: open that address in one of this machine, or forward its port by ssh -L")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            end(Exit.OK, "")
