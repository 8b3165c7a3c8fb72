"""The page of a run, from files that the worker's own writers made: whole, spoilt, in parts, from a pod."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_cli.app import app
from rlhf_cli.exits import Exit
from rlhf_cli.report import facts, html
from rlhf_cli.run_files import ERROR, attempts, opened
from rlhf_operator.kinds import PODS
from tests.cli import run_dir
from tests.cli.conftest import RUNNING, Cli, Cluster


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_dir.make(tmp_path_factory.mktemp("runs") / "maths")


@pytest.fixture
def run_path(kept: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(kept, tmp_path / "maths"))


class Page(HTMLParser):
    """The texts of its scripts and styles, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.loaded: list[str] = []
        self._inside: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [str(given[name]) for name in ("src", "href") if name in given]
        self._inside = given if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.scripts.append((self._inside, data))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


def data_of(text: str) -> dict[str, Any]:
    (found,) = [data for given, data in Page(text).scripts if given.get("id") == "data"]
    parsed: dict[str, Any] = json.loads(found)
    return parsed


def test_the_page_is_one_file_that_loads_nothing(kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    result = CliRunner().invoke(app, ["report", str(kept), "--out", str(out)])
    assert (result.exit_code, result.stdout.strip()) == (0, str(out))
    text = out.read_text()
    page = Page(text)
    assert page.loaded == []
    assert len(page.scripts) == 3, "data, uPlot and the page: what samples hold ends no script"
    assert "default-src 'none'" in text
    assert "MIT License" in text
    assert "<title>maths</title>" in text
    shown = data_of(text)
    assert shown["steps"] == list(range(1, 41))
    assert shown["samples"][0]["prompt"] == "what is 0 </script> & 2?"


def test_everything_that_a_run_left_is_told(kept: Path) -> None:
    shown = facts(opened(kept), str(kept), None)
    deviation = dict(zip(shown["steps"], shown["series"]["reward/std"], strict=True))
    assert (deviation[20], deviation[21], deviation[30], deviation[40]) == (0.1, 0.2, 0.2, 0.2), "steps taken again"
    assert shown["series"]["train/loss"][1] is None, "not a number"
    assert [one["step"] for one in shown["histograms"]] == [10, 20, 30, 40]
    assert sum(shown["histograms"][0]["counts"]) == 16
    assert {one["step"] for one in shown["samples"]} == {10, 40}
    first = shown["samples"][0]
    assert (first["group"], first["group mean"], first["advantage"]) == ("0:0", 0.375, 0.5)
    assert first["logprobs"][:2] == [0, -0.1]
    assert [(one["number"], one["error"]) for one in shown["attempts"]] == [
        (1, "EnginesLost: 0 of 2 engines serve"), (2, ""),
    ]
    assert [(one["attempt"], one["resumed"][:7]) for one in shown["turns"]] == [(1, ""), (2, "step-20")]
    assert [(one["step"], one["attempt"]) for one in shown["checkpoints"]] == [(20, 1), (40, 2)]
    assert "model_type: qwen3" in shown["model"]
    assert shown["unread"] == []


def test_what_is_spoilt_costs_itself_and_is_named(run_path: Path) -> None:
    run_dir.spoil(run_path)
    shown = facts(opened(run_path), "run", None)
    assert shown["steps"][-1] == 40
    assert [one["step"] for one in shown["histograms"]] == [20, 30, 40]
    assert [one["number"] for one in shown["attempts"]] == [1, 2]
    assert "caf\ufffd" in shown["attempts"][1]["log"]
    assert [one["step"] for one in shown["checkpoints"]] == [20, 40]
    assert sorted(one.partition(":")[0] for one in shown["unread"]) == [
        "fence/00000003.json", "rollouts/step-10.parquet", "step-8.attempt-1-00000000/run.json",
    ]
    json.dumps(shown, allow_nan=False)


@pytest.mark.parametrize("part", ["tensorboard", "rollouts", "logs", "fence"])
def test_a_part_alone_is_enough(kept: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(kept / part, tmp_path / part)
    assert data_of(html(opened(tmp_path), "run", None))["unread"] == []
    (tmp_path / "tensorboard").mkdir(exist_ok=True)
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host.2.0").write_bytes(b"\x00" * 100)
    data_of(html(opened(tmp_path), "run", None))


@pytest.mark.parametrize(
    ("where", "told"),
    [("{}/absent", "no such directory"), ("{}", "no files of a run"), ("./absent", "no such directory"),
        ("nosuch://bucket/run", "nosuch"), ("memory://absent/run", "FileNotFoundError")],
)  # fmt: skip
def test_where_no_run_is(tmp_path: Path, where: str, told: str) -> None:
    result = CliRunner().invoke(app, ["report", where.format(tmp_path)])
    assert (result.exit_code, told in result.stderr) == (Exit.FILES, True), result.stderr


def test_a_page_that_cannot_be_written(kept: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(kept), "--out", "/nowhere/run.html"])
    assert (result.exit_code, "--out /nowhere/run.html" in result.stderr) == (Exit.USAGE, True)


def test_a_long_run_stays_below_5_mb(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps of 60 metrics, a hundred attempts with long logs, and many samples of long texts."""
    series = {f"metric/{at}": {step: at + step / 997 for step in range(1000)} for at in range(60)}
    monkeypatch.setattr("rlhf_cli.report.scalars", lambda run: series)
    monkeypatch.setattr("rlhf_cli.report.attempts", lambda run: [attempts(run)[0]] * 5)
    (run_path / "logs" / "attempt-1" / "00001.log").write_text("x" * 1_000_000)
    items = run_dir.scored(50, prompts=64, size=8, tokens=600)
    from rlhf_worker.feed import replay
    from rlhf_worker.storage import Store

    replay.write(Store(str(run_path)), 50, items)
    text = html(opened(run_path), "run", None)
    assert len(text.encode()) < 5_000_000
    shown = data_of(text)
    assert "more are in its files" in shown["samplesNote"]
    assert "characters are left out here" in shown["attempts"][0]["log"]


def test_a_url_is_fetched(kept: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(kept), "/bucket/maths", recursive=True)
    result = CliRunner().invoke(app, ["logs", "memory://bucket/maths", "--attempt", "2", "--tail", "1"])
    assert (result.exit_code, result.stdout) == (0, "exported the model\n"), result.stderr


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that runs `exec` here, as the pod would, and writes down what it was asked."""
    path = tmp_path / "bin" / "kubectl"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\necho "$@" >> "$0.asked"\nwhile [ "$1" != "--" ]; do shift; done; shift; exec "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return path


def test_by_name_the_files_come_from_a_trainer_pod(
    kept: Path, cluster: Cluster, cli: Cli, kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster.job(status=RUNNING, checkpoint__path=str(kept))
    none = cli("report", "maths")
    assert (none.exit_code, "has no trainer pod now" in none.stderr) == (Exit.FILES, True)
    labels = {"rlhf.dev/job": "maths", "rlhf.dev/role": "trainer"}
    cluster.server.put(PODS, {"metadata": {"name": "maths-t", "labels": labels}, "status": {"phase": "Running"}})
    assert cli("report", "maths").stdout == "maths.html\n"
    shown = data_of((tmp_path / "maths.html").read_text())
    assert shown["steps"][-1] == 40
    assert "path: some/model" in shown["configuration"]
    assert shown["failures"][0]["words"].startswith("ValueError: no answer")
    assert "--namespace default exec maths-t -c ray" in kubectl.with_suffix(".asked").read_text()
    kubectl.write_text("#!/bin/sh\necho forbidden >&2; exit 1\n")
    refused = cli("report", "maths")
    assert refused.exit_code == Exit.FILES
    assert "forbidden (this needs the right to create pods/exec)" in refused.stderr
    kubectl.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "kubectl is not on the PATH" in cli("report", "maths").stderr


def test_logs_of_an_earlier_attempt(kept: Path) -> None:
    shown = CliRunner().invoke(app, ["logs", str(kept), "--attempt", "1", "--tail", "1"])
    assert shown.stdout == "EnginesLost: 0 of 2 engines serve\n"
    missing = CliRunner().invoke(app, ["logs", str(kept), "--attempt", "7"])
    assert (missing.exit_code, "only of 1, 2" in missing.stderr) == (Exit.FILES, True)


def test_the_workers_errors_are_seen_in_a_log() -> None:
    """Every class of error that ends a driver."""
    from rlhf_worker import errors

    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert ERROR.search(f"x\n{name}: why\n"), name
            assert ERROR.search(f"rlhf_worker.errors.{name}: why"), name
    assert not ERROR.search("step 3/4  reward 0.1")


def test_two_jobs_are_compared_with_their_specs(kept: Path, cluster: Cluster, cli: Cli, kubectl: Path) -> None:
    assert kubectl.exists()
    for name, steps in (("one", 40), ("two", 50)):
        cluster.job(name, status=RUNNING, checkpoint__path=str(kept), trainer__steps=steps)
        labels = {"rlhf.dev/job": name, "rlhf.dev/role": "trainer"}
        cluster.server.put(PODS, {"metadata": {"name": f"{name}-t", "labels": labels}, "status": {"phase": "Running"}})
    told = cli("compare", "one", "two")
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[-1].split() == ["spec.trainer.steps", "40", "50"]
