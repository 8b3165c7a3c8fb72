"""An API server over real HTTP in a thread, for the CLI, which has an event loop of its own."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rlhf_cli.app import app
from rlhf_operator.kinds import JOBS, PODS
from tests.api.specs import a_job
from tests.control.api_server import ApiServer

Raw = dict[str, Any]
Cli = Callable[..., Result]


class Cluster:
    """`put` and the like may be called from the test's thread: the server only reads between them."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.server = server
        self.kubeconfig = server.kubeconfig(folder, "user")

    def job(self, name: str = "maths", status: Raw | None = None, **changes: Any) -> Raw:
        raw = a_job(name, **changes)
        raw["metadata"] |= {"uid": f"uid-{name}", "creationTimestamp": "2026-11-29T10:00:00Z", "generation": 1}
        return self.server.put(JOBS, raw | ({"status": status} if status else {}))

    def until_watched(self) -> None:
        end = time.monotonic() + 60
        while not self.server.watches["rlhfjobs"] and time.monotonic() < end:
            time.sleep(0.01)

    def head(self, job: str, log: str) -> None:
        labels = {"rlhf.dev/job": job, "rlhf.dev/role": "head"}
        self.server.put(PODS, {"metadata": {"name": f"{job}-head", "labels": labels}})
        self.server.logs[(f"{job}-head", "driver")] = log


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    server, loop, ready, over = ApiServer(), asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with server.running():
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield Cluster(server, tmp_path)
    loop.call_soon_threadsafe(over.set)
    thread.join(30)
    loop.close()


@pytest.fixture
def cli(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`kubectl rlhf` against that server, piped."""
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig)
    return lambda *words, **given: CliRunner().invoke(app, list(words), **given)


RUNNING: Raw = {
    "phase": "Running", "reason": "StepAdvancing", "message": "", "gpus": 1, "mode": "Colocated",
    "observedGeneration": 1,
    "restarts": {"total": 1, "app": 1},
    "failures": [{
        "class": "App", "reason": "Error", "message": "the driver ended with exit code 1", "exitCode": 1, "step": 2,
        "words": "ValueError: no answer [/data/a.jsonl]\nTraceback (most recent call last):\n  File x, line 3",
        "attempt": 1, "pod": "maths-1-head", "time": "2026-11-29T10:05:00Z",
    }],
    "conditions": [
        {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime":
            "2026-11-29T10:00:00Z"},
        {"type": "CheckpointAvailable", "status": "False", "reason": "Ephemeral", "message": "they die with the pod",
            "lastTransitionTime": "2026-11-29T10:00:00Z"},
    ],
    "progress": {
        "state": "Training", "step": 3, "totalSteps": 10, "display": "3/10", "reward": "0.446",
        "tokensPerSecond": "1973", "etaSeconds": 23, "eta": "23s", "detail": "generating",
    },
}  # fmt: skip
