"""Notices of pods that are being deleted, over real sockets: who is believed, what comes of it, who can do no harm."""

import socket
from collections.abc import Iterator

import pytest

from rlhf_worker.errors import PortTaken
from rlhf_worker.pod import notices as module
from rlhf_worker.pod.notices import Notices, listening
from tests.worker.waiting import until


class Noted:
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def trainer(self, pod: str) -> None:
        self.heard.append(("trainer", pod))

    def rollout(self, pod: str) -> None:
        self.heard.append(("rollout", pod))


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def notices(noted: Noted) -> Notices:
    made = Notices(noted, "secret", port=0)
    made.listen()
    until(lambda: _answers(made.port))
    return made


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for client in made:
        client.close()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return False
    return True


def tell(clients: list[socket.socket], port: int, data: bytes, host: str = "127.0.0.1") -> socket.socket:
    client = socket.create_connection((host, port), 5)
    client.sendall(data)
    clients.append(client)
    return client


def is_closed(client: socket.socket, seconds: float = 5.0) -> bool:
    client.settimeout(seconds)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_a_trainers_pod_is_kept_waiting_and_a_rollout_pod_is_not(
    noted: Noted, notices: Notices, clients: list[socket.socket]
) -> None:
    trainers = [
        tell(clients, notices.port, b"secret trainer a\n"),
        tell(clients, notices.port, b"secret trainer b\n"),
        tell(clients, notices.port, b"secret trainer a\n"),
    ]
    assert is_closed(tell(clients, notices.port, b"secret rollout c\n"))
    until(lambda: len(noted.heard) == 4)
    assert sorted(set(noted.heard)) == [("rollout", "c"), ("trainer", "a"), ("trainer", "b")]
    assert not any(is_closed(client, 0.05) for client in trainers)


def test_ipv6_is_heard_too(noted: Noted, notices: Notices, clients: list[socket.socket]) -> None:
    tell(clients, notices.port, b"secret trainer a\n", host="::1")
    until(lambda: noted.heard == [("trainer", "a")])


@pytest.mark.parametrize("line", [
    b"\n", b"secret\n", b"wrong trainer a\n", b"secret trainer a b\n", b"trainer a secret\n", b"secret janitor a\n",
    "s\xe9cret trainer a\n".encode("latin-1"), b"\x16\x03\x01\x02\x00\x01\x00\n",
    b"secret trainer " + b"a" * 5000 + b"\n", b"a" * 100_000,
])  # fmt: skip
def test_nobody_else_is_believed(noted: Noted, notices: Notices, clients: list[socket.socket], line: bytes) -> None:
    assert is_closed(tell(clients, notices.port, line))
    assert noted.heard == []


def test_slow_clients_are_sent_away_and_keep_no_pod_from_telling(
    noted: Noted, notices: Notices, clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_UNKNOWN", 2)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.2)
    slow = [tell(clients, notices.port, b"secr") for _ in range(5)]
    assert all(is_closed(client) for client in slow)
    tell(clients, notices.port, b"secret trainer a\n")
    until(lambda: noted.heard == [("trainer", "a")])


def test_nobody_is_heard_before_there_is_something_to_save(noted: Noted) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", Notices(noted, "secret", port=0).port), 5)


def test_a_port_that_is_taken_is_named(noted: Noted, notices: Notices) -> None:
    with pytest.raises(
        PortTaken,
        match=rf"port {notices.port}, where pods that are being deleted tell the driver.*in use.*free it in pods\.head",
    ):
        Notices(noted, "secret", port=notices.port)


def test_without_a_token_nobody_is_heard(
    noted: Noted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert listening(noted) is None
    assert "RAY_AUTH_TOKEN is not set" in capsys.readouterr().err
