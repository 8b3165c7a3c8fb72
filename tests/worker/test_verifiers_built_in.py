"""The verifiers that come with the worker: mathematical answers, and programs in a cage."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.rewards import code_tests
from rlhf_worker.rewards.code_tests import ProgramLimits, ProgramOutcome, passes, program, score
from rlhf_worker.rewards.scorer import Scorer
from tests.worker.samples import a_sample

LIMITS = ProgramLimits(seconds=20, memory_bytes=512 << 20, file_bytes=1 << 20)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that `nobody` can run, where these tests are root and their own python lies in root's home."""
    if os.geteuid() == 0 and not code_tests._for_all(Path(sys.executable)):
        monkeypatch.setattr(code_tests, "PYTHON", "/usr/bin/python3")


CALL = """import ctypes
def call(*arguments):
    if ctypes.CDLL(None, use_errno=True).syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), 'no')
UNSHARE, PTRACE = {"x86_64": (272, 101), "aarch64": (97, 117)}[__import__('os').uname().machine]
"""


def run(text: str, given: str = "", **limits: int) -> ProgramOutcome:
    from dataclasses import replace

    return code_tests.run(text, given, replace(LIMITS, **limits))


def refused(action: str) -> str:
    """A program that tells why python could not do this."""
    lines = "\n".join(f"    {line}" for line in action.splitlines())
    caught = "except (OSError, RuntimeError) as e:\n    print('refused', e)\n"
    return f"{CALL}import os, resource, socket, threading\ntry:\n{lines}\n    print('done')\n{caught}"


def test_the_last_block_counts() -> None:
    assert program("Try\n```python\nx = 1\n```\nno:\n``` py\nx = 2\n```\n") == "x = 2\n"
    assert program("x = 3") == "x = 3"


def test_asserts_and_printed_output() -> None:
    double = "Here:\n```python\ndef double(n):\n    return 2 * n\n\nprint(double(int(input())))\n```"
    assert score("", double, [{"input": "4", "output": "8\n"}, {"input": "4", "output": "9"}])[1]["passed"] == 0.5
    assert score("", "def double(n): return 2 * n", "assert double(3) == 6\nassert double(0) == 0")[0] == 1.0
    assert score("", "def double(n): return 3 * n", "assert double(3) == 6")[0] == 0.0
    assert score("", "no program at all", "assert True")[0] == 0.0
    with pytest.raises(ValueError, match="'tests' is empty"):
        score("", "x = 1", [])


def test_an_early_end_passes_no_test_of_output() -> None:
    assert passes("import sys; sys.exit(0)", {"input": "", "output": "1"}, LIMITS)[0] is False


def test_time_is_limited_on_the_processor_and_on_the_clock() -> None:
    assert run("while True: pass", seconds=1).status in (None, -9, -24)
    assert run("import time; time.sleep(600)", seconds=1).status is None


@pytest.mark.parametrize(
    "text",
    ["x = bytearray(2 << 30)", "open('big', 'wb').write(bytes(2 << 20))", "print('x' * (2 << 20), flush=True)"],
)
def test_memory_and_files_are_limited(text: str) -> None:
    outcome = run(text)
    assert outcome.status not in (0, None) and len(outcome.output) <= 1 << 20


@pytest.mark.parametrize(
    "action",
    ["os.fork()", "threading.Thread(target=print).start()", "[os.open('.', os.O_RDONLY) for _ in range(99)]"],
)
def test_no_process_no_thread_and_few_files(action: str) -> None:
    outcome = run(refused(action))
    assert outcome.output.startswith("refused") and "done" not in outcome.output


def test_it_sees_nothing_of_the_pods_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert "JUDGE_KEY" not in run("import os; print(sorted(os.environ))").output


@pytest.mark.parametrize(
    "action",
    [
        "open('/proc/%d/environ' % os.getppid()).read()", "open('/tmp/of_a_program', 'w')", "os.listdir('/tmp')",
    ],
)  # fmt: skip
def test_what_is_isolated_reaches_no_files(action: str) -> None:
    outcome = run(refused(action))
    assert outcome.output.startswith("refused") or not outcome.isolated, outcome


