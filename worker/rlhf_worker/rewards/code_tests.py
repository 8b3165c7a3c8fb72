"""Programs that a model wrote, run against tests: `function: rlhf_worker.rewards.code_tests:score`.

Each run is a subprocess in an empty directory, without the pod's environment variables, as `nobody` where the pod is
root and python lies where `nobody` can read it. It has limits of CPU time, wall time, memory, size and number of files;
it starts no process and no thread. A filter of system calls (seccomp) leaves it no socket, and no hold on another
process of its user; Landlock no files but python's. Both need no privilege, and the profile RuntimeDefault allows them;
`isolated` says whether both held. The source of this file is what the subprocess runs first, to give these things up.
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
NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2  # of prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, alike on every architecture
READ, READ_FILE, WRITE_FILE = 0b1101, 0b100, 0b10  # Landlock: execute, read files, read directories; of a file alone
# For seccomp. A machine's column below, and its own number.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
REFUSED = {
    "socket": (41, 198), "io_uring_setup": (425, 425),  # which makes sockets too
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
# Refused but on the process itself, as their first argument says.
OWN = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of BPF
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # where a filter finds them
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # with EPERM
OTHER_CALLS = 0x40000000  # from here on x86_64 has the same calls by other numbers
PYTHON = sys.executable
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _for_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 1 for folder in path.resolve().parents)


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    seconds: int = 10  # of CPU; three times as much on the clock
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20  # of one file, and of what it prints
    files: int = 64  # that are open


@dataclass(frozen=True, slots=True)
class ProgramOutcome:
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


def passes(text: str, test: str | Mapping[str, str], limits: ProgramLimits = ProgramLimits()) -> tuple[bool, bool]:
    """Whether it does, and whether the run was isolated."""
    if isinstance(test, str):
        outcome = run(f"{text}\n\n{test}\n", "", limits)
        return outcome.status == 0, outcome.isolated
    outcome = run(text, test["input"], limits)
    return outcome.status == 0 and _lines(outcome.output) == _lines(test["output"]), outcome.isolated


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def run(text: str, given: str, limits: ProgramLimits) -> ProgramOutcome:
    """The program, with `given` at its standard input."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        folder = Path(directory)
        (folder / "program.py").write_text(text, errors="replace")
        if os.geteuid() == 0 and _for_all(Path(PYTHON)):
            os.chown(folder, NOBODY, NOBODY)
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
            stdin.write(given.encode(errors="replace"))
            stdin.seek(0)
            status, isolated = _waited(folder, limits, stdin, stdout)
            stdout.seek(0)
            output = stdout.read(limits.file_bytes).decode(errors="replace")
        return ProgramOutcome(status, output, isolated)


def _waited(folder: Path, limits: ProgramLimits, stdin: Any, stdout: Any) -> tuple[int | None, bool]:
    """Its status, and whether it was isolated: it tells by a pipe, which the program has not."""
    reader, writer = os.pipe()
    with open(reader, "rb") as words:  # noqa: PTH123
        try:
            status = _status(folder, limits, writer, stdin, stdout)
        finally:
            os.close(writer)
        return status, bool(words.read())


def _status(folder: Path, limits: ProgramLimits, tell: int, stdin: Any, stdout: Any) -> int | None:
    command = [PYTHON, "-I", "-c", Path(__file__).read_text(), json.dumps(asdict(limits)), str(tell)]
    streams: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": subprocess.DEVNULL, "pass_fds": [tell]}
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
    limits = ProgramLimits(**json.loads(sys.argv[1]))
    if os.geteuid() == 0 and Path.cwd().stat().st_uid == NOBODY:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    confined = [_confine(libc, str(Path.cwd())), _filter(libc), os.geteuid() != 0]  # root has no RLIMIT_NPROC
    tell = int(sys.argv[2])
    if all(confined):
        os.write(tell, b"1")
    os.close(tell)
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


def _filter(libc: Any) -> bool:
    """seccomp: from now on the calls of `MACHINES` fail, and all calls by other numbers than the machine's own."""
    if (known := MACHINES.get(os.uname().machine)) is None:
        return False
    column, machine = known
    refused, own = ([numbers[column] for numbers in calls.values()] for calls in (REFUSED, OWN))
    lines = rules(machine, refused, own, os.getpid())
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("@HP", len(lines), ctypes.addressof(text))
    return bool(libc.prctl(SET_SECCOMP, FILTER, ctypes.create_string_buffer(program), 0, 0) == 0)


def rules(machine: int, refused: Iterable[int], own: Iterable[int], pid: int) -> list[tuple[int, int, int, int]]:
    """Of a filter: code, lines to leave out where it holds and where it does not, operand. Pure."""
    refuse, allow = (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)
    lines = [(LOAD, 0, 0, MACHINE), (IF_EQUAL, 1, 0, machine), refuse]
    lines += [(LOAD, 0, 0, NUMBER), (IF_AT_LEAST, 0, 1, OTHER_CALLS), refuse]
    for number in refused:
        lines += [(IF_EQUAL, 0, 1, number), refuse]
    for number in own:
        itself = [(LOAD, 0, 0, FIRST_ARGUMENT), (IF_EQUAL, 2, 0, pid), (IF_EQUAL, 1, 0, 0), refuse, allow]
        lines += [(IF_EQUAL, 0, len(itself), number), *itself]
    return [*lines, allow]


if __name__ == "__main__":
    main()
