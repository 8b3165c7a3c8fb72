"""The verbs that ask a cluster, from the command line to the API server, and what they say when something is wrong."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf_cli.app import app
from rlhf_cli.exits import CODES, Exit
from rlhf_cli.history import Step, of_source, steps
from rlhf_cli.placement import bar, drawn
from rlhf_cli.text import age, in_words, short, sparkline, table
from rlhf_client.job import Job
from rlhf_operator.kinds import CONFIG_MAPS, JOBS
from tests.api.specs import a_job
from tests.cli.conftest import RUNNING, Cli, Cluster

NOW = datetime(2026, 11, 29, 11, tzinfo=UTC)
LOG = """\
Starting: looking for a checkpoint
(Engine pid=77, ip=10.0.0.2) INFO: serving
step 1/10  reward 0.020  1020 tok/s  version 1  mismatch 0.007  loss 0.1  1.50 s (generate 1.00 train 0.5)  eta 9s
(Policy pid=78) compiled 3 graphs
step 2/10  reward 0.210  1500 tok/s  version 2  mismatch 0.007  loss 0.1  1.20 s (generate 1.00 train 0.2)  eta 8s
step 2/10  reward 0.250  1520 tok/s  version 2  mismatch None    1.20 s (generate 1.00 train 0.2)  eta 8s
"""


def test_list_is_a_table_for_people_and_json_for_programs(cluster: Cluster, cli: Cli) -> None:
    assert (cli("list").exit_code, cli("list").stdout) == (0, "")
    assert "no RLHFJobs in namespace default" in cli("list").stderr
    cluster.job(status=RUNNING)
    cluster.job("new")
    first, *rows = cli("list").stdout.splitlines()
    assert first.split() == ["NAME", "PHASE", "STEP", "REWARD", "ETA", "REASON", "TOK/S", "GPUS", "RESTARTS", "AGE",
        "QUEUE"]
    assert rows[0].split()[:7] == ["maths", "Running", "3/10", "0.446", "23s", "StepAdvancing", "1973"]
    assert rows[1].split()[:2] == ["new", "-"]
    assert cli("list", "-A").stdout.splitlines()[1].startswith("default ")
    assert [raw["metadata"]["name"] for raw in json.loads(cli("list", "-o", "json").stdout)] == ["maths", "new"]


def test_status_tells_all_of_one_job(cluster: Cluster, cli: Cli) -> None:
    cluster.job(status=RUNNING)
    cluster.head("maths", LOG)
    told = cli("status", "maths").stdout
    for part in (
        "maths  Running (StepAdvancing)", "step 3/10", "30%  eta 23s", "reward 0.446", "▁█  0.02 … 0.25",
        "trainer: 1 pod of 1 GPU (nvidia.com/gpu)", "███████████▒▒▒▒▒▒▒▒▒  trainer 0 0.90  engine 0 0.78 (in turns)",
        "– CheckpointAvailable", "Ephemeral: they die with the pod", "last failure (restarts: 1 app)", "exit code 1",
        "ValueError: no answer [/data/a.jsonl]", "  File x, line 3", "what to do", "spec.checkpoint.claim",
    ):
        assert part in told, part
    assert "\x1b" not in told, "piped: no colours"
    assert "\n\nplacement\n  trainer: 1 pod" in told
    assert [line for line in told.splitlines() if line != line.rstrip()] == []
    assert json.loads(cli("status", "maths", "-o", "json").stdout)["status"] == RUNNING


def test_status_needs_no_right_but_to_read_the_job(cluster: Cluster, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.job(status=RUNNING)
    monkeypatch.setattr("rlhf_client.client.Client.pods", _forbidden)
    assert "step 3/10" in cli("status", "maths").stdout


async def _forbidden(*_: object) -> None:
    from rlhf_client import NotAllowed

    raise NotAllowed("user cannot list pods")


def test_a_job_that_no_operator_sees(cluster: Cluster, cli: Cli) -> None:
    cluster.job()
    told = cli("status", "maths").stdout
    assert "not seen by an operator" in told
    assert "kubectl -n rlhf-system get pods" in told


def test_a_newer_operator(cluster: Cluster, cli: Cli) -> None:
    cluster.job(status=RUNNING | {"phase": "Hibernating"}, novel={"field": 1})
    told = cli("status", "maths").stdout
    assert "maths  Hibernating" in told
    assert "written by a newer operator" in told
    assert "trainer: 1 pod" in told, "the placement needs no field that this client lacks"


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_run_follows_to_the_end_and_ends_as_the_job_does(
    cluster: Cluster, cli: Cli, tmp_path: Path, phase: str,
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(a_job("maths")))
    done = threading.Thread(target=_end, args=(cluster, phase))
    done.start()
    result = cli("run", "-f", str(path))
    done.join()
    assert result.exit_code == (Exit.OK if phase == "Succeeded" else Exit.FAILED)
    assert "rlhfjob/maths made in namespace default" in result.stderr
    assert f"{phase}  " in result.stdout
    if phase == "Failed":
        assert "ValueError: no answer" in result.stderr
        assert "InvalidData: correct the file and line" in result.stderr
    again = cli("run", "-f", str(path))
    assert "is there already, and the same" in again.stderr
    assert again.exit_code == result.exit_code
    path.write_text(yaml.safe_dump(a_job("maths", trainer__steps=11)))
    other = cli("run", "-f", str(path))
    assert (other.exit_code, "with another spec.trainer.steps" in other.stderr) == (Exit.USAGE, True)


def _end(cluster: Cluster, phase: str) -> None:
    cluster.until_watched()
    raw = cluster.server.of(JOBS)[0]
    cluster.server.put(JOBS, raw | {"status": RUNNING | {"phase": phase, "reason": "InvalidData"}})


def test_run_leaves_a_job_that_takes_too_long(cluster: Cluster, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(a_job("maths")))
    result = cli("run", "-f", str(path), "--timeout", "0.3")
    assert (result.exit_code, "it goes on: kubectl rlhf watch maths" in result.stderr) == (Exit.TIMED_OUT, True)


def test_files_of_a_user_go_with_the_job(cluster: Cluster, cli: Cli, tmp_path: Path) -> None:
    path, data, weights = tmp_path / "job.yaml", tmp_path / "train.jsonl", tmp_path / "w.bin"
    path.write_text(yaml.safe_dump(a_job("maths", data__jsonl={"path": "/files/train.jsonl"})))
    data.write_text("{}")
    weights.write_bytes(b"\xff\x00")
    words = ["run", "-f", str(path), "--timeout", "0.2"]
    assert "give --with train.jsonl" in cli(*words).stderr
    words += ["--with", str(data), "--with", str(weights)]
    assert cli(*words).exit_code == Exit.TIMED_OUT
    (made,), (job,) = cluster.server.of(CONFIG_MAPS), cluster.server.of(JOBS)
    assert (made["data"], made["binaryData"]) == ({"train.jsonl": "{}"}, {"w.bin": "/wA="})
    assert (made["metadata"]["name"], made["metadata"]["ownerReferences"][0]["uid"]) == (
        "maths-files", job["metadata"]["uid"],
    )
    for role in ("head", "trainer"):
        assert job["spec"]["pods"][role]["volumes"] == [{"name": "files", "configMap": {"name": "maths-files"}}]
        assert job["spec"]["pods"][role]["volumeMounts"][0]["mountPath"] == "/files"
    assert "the same" in cli(*words).stderr
    data.write_text("{}\n{}")
    other = cli(*words)
    assert (other.exit_code, "holds something else" in other.stderr) == (Exit.USAGE, True), other.output


def test_files_of_a_former_job_are_replaced_and_those_of_others_are_not(
    cluster: Cluster, cli: Cli, tmp_path: Path,
) -> None:
    path, data = tmp_path / "job.yaml", tmp_path / "train.jsonl"
    path.write_text(yaml.safe_dump(a_job("maths")))
    data.write_text("new")
    words = ["run", "-f", str(path), "--with", str(data), "--timeout", "0.2"]
    foreign: dict[str, Any] = {"metadata": {"name": "maths-files"}, "data": {"train.jsonl": "old"}}
    cluster.server.put(CONFIG_MAPS, foreign)
    refused = cli(*words)
    assert (refused.exit_code, "another metadata.name" in refused.stderr) == (Exit.USAGE, True), refused.output
    assert not cluster.server.of(JOBS), "its pods would wait for the files for ever"
    foreign["metadata"] |= {"labels": {"rlhf.dev/job": "maths"}, "ownerReferences": [{"uid": "the one before"}]}
    cluster.server.put(CONFIG_MAPS, foreign)
    assert cli(*words).exit_code == Exit.TIMED_OUT
    assert cluster.server.of(CONFIG_MAPS)[0]["data"] == {"train.jsonl": "new"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["tran.jsonl"], "did you mean"),
        (["train.jsonl", "sub/train.jsonl"], "two files are called train.jsonl"),
        (["a b.jsonl"], "letters, digits"),
        (["big.jsonl"], "a ConfigMap holds 1"),
    ],
)
def test_files_that_cannot_go_along(cluster: Cluster, cli: Cli, tmp_path: Path, names: list[str], told: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("train.jsonl", "sub/train.jsonl", "a b.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "big.jsonl").write_bytes(b"x" * (1 << 20 | 1))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(a_job("maths")))
    options = [word for name in names for word in ("--with", str(tmp_path / name))]
    result = cli("run", "-f", str(tmp_path / "job.yaml"), *options)
    assert (result.exit_code, told in result.stderr) == (Exit.USAGE, True), result.output
    assert not cluster.server.of(JOBS)


def test_an_interrupt_leaves_the_job(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(a_job("maths")))
    process = started(cluster, "run", "-f", str(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    cluster.until_watched()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, "maths goes on: kubectl rlhf watch maths" in told.decode()) == (Exit.INTERRUPTED, True)


def test_who_may_not_is_told_so(cluster: Cluster, cli: Cli) -> None:
    for code, exit_code in ((403, Exit.NOT_ALLOWED), (401, Exit.NOT_ALLOWED), (500, Exit.NO_CONNECTION)):
        cluster.server.answers["GET"] = [(code, {})]
        assert cli("list").exit_code == exit_code


def test_kuberay_that_is_missing(cluster: Cluster, cli: Cli) -> None:
    missing = {"type": "Accepted", "status": "Unknown", "reason": "KubeRayNotInstalled", "message": "no RayCluster",
        "lastTransitionTime": "2026-11-29T10:00:00Z"}
    cluster.job(status={"phase": "Pending", "reason": "KubeRayNotInstalled", "conditions": [missing]})
    assert "KubeRayNotInstalled: install KubeRay 1.6 or newer" in cli("status", "maths").stdout


def test_watch_prints_a_line_a_change(cluster: Cluster, cli: Cli) -> None:
    cluster.job(status=RUNNING | {"phase": "Succeeded", "reason": "JobSucceeded"})
    assert cli("watch", "maths").stdout == "Succeeded  JobSucceeded  3/10\n"
    assert json.loads(cli("watch", "maths", "-o", "json").stdout)["metadata"]["name"] == "maths"


def test_logs_of_the_driver_and_of_those_who_print_through_it(cluster: Cluster, cli: Cli) -> None:
    cluster.job()
    cluster.head("maths", LOG)
    cluster.server.logs["maths-head", "ray"] = "ray is up\n"
    assert cli("logs", "maths", "--tail", "1").stdout.startswith("step 2/10  reward 0.250")
    assert cli("logs", "maths", "--of", "engines").stdout == "(Engine pid=77, ip=10.0.0.2) INFO: serving\n"
    assert cli("logs", "maths", "--of", "trainer").stdout == "(Policy pid=78) compiled 3 graphs\n"
    assert cli("logs", "maths", "--pod", "maths-head").stdout == "ray is up\n"
    assert "did you mean maths-head?" in cli("logs", "maths", "--pod", "maths-haed").stderr
    assert "nothing from feed" in cli("logs", "maths", "--of", "feed").stderr
    wrong = cli("logs", "maths", "--of", "engine")
    assert (wrong.exit_code, "did you mean engines?" in wrong.stderr) == (Exit.USAGE, True)


def test_suspend_resume_and_stop(cluster: Cluster, cli: Cli) -> None:
    cluster.job()
    assert cli("suspend", "maths").exit_code == 0
    assert cluster.server.of(JOBS)[0]["spec"]["suspend"] is True
    assert cli("resume", "maths").exit_code == 0
    assert cluster.server.of(JOBS)[0]["spec"]["suspend"] is False
    asked = cli("stop", "maths")
    assert (asked.exit_code, "give --yes" in asked.stderr) == (Exit.USAGE, True)
    assert cli("stop", "maths", "--yes").exit_code == 0
    assert not cluster.server.of(JOBS)
    assert cli("stop", "maths", "--yes").exit_code == Exit.NOT_FOUND


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["status", "math"], Exit.NOT_FOUND, "did you mean maths?"),
        (["stauts", "maths"], Exit.USAGE, "Did you mean 'status'?"),
        (["status", "maths", "--ouput", "json"], Exit.USAGE, "--output"),
        (["status", "maths", "-o", "jsn"], Exit.USAGE, "'json'"),
        (["status"], Exit.USAGE, "Missing argument"),
        (["run", "-f", "absent.yaml"], Exit.USAGE, "absent.yaml: No such file"),
        (["status", "maths", "--context", "d"], Exit.NO_CONNECTION, "no context 'd'"),
        (["status", "maths", "--kubeconfig", "/absent"], Exit.NO_CONNECTION, "/absent is not there"),
        (["logs", "maths", "--attempt", "1", "-f"], Exit.USAGE, "leave out --follow"),
    ],
)
def test_what_a_user_gets_wrong(cluster: Cluster, cli: Cli, words: list[str], code: Exit, told: str) -> None:
    cluster.job()
    result = cli(*words)
    assert result.exit_code == code, result.output
    assert told in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not YAML"),
        ("kind: Pod\n", "holds 0 RLHFJobs, one is needed; it has Pod"),
        ("just text", "it has text"),
        ("", "it has nothing"),
        (yaml.safe_dump_all([a_job("a"), a_job("b")]), "holds 2 RLHFJobs"),
        (yaml.safe_dump(a_job("a", trainer__stpes=3)),
            "spec.trainer.stpes: unknown field: remove it or correct its name (did you mean steps?)"),
        (yaml.safe_dump(a_job("a", placement__mode="colocated")), "(did you mean Colocated?)"),
        (yaml.safe_dump(a_job("a", trainer__steps="many")), "spec.trainer.steps"),
        (yaml.safe_dump(a_job("a", rewards=[{"name": "x", "type": "pyhton"}])), "(did you mean python?)"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong(cli: Cli, tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    result = cli("run", "-f", str(path))
    assert result.exit_code == Exit.USAGE
    assert told in result.stderr


def test_a_misspelt_file_is_pointed_to(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("")
    assert f"did you mean {tmp_path}/job.yaml?" in cli("run", "-f", str(tmp_path / "jbo.yaml")).stderr


def test_a_namespace_that_contradicts_the_manifest(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(a_job("a")))
    assert "metadata.namespace is default, --namespace x" in cli(
        "run", "-f", str(tmp_path / "job.yaml"), "-n", "x",
    ).stderr


def test_the_cluster_has_other_rlhfjobs(cluster: Cluster, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(a_job("a")))
    cluster.server.absent.add(JOBS.plural)
    for words in (["list"], ["status", "maths"], ["run", "-f", str(tmp_path / "job.yaml")]):
        result = cli(*words)
        assert (result.exit_code, "helm install" in result.stderr) == (Exit.OTHER_VERSION, True), result.output


# a terminal


def started(
    cluster: Cluster, *words: str, stdout: int, stderr: int, **environment: str,
) -> subprocess.Popen[bytes]:
    given = {**os.environ, "KUBECONFIG": cluster.kubeconfig, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.Popen([sys.executable, "-m", "rlhf_cli", *words], stdout=stdout, stderr=stderr, env=given)


def on_a_terminal(cluster: Cluster, columns: int, *words: str, **environment: str) -> tuple[str, int]:
    """What a terminal of so many columns gets, and the exit code."""
    ours, theirs = pty.openpty()
    given = {"COLUMNS": str(columns), "TERM": "xterm-256color", **environment}
    process = started(cluster, *words, stdout=theirs, stderr=theirs, **given)
    os.close(theirs)
    text = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            text += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    return text.decode(), process.wait(60)


def test_sixty_columns_are_enough(cluster: Cluster) -> None:
    for name in ("maths", "a-job-of-quite-a-long-name-indeed"):
        cluster.job(name, status=RUNNING | {"phase": "Failed", "reason": "BackoffLimitExceeded"})
    text, code = on_a_terminal(cluster, 60, "list", NO_COLOR="1")
    assert code == 0
    lines = text.replace("\r", "").splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 60
    assert lines[0].split()[:3] == ["NAME", "PHASE", "STEP"]
    assert "\x1b[3" not in text
    shown, code = on_a_terminal(cluster, 60, "status", "maths")
    assert code == 0
    assert "\x1b[" in shown, "colours, where nobody forbids them"
    watched, code = on_a_terminal(cluster, 60, "watch", "maths", NO_COLOR="1")
    assert code == 0
    assert "Failed (BackoffLimitExceeded)" in watched


def test_nothing_heavy_is_imported_to_list(cluster: Cluster) -> None:
    """What makes a command line slow: a quarter of a second or more each."""
    cluster.job(status=RUNNING)
    script = ("import sys; from typer.testing import CliRunner; from rlhf_cli.app import app; "
        "r = CliRunner().invoke(app, ['list']); assert 'maths' in r.stdout; print(*sorted(sys.modules))")
    given = {**os.environ, "KUBECONFIG": cluster.kubeconfig, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=True)
    heavy = {"kubernetes", "torch", "ray", "numpy", "pyarrow", "tensorboard", "fsspec", "rlhf_worker", "rlhf_operator",
        "rlhf_api.job"}
    assert not heavy & set(done.stdout.split())


def test_the_page_of_docs_has_every_verb_exit_code_and_error() -> None:
    page = Path("docs/cli.md").read_text()
    verbs = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    assert [verb for verb in verbs if f"`{verb}" not in page] == []
    assert [int(code) for code in Exit if f"| {int(code)} | " not in page] == []
    assert [kind.__name__ for kind in CODES if f"`{kind.__name__}`" not in page] == []


def test_help_has_an_example_for_each_verb() -> None:
    assert "Exit codes" in CliRunner().invoke(app, ["--help"]).stdout
    for command in app.registered_commands:
        assert "kubectl rlhf" in (command.epilog or ""), command.callback


def test_kubectl_completes_verbs_options_and_jobs(
    cluster: Cluster, cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:
    from rlhf_cli.completion import process

    cluster.job()
    for words, told in ((["sta"], "status"), (["status", "mat"], "maths"), (["status", "--out"], "--output")):
        monkeypatch.setattr("sys.argv", ["kubectl_complete-rlhf", *words])
        for name in ("_KUBECTL_RLHF_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            monkeypatch.setenv(name, "")  # so that it is taken away again
        process()
        assert capfd.readouterr().out.split() == [told, ":4"]
    monkeypatch.setenv("KUBECONFIG", "/absent")
    monkeypatch.setattr("sys.argv", ["kubectl_complete-rlhf", "status", ""])
    process()
    assert capfd.readouterr().out.split() == [":4"], "a shell is no place for an error"


# pure


def test_the_drivers_own_lines_are_the_curves() -> None:
    """Held against the worker's printer."""
    from rlhf_api.progress import Progress
    from rlhf_worker.progress import line

    progress = Progress(display="3/10", reward="0.446", tokens_per_second="1973", mismatch="0.007", eta="23s")
    seconds = {f"seconds/{name}": 0.5 for name in ("generate", "score", "train", "sync", "step")}
    (found,) = steps([line(progress, {**seconds, "train/loss": 0.1})])
    assert found == Step(3, 10, 0.446, 1973, 0.5)
    assert [(one.number, one.reward) for one in steps(LOG.splitlines())] == [(1, 0.02), (2, 0.25)], "the later counts"
    assert steps(["step 1/10  reward nothing  1 tok/s  0.50 s ("]) == []


