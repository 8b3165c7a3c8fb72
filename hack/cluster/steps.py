"""Named steps with their times, and errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


class ClusterError(Exception):
    """A step failed: ``cause`` is what happened, ``remedy`` is what the reader can do about it."""

    def __init__(self, cause: str, remedy: str, exit_code: int = 1) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.exit_code = exit_code


class Unsupported(ClusterError):
    """This machine cannot run the embedded cluster at all (exit code 3, so that callers can fall back)."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy, exit_code=3)


def say(text: str) -> None:
    print(f"[cluster] {text}", flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the step's name, and how long it took. A failure inside is reported with this name."""
    start = time.monotonic()
    say(f"{name} ...")
    try:
        yield
    except ClusterError as error:
        say(f"{name}: FAILED after {time.monotonic() - start:.1f} s")
        error.add_note(f"step: {name}")
        raise
    say(f"{name}: {time.monotonic() - start:.1f} s")


def wait_for(what: str, check: Callable[[], bool], seconds: float, remedy: str) -> None:
    """Poll ``check`` until it holds; raise ClusterError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} did not happen within {seconds:.0f} s", remedy)
        time.sleep(0.2)


def output(
    command: Sequence[str | Path], remedy: str, env: Mapping[str, str] | None = None, cwd: Path | None = None,
) -> str:
    """Run a command and return its stdout; a failure carries the end of its stderr."""
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=env, cwd=cwd, check=False
        )
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]} is not on this machine", remedy) from error
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(map(str, command))}` exited {done.returncode}: "
            f"{_tail(done.stderr or done.stdout)}", remedy)
    return done.stdout


def stream(command: Sequence[str | Path], remedy: str, env: Mapping[str, str], cwd: Path, every: float = 15.0) -> None:
    """Run a long command; print the number and the last of its lines every ``every`` seconds."""
    start = reported = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=cwd
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if time.monotonic() - reported > every:
                reported = time.monotonic()
                say(f"    {reported - start:.0f} s, {len(lines)} packages, now {lines[-1]}")
    if process.returncode != 0:
        raise ClusterError(f"`{' '.join(map(str, command[:3]))} ...` exited {process.returncode}: "
            f"{_tail(chr(10).join(lines))}", remedy)


def _tail(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-8:])[-1500:]


def fail(error: ClusterError) -> int:
    """Print step, cause and remedy on stderr; return the exit code."""
    for note in getattr(error, "__notes__", []):
        print(f"[cluster] {note}", file=sys.stderr)
    print(f"[cluster] cause: {error.cause}\n[cluster] remedy: {error.remedy}", file=sys.stderr, flush=True)
    return error.exit_code
