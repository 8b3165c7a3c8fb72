"""Metrics into each backend: real packages, at the right step also after a resume, and never the end of a run."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_api.job import TelemetrySpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec
from rlhf_worker.feed import telemetry as module
from rlhf_worker.feed.telemetry import Failures, Lane, PhaseTimer, Telemetry, check
from tests.worker.configs import run_config
from tests.worker.waiting import until


def config(directory: Path, **telemetry: Any) -> RunConfig:
    return run_config(checkpoint={"path": str(directory)}, telemetry=telemetry)


def log(given: RunConfig, steps: dict[int, dict[str, float]], first_step: int = 1) -> Telemetry:
    telemetry = Telemetry(given, first_step)
    for step, values in steps.items():
        telemetry.log(step, values)
    telemetry.close()
    return telemetry


def tensorboard(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    log(config(tmp_path), {step: {"reward/mean": step / 4} for step in range(1, 4)})
    assert tensorboard(tmp_path, "reward/mean") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert tensorboard(tmp_path, "telemetry/failures") == [(1, 0), (2, 0), (3, 0)]


def test_a_resumed_run_replaces_the_steps_it_runs_again(tmp_path: Path) -> None:
    log(config(tmp_path), {step: {"reward": 0.0} for step in range(4)})
    log(config(tmp_path), {2: {"reward": 1.0}}, first_step=2)
    assert tensorboard(tmp_path, "reward") == [(0, 0.0), (1, 0.0), (2, 1.0)]


def test_values_that_are_no_numbers_are_kept_for_the_eye(tmp_path: Path) -> None:
    log(config(tmp_path), {1: {"loss": math.nan}})
    assert math.isnan(tensorboard(tmp_path, "loss")[0][1])


def test_steps_never_go_back_and_may_come_in_parts(tmp_path: Path) -> None:
    telemetry = Telemetry(config(tmp_path), 3)
    telemetry.log(2, {"eval/a/mean_reward": 1.0})
    telemetry.log(3, {"reward": 1.0})
    telemetry.log(3, {"eval/a/mean_reward": 2.0})
    with pytest.raises(ValueError, match="metrics of step 2 after those of step 3"):
        telemetry.log(2, {"reward": 1.0})
    telemetry.close()
    assert tensorboard(tmp_path, "eval/a/mean_reward") == [(2, 1.0), (3, 2.0)]


def test_all_of_it_can_be_left_out(tmp_path: Path) -> None:
    log(config(tmp_path, tensorboard=False), {1: {"reward": 1.0}})
    assert list(tmp_path.iterdir()) == []


# Failures


class Backend:
    def __init__(self, fails: Callable[[int], bool] = lambda step: False) -> None:
        self.fails, self.logged, self.closed = fails, list[int](), False

    def log(self, step: int, values: Any) -> None:
        if self.fails(step):
            raise ConnectionError(f"lost at step {step}")
        self.logged.append(step)

    def close(self) -> None:
        self.closed = True


def run_lane(backend: Callable[[], Any], steps: int, failures: Failures) -> None:
    lane = Lane("wandb", backend, failures)
    for step in range(steps):
        lane.put((step, {}))
    lane.put(None)
    lane.join(20)


def test_a_backend_that_fails_is_told_once_and_counted_and_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    backend, failures = Backend(lambda step: step in (2, 3)), Failures()
    run_lane(lambda: backend, 6, failures)
    assert (backend.logged, backend.closed, failures.counts["wandb"]) == ([0, 1, 4, 5], True, 2)
    told = capfd.readouterr().err.splitlines()
    assert told == ["warning: spec.telemetry.wandb: ConnectionError: lost at step 2; the run goes on, "
        "telemetry/failures counts"]


def test_a_backend_that_does_not_start_is_tried_again_at_each_step() -> None:
    backend, failures, tries = Backend(), Failures(), iter([OSError("no route"), OSError("no route"), None])

    def start() -> Backend:
        if error := next(tries):
            raise error
        return backend

    run_lane(start, 4, failures)
    assert (backend.logged, failures.counts["wandb"]) == ([2, 3], 2)


def test_a_hung_backend_holds_nothing_up_and_its_backlog_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()

    class Hangs(Backend):
        def log(self, step: int, values: Any) -> None:
            released.wait(60)

    monkeypatch.setattr(module, "Prometheus", lambda *_: Hangs())
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    telemetry = Telemetry(config(tmp_path, prometheusPort=9000), 1)
    for step in range(1, module.BACKLOG + 20):
        telemetry.log(step, {"reward": 1.0})
        until(lambda step=step: tensorboard_count(tmp_path) >= step)  # type: ignore[misc]
    assert telemetry.failures.counts["prometheusPort"] >= 18
    telemetry.close()
    released.set()


def tensorboard_count(directory: Path) -> int:
    """Bytes stand for events: the writer flushes each step."""
    files = list((directory / "tensorboard").glob("events*"))
    return sum(file.stat().st_size for file in files) // 60


def test_a_directory_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    telemetry = log(config(tmp_path), {1: {"reward": 1.0}, 2: {"reward": 1.0}})
    assert telemetry.failures.counts["tensorboard"] == 2
    assert capfd.readouterr().err.count("warning: spec.telemetry.tensorboard: ") == 1


# Prometheus


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = int(probe.getsockname()[1])
    yield found


def scraped(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines()
        if not line.startswith("#")
    }


def serves(port: int) -> bool:
    try:
        return bool(scraped(port))
    except OSError:
        return False


def test_prometheus_serves_the_newest_value_of_each_metric(tmp_path: Path, port: int) -> None:
    telemetry = Telemetry(config(tmp_path, prometheusPort=port), 1)
    telemetry.log(4, {"reward/mean": 0.5, "eval/held-out/mean_reward": 0.25})
    telemetry.log(5, {"reward/mean": 0.75})
    until(lambda: serves(port) and scraped(port).get('rlhf_step{rlhfjob="tiny"}') == 5.0)
    assert scraped(port) == {
        'rlhf_reward_mean{rlhfjob="tiny"}': 0.75,
        'rlhf_eval_held_out_mean_reward{rlhfjob="tiny"}': 0.25,
        'rlhf_telemetry_failures{rlhfjob="tiny"}': 0.0,
        'rlhf_step{rlhfjob="tiny"}': 5.0,
    }
    telemetry.close()
    assert not serves(port)


def test_metrics_whose_names_are_one_to_prometheus_are_series_of_their_own(tmp_path: Path, port: int) -> None:
    """A reward named mean-reward beside an evaluation's mean_reward, a metric of reward a beside reward a-b."""
    telemetry = Telemetry(config(tmp_path, prometheusPort=port), 1)
    for step in (1, 2):
        values = {"eval/e/mean-reward": 1.0, "eval/e/mean_reward": 2.0, "reward/a-b": 3.0, "reward/a/b": 4.0}
        telemetry.log(step, values | {"reward/mean": float(step)})
    until(lambda: serves(port) and scraped(port).get('rlhf_reward_mean{rlhfjob="tiny"}') == 2.0)
    series = scraped(port)
    assert telemetry.failures.counts["prometheusPort"] == 0
    assert series['rlhf_eval_e_mean_reward{rlhfjob="tiny"}'] == 1.0 and series['rlhf_reward_a_b{rlhfjob="tiny"}'] == 3.0
    alike = {name: value for name, value in series.items() if name.startswith(("rlhf_eval", "rlhf_reward_a"))}
    assert sorted(alike.values()) == [1, 2, 3, 4]
    telemetry.close()


def test_a_port_that_is_taken_is_told_and_taken_once_it_is_free(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        telemetry = Telemetry(config(tmp_path, prometheusPort=port), 1)
        telemetry.log(1, {"reward/mean": 0.5})
        until(lambda: telemetry.failures.counts["prometheusPort"] == 1)
    telemetry.log(2, {"reward/mean": 0.75})
    until(lambda: serves(port))
    assert scraped(port)['rlhf_telemetry_failures{rlhfjob="tiny"}'] == 1.0
    telemetry.close()
    assert "spec.telemetry.prometheusPort: OSError: [Errno 98] Address already in use" in capfd.readouterr().err


# Packages that the image may lack


@pytest.mark.parametrize(
    ("spec", "package"),
    [
        ({"wandb": {"project": "p", "mode": "offline"}}, "wandb"),
        ({"mlflow": {"trackingUri": "http://mlflow:5000"}}, "mlflow")
    ]
)
def test_a_package_that_the_image_lacks_is_a_bad_spec(
    spec: dict[str, Any], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / package / "__init__.py").exists()])
    (tmp_path / package).mkdir()  # such as W&B's own directory of offline runs
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadSpec, match=rf"spec\.telemetry\.{package}: the image has no python package {package}: use "
        r"an image that has it"):
        check(TelemetrySpec.model_validate(spec))


STUB_WANDB = '''
"""The part of wandb that the adapter uses, writing what it is given into a file."""
import json, os, pathlib
class api: api_key = os.environ.get("WANDB_API_KEY")
class Settings:
    def __init__(self, **fields): pass
class Run:
    def __init__(self, fields):
        self.file = pathlib.Path(fields["dir"]) / f"wandb-{fields['id']}.jsonl"
        self.write({k: fields[k] for k in ("project", "entity", "name", "mode", "resume")})
    def write(self, line):
        with self.file.open("a") as file: file.write(json.dumps(line) + "\\n")
    def define_metric(self, name, step_metric=None): self.write([name, step_metric])
    def log(self, values): self.write(values)
    def finish(self): self.write("finished")
def init(**fields): return Run(fields)
'''


