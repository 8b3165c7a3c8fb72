"""A driver as in a pod, told by a trainer's pod that it goes: it saves, ends, is started, resumes and finishes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.run import RunConfig
from tests.worker.configs import run_config
from tests.worker.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
STEPS = 100_000
START_SECONDS, END_SECONDS = 300.0, 300.0


class Server(ThreadingHTTPServer):
    """The API server with one job, whose driver's pod the operator has numbered."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.job: dict[str, Any] = {
            "metadata": {"name": "tiny", "uid": "u-1"}, "spec": {},
            "status": {"record": {"attempt": {"number": 2, "podUid": "pod-2"}}, "conditions": []},
        }  # fmt: skip
        self.told: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def progress(self) -> dict[str, Any]:
        return self.told[-1] if self.told else {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data = json.dumps(self.server.job).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.told.append(body["status"]["progress"])
        self.server.job["status"] = {**self.server.job["status"], "progress": self.server.told[-1]}
        self.do_GET()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Driver:
    """Ended with the test, whatever becomes of it."""

    def __init__(self, directory: Path, tiny: Path, server: Server, port: int, steps: int) -> None:
        (directory / "run.yaml").write_text(config(directory, tiny, steps).dump())
        (directory / "token").write_text("t")
        self.log = directory / "log"
        api = f"http://127.0.0.1:{server.server_address[1]}"
        command = [
            sys.executable,
            "-u",
            "-m",
            "tests.worker.in_pod",
            str(directory / "run.yaml"),
            api,
            str(directory),
            str(port),
        ]
        environment = {**os.environ, "RLHF_POD_UID": "pod-2", "RAY_AUTH_TOKEN": "secret"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def until(self, condition: Callable[[], bool]) -> None:
        until(lambda: condition() or self.process.poll() is not None, START_SECONDS)
        assert self.process.poll() is None, self.log.read_text()

    def ended(self) -> tuple[int, str]:
        return self.process.wait(END_SECONDS), self.log.read_text()


@pytest.fixture
def start(tmp_path: Path, tiny: Path, server: Server) -> Iterator[Callable[[int, int], Driver]]:
    made: list[Driver] = []

    def begin(port: int, steps: int) -> Driver:
        made.append(Driver(tmp_path, tiny, server, port, steps))
        return made[-1]

    yield begin
    for driver in made:
        driver.process.terminate()
        driver.process.wait(END_SECONDS)


def config(directory: Path, tiny: Path, steps: int) -> RunConfig:
    reward = {
        "name": "length",
        "type": "python",
        "code": "def reward(completion, **row):\n    return float(len(completion))",
        "function": "reward",
    }
    return run_config(
        steps=steps, model={"path": str(tiny), "dtype": "float32"}, rewards=[reward],
        data={"jsonl": {"path": str(tiny / "prompts.jsonl")}, "maxPromptTokens": 16},
        rollout={"engine": "hf", "promptsPerStep": 2, "samplesPerPrompt": 2, "maxTokens": 4},
        checkpoint={"path": str(directory / "out"), "everySteps": STEPS, "export": False},
        telemetry={"tensorboard": False, "rolloutsEverySteps": 0},
    )  # fmt: skip


def notice(port: int, line: bytes) -> bytes:
    """As a pod's preStop: what comes until the connection closes, which is nothing."""
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.settimeout(END_SECONDS)
        client.sendall(line)
        try:
            return client.recv(1)
        except ConnectionResetError:
            return b""


def test_a_trainers_pod_that_goes_costs_no_finished_step(
    tmp_path: Path, server: Server, start: Callable[[int, int], Driver]
) -> None:
    port = free_port()
    first = start(port, STEPS)
    first.until(lambda: server.progress.get("step", 0) >= 3)
    assert notice(port, b"secret rollout b\n") == b""
    first.until(lambda: server.progress.get("degraded") == "pod b is being deleted")
    assert notice(port, b"secret trainer a\n") == b""
    code, output = first.ended()
    left = server.progress
    assert (code, left["checkpoint"]["step"]) == (143, left["step"]), output
    assert {one.get("attempt") for one in server.told} <= {None, 2} and {one["podUid"] for one in server.told} == {
        "pod-2"
    }

    server.told.clear()
    last = left["step"] + 3
    code, output = start(port, last).ended()
    assert (code, server.progress["state"], server.progress["step"]) == (0, "Done", last), output
    starting = [one for one in server.told if one["state"] == "Starting"]
    assert {one["step"] for one in starting} == {left["step"]}
    assert {json.dumps(one["checkpoint"]) for one in starting} == {json.dumps(left["checkpoint"])}
    assert server.progress["resumedFromStep"] == left["step"]
    assert server.progress["productiveSeconds"] >= left["productiveSeconds"]

    kept = "".join(part.read_text() for part in sorted((tmp_path / "out" / "logs" / "attempt-2").iterdir()))
    assert "trainer pod a is being deleted" in kept and kept.splitlines()[-1].startswith(f"saved step {last} to "), kept


def test_a_driver_that_a_signal_stopped_is_ended_and_says_so(
    server: Server, start: Callable[[int, int], Driver],
) -> None:
    server.job["status"]["record"] = {}  # so it waits for its number, and begins nothing
    driver = start(free_port(), STEPS)
    driver.until(lambda: bool(server.told))
    os.kill(driver.process.pid, signal.SIGSTOP)
    code, output = driver.ended()
    assert code == -signal.SIGKILL and "was stopped by a signal (state T): it is ended" in output
