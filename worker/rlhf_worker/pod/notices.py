"""Pods that are being deleted tell the driver, and a trainer's stays until the driver has saved.

A worker pod's preStop connects to DRIVER_PORT, sends one line, `<token> <role> <pod>`, and waits until the connection
closes. A trainer's closes with this process, which saves and ends; the kubelet starts the driver again, and it resumes
where there are GPUs.
"""

import asyncio
import hmac
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Protocol

from rlhf_api.progress import DRIVER_PORT
from rlhf_worker.errors import PortTaken

LINE_BYTES = 1024
LINE_SECONDS = 5.0  # for a pod to say who it is
MOST_UNKNOWN = 64  # connections at a time that have not said it yet
TOKEN = "RAY_AUTH_TOKEN"  # of the environment
BACKLOG = 128


class Listener(Protocol):
    """What is made of a notice; called in the notices' thread."""

    def trainer(self, pod: str) -> None: ...
    def rollout(self, pod: str) -> None: ...


class Notices:
    """The port is bound at once, so that one that is taken is known. Before `listen`, who connects is refused."""

    def __init__(self, heard: Listener, token: str, port: int = DRIVER_PORT) -> None:
        """Raises PortTaken."""
        self._heard, self._token = heard, token.encode()
        self._unknown = 0
        self._socket = _bound(port)
        self.port: int = self._socket.getsockname()[1]

    def listen(self) -> None:
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="notices", daemon=True).start()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._greet, sock=self._socket, limit=LINE_BYTES, backlog=BACKLOG)
        await server.serve_forever()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # of a client that is gone
            if (notice := await self._notice(reader)) and self._take(*notice):
                await reader.read()  # until its pod gives up, or this process ends
        writer.close()

    async def _notice(self, reader: asyncio.StreamReader) -> tuple[str, str] | None:
        """Role and pod of one that knows the token, and says it in time."""
        if self._unknown >= MOST_UNKNOWN:
            return None
        self._unknown += 1
        try:
            async with asyncio.timeout(LINE_SECONDS):
                words = (await reader.readline()).split()
        except (TimeoutError, ValueError):  # which a line beyond the limit raises
            return None
        finally:
            self._unknown -= 1
        if len(words) != 3 or not hmac.compare_digest(words[0], self._token):
            return None
        return words[1].decode(errors="replace"), words[2].decode(errors="replace")

    def _take(self, role: str, pod: str) -> bool:
        """Whether the pod must stay."""
        print(f"{role} pod {pod} is being deleted", file=sys.stderr, flush=True)
        if role == "trainer":
            self._heard.trainer(pod)
        elif role == "rollout":
            self._heard.rollout(pod)
        return role == "trainer"


def listening(heard: Listener) -> Notices | None:
    """None without the token of the job's Ray: whoever reaches the port could end the driver. Raises PortTaken."""
    if token := os.environ.get(TOKEN, ""):
        return Notices(heard, token)
    print(f"{TOKEN} is not set: pods that are being deleted cannot tell this driver", file=sys.stderr, flush=True)
    return None


def _bound(port: int) -> socket.socket:
    """On all interfaces, of IPv6 and IPv4 where this host has both."""
    errors = []
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            return _bind(family, address, port)
        except OSError as error:
            errors.append(f"{address}: {error}")
    what = f"port {port}, where pods that are being deleted tell the driver"
    raise PortTaken(f"{what}, cannot be bound ({'; '.join(errors)}): free it in pods.head")


def _bind(family: int, address: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound
