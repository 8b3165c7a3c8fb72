"""Rewards: each way to fail ends in a clear error or, tried again, in a value; and nothing outlives `close`."""

import contextlib
import datetime
import gc
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadData, BadSpec, RewardFailed
from rlhf_worker.experience import Sample, means
from rlhf_worker.rewards.attempt import Judgement
from rlhf_worker.rewards.http import HttpReward, proxy
from rlhf_worker.rewards.judge import JudgeReward
from rlhf_worker.rewards.pool import PythonReward
from rlhf_worker.rewards.scorer import Scorer
from tests.worker.samples import a_sample
from tests.worker.waiting import until


def python(named: str = "", **fields: Any) -> RewardSpec:
    source = {} if fields.keys() & {"code", "function"} else {"function": f"tests.worker.reward_functions:{named}"}
    return RewardSpec.model_validate({"name": "r", "type": "python", "retries": 0, "workers": 1, **source, **fields})


def children() -> set[int]:
    """Live reward subprocesses of this process (also unreaped ones)."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(status.parent.name), status.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if int(rest[1]) == os.getpid():
            found.add(pid)
    return found


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process ends in time (a zombie that another parent has yet to reap counts as ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        threading.Event().wait(0.01)
    return False


OURS = ("reward", "serve_forever", "process_request_thread")


def threads() -> set[str]:
    """Of rewards and of these tests' services."""
    return {thread.name for thread in threading.enumerate() if any(part in thread.name for part in OURS)}


def sockets() -> set[str]:
    """Open in this process, by inode, of Python's socket objects: gRPC's, of an earlier test's Ray, have none, and come
    and go.
    """
    found = set()
    for each in gc.get_objects():
        if issubclass(type(each), socket.socket):
            with contextlib.suppress(OSError):  # closed
                found.add(str(Path(f"/proc/self/fd/{each.fileno()}").readlink()))
    return found


@pytest.fixture(scope="module", autouse=True)
def _what_others_made() -> Iterator[None]:
    """Is left out of each look at all objects: after Ray's and vLLM's tests it takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def others() -> Iterator[set[int]]:
    """Children of other tests, such as multiprocessing's tracker. Nothing of ours is left."""
    before, open_before, running = children(), sockets(), threads()
    yield before
    gc.collect()
    try:
        until(lambda: children() <= before and threads() <= running and sockets() <= open_before)
    except AssertionError:
        pytest.fail(f"left behind: children {children() - before}, sockets {sockets() - open_before}, threads "
            f"{threads() - running}")


def values(spec: RewardSpec, count: int = 1, **row: Any) -> list[float]:
    with Scorer([spec]) as scorer:
        return [s.reward for s in scorer.score([a_sample(i, text="x" * i, **row) for i in range(count)])]


MODEL: dict[str, Any] = {"type": "model", "model": {"path": "some/model"}}


def numbers(judgements: list[Judgement]) -> list[float]:
    return [verdict.value for verdict in judgements]


# Values


def test_values_come_in_the_order_of_the_samples_from_several_children() -> None:
    assert values(python("length", workers=3), 40) == [float(i) for i in range(40)]


def test_a_reward_gets_the_row_and_the_prompt_as_the_data_has_it() -> None:
    chat = [{"role": "user", "content": "hi"}] * 3
    assert values(python("of_row"), bonus=2, prompt=chat) == [5.0]


def test_inline_code() -> None:
    code = (
        "import math\ndef helper(n):\n    return math.sqrt(n)\ndef reward(prompt, completion, **row):\n    "
            "return helper(len(completion))\n"
    )
    assert values(python(code=code), 5)[4] == 2.0


def test_the_sum_is_weighted_and_the_parts_are_kept() -> None:
    specs = [python("length", name="a", weight=0.5), python(code="def reward(**row): return -1", name="b", weight=2.0)]
    with Scorer(specs) as scorer:
        (found,) = scorer.score([a_sample(text="four")])
    assert (found.reward, found.parts) == (0.0, {"a": 4.0, "b": -1.0})


def test_children_are_kept_between_calls_and_never_import_torch() -> None:
    with Scorer([python("pid", name="pid"), python("has_torch", name="torch")]) as scorer:
        first, second = (scorer.score([a_sample()])[0].parts for _ in range(2))
    assert first == second
    assert first["torch"] == 0.0


def test_what_a_reward_prints_does_not_disturb() -> None:
    assert values(python("prints"), 3) == [2.0] * 3


def test_a_large_sample_passes() -> None:
    with Scorer([python("length")]) as scorer:
        assert scorer.score([a_sample(text="x" * 5_000_000)])[0].reward == 5e6


def test_nothing_to_score() -> None:
    assert values(python("length"), 0) == []


def test_reasoning_gym_judges_by_the_tasks_own_verifier() -> None:
    spec = python(function="rlhf_worker.rewards.reasoning_gym:score", timeout_seconds=60)
    row: dict[str, Any] = {
        "question": "Calculate 5 - 3.",
        "answer": "2",
        "metadata": {},
        "verifier": {"task": "basic_arithmetic", "config": {"max_terms": 2}},
    }
    with Scorer([spec]) as scorer:
        texts = ["2", " 2\n", "I think <answer>7</answer> no <answer> 2 </answer>", "3", ""]
        found = [s.reward for s in scorer.score([a_sample(i, text=text, **row) for i, text in enumerate(texts)])]
    assert found == [1.0, 1.0, 1.0, 0.0, 0.0]


# Failures


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"Traceback.*reward_functions\.py.*in raises.*RuntimeError: no verdict on yes"),
        ("exits", "SystemExit: 3"),
        ("nan", "returned nan, a finite number is needed"),
        ("infinite", "returned inf, a finite number is needed"),
        ("beyond", "OverflowError: int too large to convert to float"),
        ("text", "returned 'good' of type str, a number is needed"),
        ("nothing", "returned None of type NoneType, a number is needed"),
        ("coroutine", "of type coroutine, a number is needed"),
        ("complex_number", "of type complex, a number is needed"),
        ("unshowable", "a value whose __repr__ raises RuntimeError of type Unshowable, a number is needed"),
        ("killed", r"its process died: signal 9 \(SIGKILL\)"),
        ("ends", "its process died: exit status 7"),
        ("of_row", "KeyError: 'bonus'"),
    ],
)
def test_each_failure_is_named_and_never_a_zero(function: str, message: str) -> None:
    with (
        Scorer([python(function, retries=1)]) as scorer,
        pytest.raises(RewardFailed, match=r"(?s)rewards\[r\] failed 2 times on prompt 0:4, completion 'yes': "
            rf".*{message}"),
    ):
        scorer.score([a_sample(4)])


class Unreadable:
    """A value that the parent can pickle and the child cannot read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/nowhere",)


def test_a_row_that_the_child_cannot_read_is_named_on_its_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RewardFailed, match="its process died: exit status 1"):
        values(python("length"), value=Unreadable())
    assert "No such file or directory: '/nowhere'" in capfd.readouterr().err


def test_a_hung_child_is_killed_at_its_deadline(others: set[int]) -> None:
    with Scorer([python("hangs", timeout_seconds=0.3)]) as scorer:
        (child,) = children() - others
        with pytest.raises(RewardFailed, match=r"failed once \(retries is 0\).*no answer within 0\.3 s; its process "
            r"was killed"):
            scorer.score([a_sample()])
        assert gone(child)


def test_what_a_hung_reward_has_started_is_killed_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(RewardFailed, match="no answer"):
        values(python("leaves_a_grandchild", timeout_seconds=5.0), pids=str(pids))
    (grandchild,) = map(int, pids.read_text().split())
    assert gone(grandchild)


@pytest.mark.parametrize("how", ["raises", "hangs", "killed", "nan"])
def test_a_second_try_that_works_is_a_value(tmp_path: Path, how: str) -> None:
    assert values(
        python("second_try", retries=1, workers=2, timeout_seconds=3.0), 4, seen=str(tmp_path), how=how,
    ) == [1.5] * 4


def test_a_child_killed_between_two_calls_is_replaced() -> None:
    with Scorer([python("pid", retries=1)]) as scorer:
        first = int(scorer.score([a_sample()])[0].reward)
        os.kill(first, 9)
        assert int(scorer.score([a_sample()])[0].reward) != first


def test_one_failed_sample_gives_the_others_up() -> None:
    code = ("def reward(completion, **row):\n    if completion == '':\n        raise ValueError('empty')\n    return "
        "1.0\n")
    with pytest.raises(RewardFailed, match="prompt 0:0"):
        values(python(code=code), 200)


def test_the_scorer_works_on_after_a_failure() -> None:
    code = "def reward(completion, **row):\n    return 1.0 / len(completion)\n"
    with Scorer([python(code=code)]) as scorer:
        with pytest.raises(RewardFailed, match="ZeroDivisionError"):
            scorer.score([a_sample(text="")])
        assert scorer.score([a_sample(text="four")])[0].reward == 0.25


def test_close_ends_a_call_in_the_middle(others: set[int]) -> None:
    scorer = Scorer([python("hangs", timeout_seconds=600, retries=5)])
    errors: list[str] = []

    def score() -> None:
        with pytest.raises(RewardFailed) as caught:
            scorer.score([a_sample()])
        errors.append(str(caught.value))

    thread = threading.Thread(target=score)
    (child,) = children() - others
    thread.start()
    until(lambda: asleep(child))
    scorer.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "the pool was closed" in errors[0]


def test_children_end_with_a_killed_parent_also_in_the_middle_of_a_call(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from rlhf_api.job import RewardSpec\n"
        "from rlhf_worker.rewards.scorer import Scorer\n"
        "from tests.worker.samples import a_sample\n"
        "spec = RewardSpec.model_validate({'name': 'r', 'type': 'python', 'function': "
            "'tests.worker.reward_functions:writes_its_pid_and_hangs'})\n"
        "Scorer([spec]).score([a_sample(i, file=sys.argv[1]) for i in range(2)])\n"
    )
    file = tmp_path / "pids"
    with subprocess.Popen([sys.executable, "-c", code, str(file)]) as parent:
        until(lambda: file.exists() and len(file.read_text().split()) == 2, seconds=120)
        parent.kill()
    assert all(gone(int(pid)) for pid in file.read_text().split())


def asleep(pid: int) -> bool:
    """Whether the child has blocked its signals, as `hangs` does."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("SigBlk:")[1].split()[0], 16) != 0


# What cannot be loaded


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "no_such_module:f"}, r"rewards\[r\]\.function cannot be loaded: .*No module named "
            r"'no_such_module'"),
        ({"function": "json:no_such"}, r"module json has no function 'no_such'"),
        ({"function": "json"}, "has no function ''.*must be module:function"),
        ({"function": "tests.worker.reward_functions:not_callable"}, "has no function 'not_callable'"),
        ({"code": "def reward(:\n"}, r"(?s)rewards\[r\]\.code cannot be loaded.*SyntaxError"),
        ({"code": "import no_such_module\n"}, r'(?s)rewards\[r\]\.code>", line 1.*No module named'),
        ({"code": "def rewrad(**row): return 1\n"}, r"defines no function reward\(prompt, completion"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(fields: dict[str, str], message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        Scorer([python("length", name="well"), RewardSpec.model_validate({"name": "r", "type": "python", **fields})])


def test_a_child_that_dies_while_loading_is_no_bad_spec() -> None:
    with pytest.raises(RewardFailed, match=r"rewards\[r\] did not start: its process died: exit status 9"):
        Scorer([python(code="import os\nos._exit(9)\n")])


def test_a_traceback_shows_the_line_of_inline_code() -> None:
    with pytest.raises(RewardFailed, match=r"(?s)<rewards\[r\]\.code>\", line 2, in reward.*return 1 / 0"):
        values(python(code="def reward(**row):\n    return 1 / 0\n"))


POSTPONED = """
from __future__ import annotations
import dataclasses, pickle
from pydantic import BaseModel

@dataclasses.dataclass
class Answer:
    number: int

class Inner(BaseModel):
    number: int

class Outer(BaseModel):
    inner: Inner
    others: list[Inner] = []

def double(number):
    return 2 * number

def reward(prompt, completion, **row):
    answer = pickle.loads(pickle.dumps(Answer(1)))
    return pickle.loads(pickle.dumps(double))(answer.number + Outer(inner={"number": 2}).inner.number)
"""


def test_inline_code_is_a_module_to_dataclasses_pydantic_and_pickle() -> None:
    assert values(python(code=POSTPONED)) == [6.0]


@pytest.mark.parametrize("kind", ["np.bool_", "np.float32", "np.int64", "array", "Decimal", "Fraction", "bool"])
def test_numbers_of_every_library_are_numbers(kind: str) -> None:
    assert values(python("in_kind"), kind=kind) == [1.0]


# Groups, metrics, clipping


def group(prompt: int, *texts: str, **row: Any) -> list[Sample]:
    return [a_sample(prompt, text=text, **row) for text in texts]


def test_a_reward_of_scope_group_sees_each_prompts_completions() -> None:
    samples = [*group(0, "aaa", "a", "aa"), *group(1, "b"), *group(2, "cc", "c")]
    with Scorer([python("ranks", scope="group", workers=2)]) as scorer:
        found = scorer.score(samples)
    assert [item.reward for item in found] == [2.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert [item.metrics["r/size"] for item in found] == [3, 3, 3, 1, 2, 2]
    assert means(item.metrics for item in found) == {"r/size": 14 / 6}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one_too_few", "1 rewards for 2 samples"),
        ("of_all", "returned 1.0 of type float, a list of numbers is needed"),
        ("length", "unexpected keyword argument|missing 1 required positional argument: 'completion'"),
    ],
)
def test_a_group_needs_a_number_a_completion(function: str, message: str) -> None:
    with pytest.raises(RewardFailed, match=message), Scorer([python(function, scope="group")]) as scorer:
        scorer.score(group(0, "a", "b"))


def test_a_column_that_a_groups_argument_would_hide_is_refused() -> None:
    with pytest.raises(BadData, match=r"prompt 0:0: .* gets `completions`, so no column may have that name"):
        values(python("ranks", scope="group"), completions=["x"])


def test_http_gets_a_group_in_one_request_and_may_answer_with_metrics() -> None:
    def answer(_: int, samples: list[dict[str, Any]]) -> Answer:
        count = len(samples)
        return 200, json.dumps({"rewards": [count] * count, "metrics": [{"n": 1}] * count}).encode()

    with Service(answer) as service, Scorer([http(service.url, scope="group")]) as scorer:
        found = scorer.score([*group(0, "a", "b"), *group(1, "c")])
    assert [(item.reward, item.metrics) for item in found] == [(2.0, {"h/n": 1.0})] * 2 + [(1.0, {"h/n": 1.0})]


@pytest.mark.parametrize("name", ["Upper", "a-b", "", "1st", "x" * 41, "a/b"])
def test_names_of_metrics_are_bounded(name: str) -> None:
    with pytest.raises(RewardFailed, match="the name of a metric must match"):
        values(python("named"), metric=name)


def test_metrics_named_after_samples_are_refused() -> None:
    with Scorer([python("named")]) as scorer:
        scorer.score([a_sample(i, metric=f"m{i}") for i in range(32)])
        with pytest.raises(RewardFailed, match="33 names of metrics so far, 32 are the most of a run"):
            scorer.score([a_sample(metric="another")])
        assert scorer.score([a_sample(metric="m7")])[0].metrics == {"r/m7": 2.0}


def test_a_value_is_clipped_before_it_is_weighted() -> None:
    clip = {"low": -1.0, "high": 2.0}
    specs = [python("length", clip=clip, weight=10.0), RewardSpec.model_validate({**MODEL, "name": "m", "clip": clip})]
    with Scorer(specs) as scorer:
        found = scorer.score([a_sample(0, text=""), a_sample(1, text="four")], {"m": [-7.0, 0.5]})
    assert [item.parts for item in found] == [{"r": 0.0, "m": -1.0}, {"r": 2.0, "m": 0.5}]
    assert [item.reward for item in found] == [-1.0, 20.5]


# Failures that are drawn anew


def test_a_failed_sample_is_told_and_the_others_are_judged() -> None:
    with Scorer([python("fails_on_no", on_failure="redraw", retries=1), python("length", name="l")]) as scorer:
        found = scorer.score([*group(0, "yes", "no"), *group(1, "yes")])
    assert [item.reward for item in found][::2] == [4.0, 4.0]
    assert math.isnan(found[1].reward) and found[1].parts == {}
    assert "rewards[r] failed 2 times on prompt 0:0, completion 'no': Traceback" in found[1].sample.failure


def test_one_bad_sample_of_a_request_does_not_fail_the_rest() -> None:
    def answer(_: int, samples: list[dict[str, Any]]) -> Answer:
        return (500, b"oh no") if any(sample["completion"] == "no" for sample in samples) else judged(_, samples)

    with Service(answer) as service:
        reward = HttpReward(http(service.url, on_failure="redraw", workers=1), backoff=0.001)
        found = reward.score([a_sample(i, text="no" if i == 3 else "x") for i in range(6)])
    assert ["HTTP 500: 'oh no'" in verdict.failure for verdict in found] == [i == 3 for i in range(6)]
    assert [verdict.value for verdict in found if not verdict.failure] == [1.0] * 5


def test_no_reward_is_asked_about_the_group_of_an_episode_that_failed() -> None:
    failed = replace(a_sample(0, text=""), failure="rollout.environment failed")
    specs = [python("length"), RewardSpec.model_validate({**MODEL, "name": "m"})]
    with Scorer(specs) as scorer:
        found = scorer.score([*group(0, "a"), failed, *group(1, "bb")], {"m": [1.0, 2.0, 3.0]})
    assert [item.parts for item in found] == [{}, {}, {"r": 2.0, "m": 3.0}]
    assert [item.sample.failure for item in found] == ["", "rollout.environment failed", ""]


def test_a_reward_that_does_not_judge_a_source_counts_0_there_and_neither_its_bounds_nor_a_failure_touch_it() -> None:
    """One group of each source, and one whose episode failed; the model has values of what it judges alone."""
    specs = [
        python("length", name="short", clip={"low": 2, "high": 3}),
        RewardSpec.model_validate({**MODEL, "name": "m", "clip": {"low": 5, "high": 9}}),
    ]

    def of(row: int, text: str, rewards: tuple[str, ...], failure: str = "") -> Sample:
        sample = a_sample(row, text=text)
        return replace(sample, prompt=replace(sample.prompt, rewards=rewards), failure=failure)

    short, model = ("short",), ("m",)
    samples = [of(0, "a", short), of(1, "b", model, "it failed"), of(2, "cccc", model), of(3, "dddd", short)]
    with Scorer(specs) as scorer:
        found = scorer.score(samples, {"m": [7.0, 8.0]})
    assert [item.parts for item in found] == [
        {"short": 2.0, "m": 0.0}, {}, {"short": 0.0, "m": 8.0}, {"short": 3.0, "m": 0.0},
    ]  # fmt: skip
    assert math.isnan(found[1].reward)


# Tried at the start


def test_every_reward_is_tried_and_all_that_fail_are_told_by_name() -> None:
    model = RewardSpec.model_validate({**MODEL, "name": "m"})
    well = [python("length"), python("ranks", name="g", scope="group"), model]
    with Scorer(well) as scorer:
        scorer.try_out([group(0, "a", "a")])
    bad = [python("raises", name="bad", on_failure="redraw"), python("hangs", name="slow", timeout_seconds=0.3)]
    with Scorer([*well, *bad]) as scorer, pytest.raises(RewardFailed) as caught:
        scorer.try_out([group(0, "a", "a")])
    assert "rewards[bad] failed once" in str(caught.value)
    assert "rewards[slow] failed once" in str(caught.value) and "no answer within 0.3 s" in str(caught.value)


# HTTP

Answer = tuple[int, bytes]
PARTIAL = b'{"rewards": ['  # sent as the beginning of something longer


class Service:
    """A reward service on a free port that answers with what `answers` gives for each request in turn."""

    def __init__(self, answer: Callable[[int, Any], Answer | None], key: str = "samples") -> None:
        self.requests: list[Any] = []
        self.headers: list[Any] = []
        self.released = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))[key]
                service.requests.append(asked)
                service.headers.append(self.headers)
                found = answer(len(service.requests), asked)
                if found is None:
                    service.released.wait(30)
                    return
                self.send_response(found[0])
                if found[1] == PARTIAL:
                    self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(found[1])

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"

    def __enter__(self) -> "Service":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def http(url: str, **fields: Any) -> RewardSpec:
    return RewardSpec.model_validate(
        {"name": "h", "type": "http", "url": url, "retries": 1, "workers": 2, "timeout_seconds": 5.0, **fields}
    )


def ok(rewards: Any) -> Answer:
    return 200, json.dumps({"rewards": rewards}).encode()


def judged(_: int, samples: list[dict[str, Any]]) -> Answer:
    return ok([len(sample["completion"]) for sample in samples])


def test_http_batches_keep_the_order() -> None:
    with Service(judged) as service:
        assert values(http(service.url), 150) == [float(i) for i in range(150)]
    assert sorted(map(len, service.requests)) == [22, 64, 64]


@pytest.mark.parametrize("kind", ["http", "python"])
def test_groups_are_scored_side_by_side_by_one_reward(kind: str) -> None:
    samples = [a_sample(i, text="x" * i) for i in range(150)]
    with Service(judged) as service:
        reward = HttpReward(
            http(service.url, workers=1)
        ) if kind == "http" else PythonReward(python("length", workers=2))
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda given: numbers(reward.score(given)), [samples] * 4))
        reward.close()
    assert found == [[float(i) for i in range(150)]] * 4


def test_http_sends_the_row() -> None:
    with Service(judged) as service:
        values(http(service.url), prompt="raw", answer=4)
    assert service.requests == [[{"prompt": "raw", "completion": "", "answer": 4}]]


BAD: dict[str, tuple[Answer | None, str]] = {
    "error": ((500, b"out of memory"), "HTTP 500: 'out of memory'"),
    "no json": ((200, b"<html>"), r"the answer is no JSON: '<html>'"),
    "deep json": ((200, b"[" * 100_000), "the answer is no JSON"),
    "half an answer": ((200, PARTIAL), "RemoteProtocolError: peer closed connection"),
    "not there": ((404, b"no such page"), "HTTP 404: 'no such page'"),
    "other json": ((200, b"[1]"), r'must be \{"rewards"'),
    "no list": (ok(3), r'must be \{"rewards"'),
    "too few": (ok([]), "0 rewards for 1 samples"),
    "too many": (ok([1, 2]), "2 rewards for 1 samples"),
    "nan": ((200, b'{"rewards": [NaN]}'), "returned nan, a finite number"),
    "beyond floats": (ok([10**400]), "a finite number"),
    "infinite": ((200, b'{"rewards": [1e999]}'), "returned inf, a finite number"),
    "null": (ok([None]), "returned None, a finite number"),
    "text": (ok(["1"]), "returned '1', a finite number"),
    "no answer": (None, r"no answer within 0\.5 s"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_an_error_that_names_it(case: str) -> None:
    answer, message = BAD[case]
    with Service(lambda *_: answer) as service:
        reward = HttpReward(http(service.url, timeout_seconds=0.5 if answer is None else 30), backoff=0.001)
        with pytest.raises(RewardFailed, match=rf"rewards\[h\] failed 2 times on prompt 0:3.*{service.url}: "
            rf".*{message}"):
            reward.score([a_sample(3)])
        assert len(service.requests) == 2


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_and_then_a_good_one_is_a_value(case: str) -> None:
    with Service(lambda n, samples: BAD[case][0] if n == 1 else judged(n, samples)) as service:
        reward = HttpReward(http(service.url, timeout_seconds=3 if BAD[case][0] is None else 30), backoff=0.001)
        assert numbers(reward.score([a_sample(text="four")])) == [4.0]


def test_a_service_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(RewardFailed, match=rf"{url}: ConnectError"):
            HttpReward(http(url), backoff=0.001).score([a_sample()])


def test_a_row_that_is_no_json_is_named() -> None:
    with pytest.raises(BadData, match=r"prompt 0:0: column 'blob' is no JSON .*type bytes is not JSON serializable"):
        HttpReward(http("http://127.0.0.1:9/"), backoff=0.001).score([a_sample(blob=b"\x00")])


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), float("nan"), {1, 2}])
def test_the_column_that_is_no_json_is_named(value: Any) -> None:
    with pytest.raises(BadData, match=r"prompt 0:1: column 'when' is no JSON"):
        HttpReward(http("http://127.0.0.1:9/")).score([a_sample(0, when="now"), a_sample(1, when=value)])


@pytest.mark.parametrize(
    ("url", "variables", "through"),
    [
        ("http://judge:8000/", {}, None),
        ("http://judge:8000/", {"http": "proxy:3128"}, "http://proxy:3128"),
        ("https://judge/", {"http": "http://proxy:3128", "all": "http://all:1"}, "http://all:1"),
        ("http://judge.default.svc/", {"http": "http://proxy:3128", "no": "fd00::/8,.svc"}, None),
        ("http://[fd00::5]:80/", {"http": "http://proxy:3128", "no": "10.0.0.0/8,fd00::/8"}, None),
        ("http://10.1.2.3/", {"http": "http://proxy:3128", "no": "10.0.0.0/8,fd00::/8"}, None),
        (
            "http://11.1.2.3/", {"http": "http://proxy:3128", "no": "10.0.0.0/8, [::1, ://, *.example"},
            "http://proxy:3128",
        ),
        ("http://judge/", {"http": "http://proxy:3128", "no": "*"}, None),
    ],
)
def test_which_proxy_the_environment_names(url: str, variables: dict[str, str], through: str | None) -> None:
    assert proxy(httpx.URL(url), variables)[0] == through


def test_networks_in_no_proxy_stop_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,fd00::/8,::1,127.0.0.0/8")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with Service(judged) as service:
        assert values(http(service.url)) == [0.0]


