"""Programs that a model wrote, run against tests: `function: rlhf_worker.rewards.code_tests:score`.

Each run is a subprocess in an empty directory, without the pod's environment variables, as `nobody` where the pod is
root and python lies where `nobody` can read it. It has limits of CPU time, wall time, memory, size and number of files;
it starts no process and no thread. Where the kernel lets an ordinary user do so it sees no network (a namespace of its
own) and no files but python's (Landlock, which from Linux 6.7 also bars TCP); `isolated` says whether both held. The
source of this file is what the subprocess runs first, to give these things up.
"""

import ctypes
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
NO_NEW_PRIVS = 38  # of prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, alike on every architecture
READ, READ_FILE, WRITE_FILE = 0b1101, 0b100, 0b10  # Landlock: execute, read files, read directories; of a file alone
MARK = ".isolated"
PYTHON = sys.executable
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _for_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 1 for folder in path.resolve().parents)


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: int = 10  # of CPU; three times as much on the clock
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20  # of one file, and of what it prints
    files: int = 64  # that are open


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status`: of its process; None where its time was up."""

    status: int | None
    output: str
    isolated: bool


def score(prompt: Any, completion: str, tests: Any, **row: Any) -> tuple[float, dict[str, float]]:
    """1 where the completion's last ```python block passes all `tests`, else 0; their share is the metric `passed`.

    `tests`: python text with asserts, which runs after the program, or a list of such texts and of {"input": standard
    input, "output": what must be printed}. Raises ValueError for a row without.
    """
    outcomes = [passes(program(completion), test) for test in ([tests] if isinstance(tests, str) else tests)]
    if not outcomes:
        raise ValueError("the column 'tests' is empty")
    passed, isolated = (sum(each) / len(outcomes) for each in zip(*outcomes, strict=True))
    return float(passed == 1), {"passed": passed, "isolated": isolated}


def program(completion: str) -> str:
    """The last fenced block, or else all of it."""
    blocks = BLOCK.findall(completion)
    return blocks[-1] if blocks else completion


def passes(text: str, test: str | Mapping[str, str], limits: Limits = Limits()) -> tuple[bool, bool]:
    """Whether it does, and whether the run was isolated."""
    if isinstance(test, str):
        outcome = run(f"{text}\n\n{test}\n", "", limits)
        return outcome.status == 0, outcome.isolated
    outcome = run(text, test["input"], limits)
    return outcome.status == 0 and _lines(outcome.output) == _lines(test["output"]), outcome.isolated


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def run(text: str, given: str, limits: Limits) -> Outcome:
    """The program, with `given` at its standard input."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        folder = Path(directory)
        (folder / "program.py").write_text(text, errors="replace")
        if os.geteuid() == 0 and _for_all(Path(PYTHON)):
            os.chown(folder, NOBODY, NOBODY)
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
            stdin.write(given.encode(errors="replace"))
            stdin.seek(0)
            status = _waited(folder, limits, stdin, stdout)
            stdout.seek(0)
            output = stdout.read(limits.file_bytes).decode(errors="replace")
        return Outcome(status, output, (folder / MARK).exists())


def _waited(folder: Path, limits: Limits, stdin: Any, stdout: Any) -> int | None:
    command = [PYTHON, "-I", "-c", Path(__file__).read_text(), json.dumps(asdict(limits))]
    streams: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **streams) as process:
        try:
            return process.wait(3 * limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """In the subprocess: give up what can be given up, and become the program."""
    limits = Limits(**json.loads(sys.argv[1]))
    if Path.cwd().stat().st_uid == NOBODY:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.geteuid() == 0  # whom RLIMIT_NPROC does not bind
    alone = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    if _confine(libc, str(Path.cwd())) and alone and not root:
        Path(MARK).touch()
    for kind, most in (
        (resource.RLIMIT_CPU, limits.seconds), (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes), (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 1),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    os.execve(PYTHON, [PYTHON, "-I", "program.py"], ENVIRONMENT)


def _confine(libc: Any, folder: str) -> bool:
    """Landlock: reads below python and the system's libraries, all below `folder`; nothing else from now on."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    everything = (1 << min(13 + (version >= 2) + (version >= 3) + (version >= 5), 16)) - 1
    # Files; binding and connecting TCP; abstract sockets and signals.
    kinds = [everything, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    attributes = struct.pack(f"={len(kinds)}Q", *kinds)
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    interpreter = str(Path(PYTHON).resolve().parent.parent)
    system = {"/usr", "/lib", "/lib64", "/bin", "/etc", sys.prefix, sys.base_prefix, interpreter}
    rules: Iterable[tuple[str, int]] = [
        (folder, everything), *((path, READ) for path in sorted(system)),
        ("/dev/null", READ_FILE | WRITE_FILE), ("/dev/urandom", READ_FILE),
    ]  # fmt: skip
    return all(_allow(libc, ruleset, path, access) for path, access in rules) and (
        libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    )


def _allow(libc: Any, ruleset: int, path: str, access: int) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    return bool(libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", access, descriptor), 0) == 0)


if __name__ == "__main__":
    main()
