"""Reward functions that tests name as tests.worker.reward_functions:<name>; they run in reward subprocesses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def length(prompt: str, completion: str, **row: Any) -> float:
    return float(len(completion))


def of_row(prompt: Any, completion: str, **row: Any) -> float:
    return float(row["bonus"]) + len(prompt)


def pid(prompt: str, completion: str, **row: Any) -> int:
    return os.getpid()


def has_torch(prompt: str, completion: str, **row: Any) -> bool:
    return "torch" in sys.modules


def raises(prompt: str, completion: str, **row: Any) -> float:
    raise RuntimeError(f"no verdict on {completion}")


def exits(prompt: str, completion: str, **row: Any) -> float:
    sys.exit(3)


def hangs(prompt: str, completion: str, **row: Any) -> float:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    while True:
        time.sleep(60)


def killed(prompt: str, completion: str, **row: Any) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def ends(prompt: str, completion: str, **row: Any) -> float:
    os._exit(7)


def leaves_a_grandchild(prompt: str, completion: str, **row: Any) -> float:
    with Path(row["pids"]).open("a") as pids:
        pids.write(f"{subprocess.Popen(['sleep', '600']).pid}\n")
    return hangs(prompt, completion)


def writes_its_pid_and_hangs(prompt: str, completion: str, **row: Any) -> float:
    with Path(row["file"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return hangs(prompt, completion)


def prints(prompt: str, completion: str, **row: Any) -> float:
    sys.stdout.write("garbage for the protocol\n" * 1000)
    sys.stdout.flush()
    os.write(1, b"\x00\x00\x00\x05hello")
    return 2.0


def second_try(prompt: str, completion: str, **row: Any) -> float:
    """Fails in the way `how` the first time that a completion is judged, as told by a file."""
    seen = Path(row["seen"]) / f"judged{completion}"
    if seen.exists():
        return 1.5
    seen.touch()
    return {"raises": raises, "hangs": hangs, "killed": killed, "nan": nan}[row["how"]](prompt, completion)


def nan(prompt: str, completion: str, **row: Any) -> float:
    return float("nan")


def infinite(prompt: str, completion: str, **row: Any) -> float:
    return float("inf")


def beyond(prompt: str, completion: str, **row: Any) -> int:
    return 10**400


def text(prompt: str, completion: str, **row: Any) -> str:
    return "good"


def nothing(prompt: str, completion: str, **row: Any) -> None:
    return None


async def coroutine(prompt: str, completion: str, **row: Any) -> float:
    return 1.0


def complex_number(prompt: str, completion: str, **row: Any) -> complex:
    return 1j


not_callable = 3