@pytest.mark.parametrize(
    "action",
    [
        "socket.create_connection(('127.0.0.1', 22), 5)",
        "socket.socket(type=socket.SOCK_DGRAM).connect(('8.8.8.8', 53))",
        "socket.socket(socket.AF_UNIX)", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
        "os.kill(os.getppid(), 0)", "os.kill(-1, 0)", "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
        "os.sched_setaffinity(os.getppid(), {0})", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
        "os.unshare(os.CLONE_NEWUSER) if hasattr(os, 'unshare') else call(UNSHARE, 0x10000000)",
        "call(425, 8, ctypes.create_string_buffer(120))", "call(PTRACE, 16, os.getppid(), 0, 0)",
    ],
)  # fmt: skip
def test_it_has_no_socket_and_no_hold_on_another_process(action: str) -> None:
    """Whatever the kernel is: the profile RuntimeDefault takes namespaces away, and these stay."""
    outcome = run(refused(action))
    assert outcome.output.startswith("refused [Errno 1] ") and "done" not in outcome.output, outcome


def test_it_has_a_hold_on_itself() -> None:
    outcome = run("import os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))\nos.kill(os.getpid(), 0)\n"
        "import asyncio\nprint(asyncio.run(asyncio.sleep(0, 7)), flush=True)\nos.kill(0, 15)")
    assert (outcome.status, outcome.output) == (-15, "7\n")


def test_isolation_is_told_as_it_is_and_not_by_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    landlock = ctypes.CDLL(None).syscall(code_tests.CREATE_RULESET, None, 0, 1) >= 1
    assert run("pass").isolated is (landlock and os.uname().machine in code_tests.MACHINES)
    source = Path(code_tests.__file__).read_text()
    monkeypatch.setattr(Path, "read_text", lambda path: source.replace("SET_SECCOMP, FILTER, c", "99, FILTER, c"))
    forged = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'1')\n    except OSError: pass"
    assert run(forged).isolated is False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_pod_that_is_nobody_itself_runs_programs_as_it_is() -> None:
    program = "import os\nprint(os.getuid())\ntry: os.fork()\nexcept OSError: print('no process')"
    asked = f"import code_tests as c; print(c.run({program!r}, '', c.ProgramLimits()))"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(code_tests.__file__, folder)
        for path in (Path(folder), Path(folder) / "code_tests.py"):
            path.chmod(0o755)
        command = [code_tests.PYTHON, "-c", asked]
        done = subprocess.run(command, user=65534, cwd=folder, capture_output=True, text=True, check=False)
    assert "output='65534\\nno process\\n'" in done.stdout, (done.stdout, done.stderr)


def test_a_filter_lets_every_other_call_through() -> None:
    column, machine = code_tests.MACHINES["aarch64"]
    refused, own = ([numbers[column] for numbers in calls.values()] for calls in (code_tests.REFUSED, code_tests.OWN))
    lines = code_tests.rules(machine, refused, own, 7)

    def verdict(number: int, first: int = 0, arch: int = machine) -> int:
        """As the kernel runs it."""
        data = {code_tests.NUMBER: number, code_tests.MACHINE: arch, code_tests.FIRST_ARGUMENT: first}
        at = held = 0
        while True:
            code, yes, no, operand = lines[at]
            if code == code_tests.RETURN:
                return operand
            if code == code_tests.LOAD:
                held, jump = data[operand], 0
            else:
                jump = yes if (held == operand if code == code_tests.IF_EQUAL else held >= operand) else no
            at += 1 + jump

    for number in range(500):
        expected = code_tests.REFUSE if number in (*refused, *own) else code_tests.ALLOW
        assert verdict(number, 8) == expected, number
        assert verdict(number, 8, machine + 1) == code_tests.REFUSE
    assert {verdict(number, first) for number in own for first in (0, 7)} == {code_tests.ALLOW}
    assert verdict(0x40000001) == code_tests.REFUSE


def test_python_itself_works_in_the_cage() -> None:
    imports = "import collections, decimal, json, re, subprocess, math"
    outcome = run(f"{imports}\nprint(json.dumps(math.sqrt(4)))\nopen('mine', 'w').write('x')")
    assert (outcome.status, outcome.output) == (0, "2.0\n")