@pytest.mark.parametrize(
    "address", ["socks5://user:secret@proxy:1080", "ftp://user:secret@proxy:1", "http://user:secret@proxy:port"],
)
def test_a_proxy_that_cannot_be_used_is_a_bad_spec_that_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(BadSpec, match=r"rewards\[h\]\.url: ALL_PROXY of the trainer pods cannot be used") as caught:
        Scorer([http("http://judge:8000/")])
    assert "secret" not in str(caught.value)


def test_a_url_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(BadSpec, match=r"rewards\[h\]\.url: 'http://judge:port/' is no URL"):
        Scorer([http("http://judge:port/")])


def test_one_slow_batch_of_many_ends_the_run_with_its_name() -> None:
    def answer(_: int, samples: list[dict[str, Any]]) -> Answer | None:
        return None if any(len(s["completion"]) == 70 for s in samples) else judged(0, samples)

    with Service(answer) as service, pytest.raises(RewardFailed, match=r"prompt 0:64, .*no answer within 1 s"):
        values(http(service.url, retries=0, timeout_seconds=1), 150)


# Models


def test_values_of_a_model_are_joined_by_weight() -> None:
    specs = [
        RewardSpec.model_validate({"name": "m", "type": "model", "weight": 0.5, "model": {"path": "some/model"}}),
        python("length", name="l", weight=2.0),
    ]
    samples = [a_sample(0, text="a"), a_sample(1, text="bc")]
    with Scorer(specs) as scorer:
        found = scorer.score(samples, {"m": [4.0, -2.0]})
        assert [(s.reward, s.parts) for s in found] == [(4.0, {"m": 4.0, "l": 1.0}), (3.0, {"m": -2.0, "l": 2.0})]
        with pytest.raises(RewardFailed, match=r"rewards\[m\], a model: returned nan"):
            scorer.score(samples, {"m": [4.0, float("nan")]})
        with pytest.raises(RewardFailed, match="1 values for 2 samples"):
            scorer.score(samples, {"m": [4.0]})


# A judge


def judge(url: str, retries: int = 1, **fields: Any) -> JudgeReward:
    asked = {
        "model": "judge-7b", "prompt": "Rate {completion} for {prompt}, truth {answer}. Say {\"score\": n}.", **fields,
    }
    spec = {
        "name": "j", "type": "judge", "url": url, "retries": retries, "workers": 4, "timeout_seconds": 5.0,
        "judge": asked,
    }
    return JudgeReward(RewardSpec.model_validate(spec), backoff=0.001)