@pytest.fixture
def stub_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(STUB_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.usefixtures("stub_wandb")
def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TelemetrySpec.model_validate({"wandb": {"project": "p"}})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(BadSpec, match=r"spec\.telemetry\.wandb\.mode: online needs a key: set WANDB_API_KEY in "
        r"pods\.trainer\.env"):
        check(spec)
    check(TelemetrySpec.model_validate({"wandb": {"project": "p", "mode": "offline"}}))
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    check(spec)


@pytest.mark.usefixtures("stub_wandb")
def test_two_lives_of_a_checkpoint_are_one_wandb_run_on_our_steps(tmp_path: Path) -> None:
    given = config(tmp_path, tensorboard=False, wandb={"project": "p", "mode": "offline"})
    log(given, {1: {"reward": 0.0}, 2: {"reward": 0.5}})
    log(given, {2: {"reward": 0.75}}, first_step=2)
    (file,) = tmp_path.glob("wandb-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[:3] == [
        {"project": "p", "entity": None, "name": "tiny", "mode": "offline", "resume": "allow"}, ["step", None],
        ["*", "step"]
    ]
    assert [
        (line["step"], line["reward"]) for line in lines if isinstance(line, dict) and "step" in line
    ] == [(1, 0.0), (2, 0.5), (2, 0.75)]
    assert lines[-1] == "finished"


REAL = """
import sys
from pathlib import Path
from tests.worker.test_telemetry import config, log
from rlhf_worker.feed.telemetry import check
directory, kind = Path(sys.argv[1]), sys.argv[2]
mlflow = {"trackingUri": sys.argv[3] if kind == "mlflow" else "", "experiment": "e"}
spec = {"wandb": {"project": "p", "mode": "offline"}} if kind == "wandb" else {"mlflow": mlflow}
given = config(directory, tensorboard=False, **spec)
check(given.telemetry)
one = log(given, {1: {"reward/mean": 0.0}, 2: {"reward/mean": 0.5}})
two = log(given, {2: {"reward/mean": 0.75}, 3: {"reward/mean": float("nan")}}, first_step=2)
print("failures", one.failures.counts.total() + two.failures.counts.total())
"""


def with_package(name: str, *arguments: str) -> str:
    """Run REAL with RLHF_TEST_<NAME>, a directory with the real package (uv pip install --target), on the path."""
    target = os.environ.get(f"RLHF_TEST_{name.upper()}", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["", str(Path(__file__).parents[2]), target])}
    done = subprocess.run(
        [sys.executable, "-c", REAL, *arguments], env=env, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "failures 0" in done.stdout, done.stderr
    return done.stdout


@pytest.mark.skipif(not os.environ.get("RLHF_TEST_WANDB"), reason="set RLHF_TEST_WANDB to a directory that holds the "
    "package wandb")
def test_the_real_wandb_writes_offline_runs(tmp_path: Path) -> None:
    with_package("wandb", str(tmp_path), "wandb")
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / "run-id").read_text()
    assert len(runs) == 2
    assert all(run.name.endswith(run_id) for run in runs)
    assert all(list(run.glob("*.wandb")) for run in runs)


@pytest.mark.skipif(not os.environ.get("RLHF_TEST_MLFLOW"), reason="set RLHF_TEST_MLFLOW to a directory that holds "
    "the package mlflow")
def test_the_real_mlflow_keeps_one_run_with_the_history_of_each_metric(tmp_path: Path) -> None:
    with_package("mlflow", str(tmp_path), "mlflow", f"sqlite:///{tmp_path}/mlflow.db")
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select name, status from runs").fetchall()
        rows = database.execute("select step, value, is_nan from metrics where key = 'reward/mean' order by "
            "timestamp, step").fetchall()
    assert runs == [("tiny", "FINISHED")]
    assert sorted(rows) == [(1, 0.0, 0), (2, 0.5, 0), (2, 0.75, 0), (3, 0.0, 1)]


def test_phases_add_up_also_when_they_raise() -> None:
    timer = PhaseTimer()
    with timer.phase("rollout"), timer.phase("wake"):
        pass
    once = timer.seconds["rollout"]
    with pytest.raises(RuntimeError), timer.phase("rollout"):
        raise RuntimeError
    assert timer.seconds.keys() == {"rollout", "wake"}
    assert timer.seconds["rollout"] > once >= timer.seconds["wake"] >= 0