def test_actors_print_under_their_classes() -> None:
    """Held against the worker's actors, by whose class Ray prefixes what they print."""
    from rlhf_worker.engines.engine import Engine
    from rlhf_worker.feed.feed import Feed
    from rlhf_worker.trainer.policy import Policy

    for source, kind in (("engines", Engine), ("trainer", Policy), ("feed", Feed)):
        assert list(of_source([f"\x1b[36m({kind.__name__} pid=1)\x1b[0m x"], source))
        assert not list(of_source([f"({kind.__name__} pid=1) x"], "driver"))


def test_a_gpu_is_drawn_with_its_shares() -> None:
    from rlhf_api.parse import parse_job
    from rlhf_api.placement import plan_placement

    separated = parse_job(a_job(placement__mode="Separated", rollout={"engines": 2, "tensorParallelSize": 2}))
    lines = list(drawn(plan_placement(separated.spec)))
    assert lines[0] == "trainer: 1 pod of 1 GPU (nvidia.com/gpu)"
    assert lines[2] == "rollout: 1 pod of 4 GPUs (nvidia.com/gpu)"
    assert lines[3] == f"  gpu 1   {'▒' * 20}  engine 0.0 1.00"
    many = parse_job(a_job(trainer__gpus=64, rollout__engines=64, checkpoint__path="s3://b/r"))
    assert list(drawn(plan_placement(many.spec)))[-1] == "  … and 48 more alike"
    assert bar({"trainer 0": 0.9, "engine 0": 0.9}) == "█" * 10 + "▒" * 10, "never wider than a GPU"


