"""What the driver prints, kept by the feed: in order, whole, and never in the driver's way.

On a real Ray, for its calls are what may hang.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_worker.pod import kept_log as module
from rlhf_worker.pod.kept_log import kept_log
from tests.worker.waiting import kill, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    directory = Path("/tmp") / f"rk-{os.getpid()}"  # Ray's sockets need a short path
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _temp_dir=str(directory),
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(module, "LAST_SECONDS", 10.0)


class Keeper:
    def __init__(self) -> None:
        self.kept: list[tuple[int, str]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def hold(self) -> None:
        self.go.clear()

    async def release(self) -> None:
        self.go.set()

    async def keep_log(self, attempt: int, text: str) -> None:
        await self.go.wait()
        self.kept.append((attempt, text))

    async def all(self) -> str:
        return "".join(text for attempt, text in self.kept if attempt == 3)


KeeperActor: Any = ray.remote(num_cpus=0)(Keeper)


def test_everything_printed_is_kept_also_before_the_feed_is_there_and_after_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keeper = KeeperActor.remote()
    with kept_log() as log:
        print("before")
        log.send_to(keeper, 3)
        until(lambda: ray.get(keeper.all.remote()) == "before\n")
        print("between", file=sys.stderr)
        print("last words")
    assert ray.get(keeper.all.remote()) == "before\nbetween\nlast words\n"
    assert capsys.readouterr().out.startswith("before\nlast words")


def test_a_feed_that_hangs_costs_lines_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 10)
    keeper = KeeperActor.remote()
    with kept_log() as log:
        log.send_to(keeper, 3)
        ray.get(keeper.hold.remote())
        print("1", end="")
        until(lambda: log._waiting == 0)
        for number in range(2, 100):
            print(number, end="")
        ray.get(keeper.release.remote())
    assert ray.get(keeper.all.remote()) == "12345678910\n(178 characters were dropped here)\n"


def test_a_feed_that_dies_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    keeper = KeeperActor.remote()
    with kept_log() as log:
        log.send_to(keeper, 3)
        kill(keeper)
        print("still here")
        until(lambda: "is kept no further" in capsys.readouterr().err)
        print("and here")


def test_a_run_that_ends_before_its_feed_starts_loses_no_time() -> None:
    with kept_log():
        print("nobody keeps this")
