"""Busy, hung and stopped are told apart. No vLLM."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rlhf_worker.engines.pulse import Pulse, stopped
from rlhf_worker.watcher import below
from tests.worker.waiting import until


class Core:
    """Answers between its steps, or never."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.asked = 0

    async def ask(self) -> None:
        self.asked += 1
        await self.free.wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("rlhf_worker.engines.pulse.time.monotonic", lambda: now[0])
    return now


async def settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_silence_is_counted_from_the_question_and_ends_with_the_answer(clock: list[float]) -> None:
    core = Core()
    pulse = Pulse(core.ask)
    assert pulse.silent_seconds() == 0.0
    await settled()
    clock[0] += 40.0
    assert (pulse.silent_seconds(), core.asked) == (40.0, 1)
    core.free.set()
    await settled()
    assert pulse.silent_seconds() == 0.0
    await settled()
    assert core.asked == 2


async def test_who_finishes_something_is_not_silent(clock: list[float]) -> None:
    pulse = Pulse(Core().ask)
    pulse.silent_seconds()
    clock[0] += 40.0
    pulse.beat()
    clock[0] += 5.0
    assert pulse.silent_seconds() == 5.0


async def test_a_question_that_a_sync_overtakes_counts_no_more(clock: list[float]) -> None:
    core = Core()
    pulse = Pulse(core.ask)
    pulse.silent_seconds()
    clock[0] += 400.0
    pulse.forget()
    assert pulse.silent_seconds() == 0.0
    await settled()
    assert core.asked == 1


async def test_an_error_is_an_answer(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    async def broken() -> None:
        raise RuntimeError("dead")

    pulse = Pulse(broken)
    pulse.silent_seconds()
    await settled()
    clock[0] += 400.0
    assert pulse.silent_seconds() == 0.0
    assert "RuntimeError: dead" in capsys.readouterr().err


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A process with one below it."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_process_that_a_signal_stopped_is_found_however_deep(family: subprocess.Popen[bytes]) -> None:
    until(lambda: len(list(below(os.getpid()))) >= 2 and bool(list(below(family.pid))))
    assert stopped(os.getpid()) == []
    (child,) = below(family.pid)
    os.kill(child, signal.SIGSTOP)
    until(lambda: stopped(os.getpid()) == [child])
    os.kill(child, signal.SIGCONT)
    until(lambda: stopped(os.getpid()) == [])
