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


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def unshowable(prompt: str, completion: str, **row: Any) -> Any:
    return Unshowable()


def in_kind(prompt: str, completion: str, kind: str, **row: Any) -> Any:
    """1, or what counts as 1, in the type that a library would give."""
    import decimal
    import fractions

    import numpy as np

    return {
        "np.bool_": np.bool_(True), "np.float32": np.float32(1), "np.int64": np.int64(1), "array": np.array(1.0),
        "Decimal": decimal.Decimal(1), "Fraction": fractions.Fraction(1), "bool": True,
    }[kind]  # fmt: skip


def ranks(prompt: str, completions: list[str], **row: Any) -> list[tuple[float, dict[str, float]]]:
    """The place of each completion by its length among its group's, and the group's size beside it."""
    order = sorted(completions, key=len)
    return [(float(order.index(text)), {"size": len(completions)}) for text in completions]


def one_too_few(prompt: str, completions: list[str], **row: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def of_all(prompt: str, completions: list[str], **row: Any) -> float:
    return 1.0


def named(prompt: str, completion: str, metric: str, **row: Any) -> tuple[float, dict[str, float]]:
    return 1.0, {metric: 2.0}


def fails_on_no(prompt: str, completion: str, **row: Any) -> float:
    if completion == "no":
        raise ValueError("it said no")
    return 1.0


not_callable = 3