def test_numbers_as_text() -> None:
    assert [in_words(s) for s in (-1, 59.9, 75, 5400, 200000)] == ["0s", "59s", "1m15s", "1h30m", "2d7h"]
    assert [age(stamp, NOW) for stamp in ("2026-11-29T10:00:00Z", None, "nonsense")] == ["1h00m", "", ""]
    assert [short(one) for one in (1973.4, 0.02, 0.4464, -1234.0, 1e9)] == ["1973", "0.02", "0.446", "-1234", "1e+09"]
    assert sparkline([0, 1, 2], 10) == "▁▅█"
    assert sparkline([1, 1, 1], 10) == "▅▅▅"
    assert sparkline([float("nan"), 0, 1, float("inf")], 10) == " ▁█ "
    assert sparkline([], 10) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40


def test_columns_go_where_there_is_no_room() -> None:
    rows = [("a", "b" * 10, "c" * 10)]
    assert table(("A", "B", "C"), rows, 100, ["A"])[0].split() == ["A", "B", "C"]
    assert table(("A", "B", "C"), rows, 20, ["A"])[0].split() == ["A", "B"]
    assert table(("A", "B", "C"), rows, 3, ["A"])[0].split() == ["A"]


def test_markup_in_what_others_wrote_is_text(cluster: Cluster, cli: Cli) -> None:
    cluster.job(status=RUNNING | {"message": "see [/red] and [bold]this"})
    assert "see [/red] and [bold]this" in cli("status", "maths").stdout
    assert Job.of(cluster.server.of(JOBS)[0]).status.message