def says(text: Any) -> Answer:
    return 200, json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    ).encode()


def test_a_judge_is_asked_once_a_sample_and_its_last_score_counts() -> None:
    def answer(_: int, messages: list[dict[str, str]]) -> Answer:
        return says(f"A score: 9 is too much. score: {messages[0]['content'].count('x')}\n")

    with Service(answer, key="messages") as service:
        samples = [a_sample(i, text="x" * i, answer=2) for i in range(11)]
        assert numbers(judge(service.url).score(samples)) == [i / 10 for i in range(11)]
    assert len(service.requests) == 11


def test_the_judges_prompt_is_filled_once_and_braces_are_text() -> None:
    with Service(lambda *_: says("Score 3"), key="messages") as service:
        judge(service.url).score([a_sample(text="{prompt} {nothing}", answer=["a", 1])])
        chat = [{"role": "user", "content": "hi"}]
        judge(service.url).score([a_sample(answer=0, prompt=chat)])
    first, second = (request[0]["content"] for request in service.requests)
    assert first == 'Rate {prompt} {nothing} for prompt 0, truth ["a", 1]. Say {"score": n}.'
    assert second == 'Rate yes for prompt 0, truth 0. Say {"score": n}.'


def test_a_hole_that_the_data_cannot_fill_is_a_bad_spec() -> None:
    with pytest.raises(BadSpec, match=r"rewards\[j\]\.judge\.prompt: the data has no column 'answer', only 'prompt', "
        r"'completion'"):
        judge("http://127.0.0.1:9/").score([a_sample()])


def test_the_judges_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(BadSpec, match=r"judge\.apiKeyEnv: JUDGE_KEY is not set in the trainer pods"):
        judge("http://127.0.0.1:9/", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with Service(lambda *_: says("score: 1"), key="messages") as service:
        judge(service.url, api_key_env="JUDGE_KEY").score([a_sample(answer=1)])
    assert service.headers[0]["authorization"] == "Bearer secret"


GARBAGE: dict[str, tuple[Answer, str]] = {
    "no score": (says("It is rather good, I think. " * 99), "no score by judge.pattern in the judge's answer 'It is "
        "rather good"),
    "out of scale": (says("score: 11"), r"the score 11 is not in 0 to 10, in the judge's answer 'score: 11'"),
    "below": (says("score: -1"), "the score -1 is not in 0 to 10"),
    "nothing": (says(None), "no score by judge.pattern in the judge's answer None"),
    "empty": (says(""), "no score"),
    "not text": (says(7), "no answer of chat completions"),
    "no choices": ((200, b'{"choices": []}'), "no answer of chat completions"),
    "no chat": ((200, b"[1]"), "no answer of chat completions"),
    "html": ((200, b"<html>"), "the answer is no JSON"),
    "no model": ((404, b'{"message": "The model `judge-7b` does not exist."}'), "HTTP 404: .*does not exist"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_judges_garbage_is_asked_again_and_never_a_zero(case: str) -> None:
    answer, message = GARBAGE[case]
    with (
        Service(lambda *_: answer, key="temperature") as service,
        pytest.raises(RewardFailed, match=rf"rewards\[j\] failed 2 times on prompt 0:3.*{service.url}: .*{message}"),
    ):
        judge(service.url).score([a_sample(3, answer=1)])
    assert service.requests == [0.0, 1.0]
    with Service(lambda n, _: answer if n == 1 else says("score: 0"), key="temperature") as service:
        assert numbers(judge(service.url).score([a_sample(answer=1)])) == [0.0]


def test_a_pattern_of_ones_own() -> None:
    with Service(lambda *_: says("<verdict>B</verdict> 0.25/1"), key="messages") as service:
        asked = judge(service.url, pattern=r"([\d.]+)/1", low=0, high=0.5)
        assert numbers(asked.score([a_sample(answer=1)])) == [0.5]
        with pytest.raises(RewardFailed, match="the score 'B' is no number"):
            judge(service.url, retries=0, pattern="<verdict>(.*)</verdict>").score([a_sample(answer=1)])
