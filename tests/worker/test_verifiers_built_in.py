"""The verifiers that come with the worker: mathematical answers, and programs in a cage."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.rewards import code_tests
from rlhf_worker.rewards.code_tests import Limits, Outcome, passes, program, score
from rlhf_worker.rewards.scorer import Scorer
from tests.worker.samples import a_sample

LIMITS = Limits(seconds=20, memory_bytes=512 << 20, file_bytes=1 << 20)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that `nobody` can run, where these tests are root and their own python lies in root's home."""
    if os.geteuid() == 0 and not code_tests._for_all(Path(sys.executable)):
        monkeypatch.setattr(code_tests, "PYTHON", "/usr/bin/python3")


def run(text: str, given: str = "", **limits: int) -> Outcome:
    from dataclasses import replace

    return code_tests.run(text, given, replace(LIMITS, **limits))


def refused(action: str) -> str:
    """A program that tells why python could not do this."""
    lines = "\n".join(f"    {line}" for line in action.splitlines())
    caught = "except (OSError, RuntimeError) as e:\n    print('refused', e)\n"
    return f"import os, socket, threading\ntry:\n{lines}\n    print('done')\n{caught}"


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
        "socket.create_connection(('127.0.0.1', 22), 5)",
        "socket.socket(type=socket.SOCK_DGRAM).connect(('8.8.8.8', 53))",
        "open('/proc/%d/environ' % os.getppid()).read()", "open('/tmp/of_a_program', 'w')", "os.listdir('/tmp')",
        "os.kill(os.getppid(), 9)",
    ],
)  # fmt: skip
def test_what_is_isolated_reaches_no_network_no_files_and_no_process(action: str) -> None:
    outcome = run(refused(action))
    assert outcome.output.startswith("refused") or not outcome.isolated, outcome


def test_python_itself_works_in_the_cage() -> None:
    imports = "import collections, decimal, json, re, subprocess, math"
    outcome = run(f"{imports}\nprint(json.dumps(math.sqrt(4)))\nopen('mine', 'w').write('x')")
    assert (outcome.status, outcome.output) == (0, "2.0\n")


# Mathematical answers: by math-verify, which is of the tests' environment and not of the image; what is ours alone, on a
# stand-in.


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