# Mathematical answers: by math-verify, which is of the tests' environment and not of the image; what is ours alone, on
# a stand-in.


@pytest.mark.parametrize(
    ("completion", "answer", "expected", "answered"),
    [
        ("so it is $\\frac{1}{2}$", "0.5", 1.0, 1.0),
        ("thus \\boxed{0.5}.", r"\frac{2}{4}", 1.0, 1.0),
        ("The answer is 1,234", 1234, 1.0, 1.0),
        ("first 41, then 42", "40 + 2 is\n#### 42", 1.0, 1.0),
        ("first 42, then $41$", 42, 0.0, 1.0),
        (r"$x = \{1, 3\}$", r"\{3, 1\}", 1.0, 1.0),
        (r"$(x+1)^2$", r"x^2 + 2x + 1", 1.0, 1.0),
        (r"$(x+1)^2$", r"x^2 + 1", 0.0, 1.0),
        ("I do not know", 42, 0.0, 0.0),
    ],
)  # fmt: skip
def test_answers_are_compared_by_the_real_math_verify(
    completion: str, answer: Any, expected: float, answered: float
) -> None:
    pytest.importorskip("math_verify")
    from rlhf_worker.rewards.math_answers import score as judged

    assert judged("", completion, answer=answer) == (expected, {"answered": answered})


@pytest.mark.timeout(300)
def test_the_reward_of_the_real_math_verify_in_its_own_process() -> None:
    """math-verify's own time limit is a signal, which only a main thread may set."""
    pytest.importorskip("math_verify")
    given: dict[str, Any] = {"name": "m", "type": "python", "function": "rlhf_worker.rewards.math_answers:score"}
    with Scorer([RewardSpec.model_validate({**given, "workers": 2})]) as scorer:
        found = scorer.score([a_sample(0, r"it is \boxed{\frac{84}{2}}", answer=42), a_sample(1, "41", answer="42")])
    assert [(item.reward, item.metrics) for item in found] == [(1.0, {"m/answered": 1.0}), (0.0, {"m/answered": 1.0})]


def test_a_missing_package_is_a_bad_spec_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    spec = {"name": "m", "type": "python", "function": "rlhf_worker.rewards.math_answers:score"}
    with pytest.raises(BadSpec, match=r"rewards\[m\]\.function cannot be loaded: (?s:.*)no python package math-verify"):
        Scorer([RewardSpec.model_validate(spec)])


@pytest.fixture
def math_answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in: Any = types.ModuleType("math_verify")
    stand_in.parse = lambda text: [text] if "$" in text or "\\boxed" in text else []
    stand_in.verify = lambda gold, given: gold == given
    monkeypatch.setitem(sys.modules, "math_verify", stand_in)
    monkeypatch.delitem(sys.modules, "rlhf_worker.rewards.math_answers", raising=False)
    import rlhf_worker.rewards.math_answers as module

    return module


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (42, "$42$"), ("1,234.5", "$1234.5$"), ("so 40 + 2\n#### 42", "$42$"), (r"\frac{1}{2}", r"$\frac{1}{2}$"),
        ("$x$", "$x$"),
        (r"\boxed{7}", r"\boxed{7}"), ("1,3", "$1,3$"), (r"\{1, 3\}", r"$\{1, 3\}$"), (-0.5, "$-0.5$"),
    ],
)  # fmt: skip
def test_references_are_formulas(math_answers: Any, answer: Any, wanted: str) -> None:
    assert math_answers.reference(answer) == wanted


def test_an_answer_is_judged_and_one_that_cannot_be_read_is_counted(math_answers: Any) -> None:
    assert math_answers.score("", "$42$", answer=42) == (1.0, {"answered": 1.0})
    assert math_answers.score("", "$41$", answer=42) == (0.0, {"answered": 1.0})
    assert math_answers.score("", "I do not know", answer=42) == (0.0, {"answered": 0.0})
    math_answers.parse = lambda text: []
    with pytest.raises(ValueError, match="math-verify cannot read the column 'answer': '\\?'"):
        math_answers.score("", "$1$", answer="?")
