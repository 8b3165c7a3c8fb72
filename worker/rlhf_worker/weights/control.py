"""The short way from trainer rank 0 to every other rank of a sync: an order out, an answer back, on a connection that
stays open.

A call through Ray, the engine's actor and vLLM's queues takes 3 to 5 ms, as long as the weights of a small model
(docs/benchmarks.md). It opens the connection; what is asked at every sync travels here. A connection that ends tells at
once that the other end is gone. """

import hmac
import pickle
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from rlhf_worker.addresses import bracketed, listen
from rlhf_worker.errors import DeadlineExceeded, LinkBroken

LOOK_SECONDS = 0.2  # between looks at whether somebody failed on the way to the meeting


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the hub listens, and what it wants to hear first: messages are pickled, so strangers must not speak."""

    host: str
    port: int
    token: bytes = field(repr=False)


class Hub:
    """Rank 0's end."""

    def __init__(self, host: str) -> None:
        self._server = listen(host, backlog=4096)
        self.meeting = Meeting(host, self._server.getsockname()[1], secrets.token_bytes(32))
        self._members: dict[int, Connection] = {}
        self._pending: dict[Connection, int] = {}
        self._failure: BaseException | None = None

    def accept(self, count: int, deadline_seconds: float, failed: Callable[[], bool]) -> None:
        """Until so many members are here, or `failed` says that one will not come. Raises DeadlineExceeded."""
        end = time.monotonic() + deadline_seconds
        self._server.settimeout(LOOK_SECONDS)
        while len(self._members) < count and not failed():
            if time.monotonic() > end:
                raise DeadlineExceeded(f"weight sync: {len(self._members)} of {count} ranks joined within "
                    f"{deadline_seconds:g} s")
            try:
                accepted, _ = self._server.accept()
            except TimeoutError:
                continue
            self._admit(_connection(accepted))

    def _admit(self, connection: Connection) -> None:
        try:
            token, number = (
                connection.recv_bytes(64) for _ in range(2)
            ) if connection.poll(LOOK_SECONDS) else (b"", b"")
        except (EOFError, OSError):
            token, number = b"", b""
        if hmac.compare_digest(token, self.meeting.token):
            self._members[int(number)] = connection
        else:
            connection.close()

    def order(self, message: Any, numbers: range) -> None:
        """To these members, each of which answers. A member that cannot be reached counts as failed."""
        self._failure, self._pending = None, {}
        packed = pickle.dumps(message)
        for number in numbers:
            connection = self._members[number]
            self._pending[connection] = number
            try:
                connection.send_bytes(packed)
            except OSError as error:
                self._failure = _gone(number, error)

    def failed(self) -> bool:
        return self._look(0.0)

    def _look(self, timeout: float) -> bool:
        """Take in the answers that have come."""
        for connection in wait(list(self._pending), timeout):
            assert isinstance(connection, Connection)
            number = self._pending.pop(connection)
            try:
                answer = connection.recv()
            except (EOFError, OSError) as error:
                answer = _gone(number, error)
            self._failure = self._failure or answer
        return self._failure is not None

    def finish(self, deadline_seconds: float) -> None:
        """Until every member has answered. Raises what the first that failed raised, LinkBroken when one is gone, or
        DeadlineExceeded.
        """
        end = time.monotonic() + deadline_seconds
        while self._pending and not self._look(max(0.0, end - time.monotonic())):
            if time.monotonic() >= end and self._pending:
                raise DeadlineExceeded(f"weight sync: ranks {sorted(self._pending.values())} did not answer within "
                    f"{deadline_seconds:g} s")
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Which every member notices: a sync that is under way ends there too."""
        self._server.close()
        for connection in self._members.values():
            connection.close()
        self._members, self._pending = {}, {}


class Member:
    """Every other rank's end."""

    def __init__(self, meeting: Meeting, number: int, deadline_seconds: float) -> None:
        """Raises DeadlineExceeded."""
        try:
            self._socket = socket.create_connection((meeting.host, meeting.port), deadline_seconds)
        except OSError as error:
            where = f"{bracketed(meeting.host)}:{meeting.port}"
            words = f"weight sync: rank {number} cannot reach the trainer at {where}: {error}"
            raise DeadlineExceeded(words) from error
        self._socket.settimeout(None)
        self._connection = _connection(self._socket.dup())
        self._connection.send_bytes(meeting.token)
        self._connection.send_bytes(str(number).encode())

    def next(self) -> Any:
        """The next order; None when the trainer has hung up."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return None

    def answer(self, failure: BaseException | None) -> None:
        """None: done."""
        with suppress(OSError):  # when nobody listens any more, the next order will not come either
            self._connection.send_bytes(portable(failure))

    def hung_up(self) -> bool:
        """During an order: whether the trainer has given it up."""
        return self._connection.poll()

    def close(self) -> None:
        """From any thread; ends a wait for the next order."""
        with suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _connection(sock: socket.socket) -> Connection:
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(sock.detach())


def _gone(number: int, error: BaseException) -> LinkBroken:
    return LinkBroken(f"weight sync: rank {number} of the group is gone ({type(error).__name__})")


def portable(failure: BaseException | None) -> bytes:
    """Pickled; an exception that does not survive that, as its words."""
    try:
        packed = pickle.dumps(failure)
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(failure).__name__}: {failure}"))
