"""samples, compare and bundle: what they show, and what they must not."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rlhf_cli import redact
from rlhf_cli.app import app
from rlhf_cli.compare import spec_differences
from rlhf_cli.exits import Exit
from rlhf_operator.kinds import JOBS, PODS
from tests.cli import run_dir
from tests.cli.conftest import RUNNING, Cli, Cluster


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_dir.make(tmp_path_factory.mktemp("runs") / "maths", steps=8, every=2)


def asked(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_samples_of_the_newest_step_or_another(kept: Path) -> None:
    first = asked("samples", kept, "--limit", "2").stdout
    assert first.startswith("step 8: 16 samples of 4 prompts, reward 0.375 ± 0.280 (0.000 to 0.750)\n")
    assert "── sample 0, group 0:0: reward 0.000 (exact 0.000), advantage +0.500; 8 tokens, stop, weights 7" in first
    assert "prompt  what is 0 </script> & 2?" in first
    assert "14 more: --limit" in first
    best = json.loads(asked("samples", kept, "--step", "4", "--sort", "reward", "--limit", "1", "-o", "json").stdout)
    assert [(row["step"], row["sample"], row["parts"]) for row in best] == [(4, 3, {"exact": 0.75})]
    worst = json.loads(asked("samples", kept, "--sort", "-reward", "--limit", "1", "-o", "json").stdout)
    assert worst[0]["reward"] == 0
    assert asked("samples", kept / "rollouts", "--limit", "2").stdout == first


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--step", "5"], Exit.FILES, "no samples of step 5, only of 2, 4, 6, 8"),
        (["--sort", "rewrad"], Exit.USAGE, "did you mean reward?"),
        (["--limit", "0"], Exit.USAGE, "--limit"),
    ],
)
def test_samples_that_are_not_there(kept: Path, words: list[str], code: Exit, told: str) -> None:
    result = asked("samples", kept, *words)
    assert (result.exit_code, told in result.stderr) == (code, True), result.output


def test_a_run_without_samples(tmp_path: Path) -> None:
    assert "telemetry.rolloutsEverySteps" in asked("samples", tmp_path).stderr
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-1.parquet").write_bytes(b"PAR1")
    torn = asked("samples", tmp_path)
    assert (torn.exit_code, "step-1.parquet: no samples of a step" in torn.stderr) == (Exit.FILES, True)


def test_two_runs_side_by_side(kept: Path, tmp_path: Path) -> None:
    other = run_dir.make(tmp_path / "other", steps=4, every=2)
    told = asked("compare", kept, other).stdout.splitlines()
    assert told[1].split() == ["steps", "8", "4"]
    (reward,) = [line for line in told if line.startswith("reward/mean")]
    assert reward.split()[1:4] == ["0.2341", "0.1248", "-0.1092"]
    facts = json.loads(asked("compare", kept, other, "-o", "json").stdout)
    assert facts["metrics"]["train/loss"] == [pytest.approx(0.1), pytest.approx(0.1)]
    assert facts["spec"] is None
    (tmp_path / "empty" / "tensorboard").mkdir(parents=True)
    none = asked("compare", kept, tmp_path / "empty")
    assert (none.exit_code, "telemetry.tensorboard is false" in none.stderr) == (Exit.FILES, True)


def test_where_two_specs_differ() -> None:
    a = {"trainer": {"steps": 1, "gpus": 2}, "rewards": [1]}
    b = {"trainer": {"steps": 1, "gpus": 4}, "rewards": [1], "queue": {"name": "q"}}
    assert spec_differences(a, b) == [("spec.trainer.gpus", "2", "4"), ("spec.queue", "–", '{"name": "q"}')]


SECRETS = [
    "hf_abcdefghijklmnopqrstuv", "sk-proj-abcdefghijklmnop", "ghp_abcdefghijklmnopqrstuvwxyz", "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdef", "hunter22",
]  # fmt: skip


def test_a_bundle_has_what_helps_and_no_secret(cluster: Cluster, cli: Cli, tmp_path: Path) -> None:
    env = [{"name": "ANYTHING", "value": "hunter22"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
    raw = cluster.job(status=RUNNING, pods={"trainer": {"env": env}})
    raw["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(raw["spec"])}
    cluster.server.put(JOBS, raw)
    labels = {"rlhf.dev/job": "maths", "rlhf.dev/role": "head"}
    containers = [{"name": "driver", "env": env}, {"name": "ray"}]
    cluster.server.put(PODS, {"metadata": {"name": "maths-head", "labels": labels}, "spec": {"containers": containers}})
    log = "\n".join(f"a line with {secret} in it" for secret in SECRETS[:-1])
    urls = "\npostgres://user:hunter22@host/db password=hunter22 Authorization: Bearer hunter22hunter22\n" \
        "step 3, 12 tokens: 7"
    cluster.server.logs["maths-head", "driver"] = log + urls
    out = tmp_path / "b.tar.gz"
    result = cli("bundle", "maths", "--out", str(out))
    assert (result.exit_code, result.stdout) == (0, f"{out}\n"), result.output
    with tarfile.open(out) as archive:
        files = {member.name.removeprefix("maths-bundle/"): _read(archive, member) for member in archive}
    whole = "\n".join(files.values())
    assert [secret for secret in SECRETS if secret in whole] == []
    assert {"job.json", "pods.json", "events.json", "missing.txt", "logs/maths-head.driver.log"} <= set(files)
    assert "logs/maths-head.ray.log: " in files["missing.txt"]
    assert '"key": "token"' in files["job.json"], "where a secret is kept is no secret"
    assert json.loads(files["job.json"])["status"] == RUNNING
    assert "step 3, 12 tokens: 7" in files["logs/maths-head.driver.log"]
    assert cli("bundle", "maths", "--out", "/nowhere/b").exit_code == Exit.USAGE
    assert cli("bundle", "math").exit_code == Exit.NOT_FOUND


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    found = archive.extractfile(member) or io.BytesIO()
    return found.read().decode()


@pytest.mark.parametrize(
    "harmless",
    ["max_tokens: 512", "tokens 1973", "rollout/tokens_per_second=5", "ValueError: no token left", "step 3: 12 tokens",
        "http://mlflow:5000/x", "token_ids=[1, 2]"],
)  # fmt: skip
def test_what_is_no_secret_stays(harmless: str) -> None:
    assert redact.text(harmless) == harmless


def test_a_key_that_names_a_secret_hides_its_value() -> None:
    given = {"apiKey": "x", "judge": {"api_key": "y"}, "maxTokens": 5, "tokenizer": "z", "empty": {"password": ""}}
    hidden = redact.HIDDEN
    assert redact.value(given) == {"apiKey": hidden, "judge": {"api_key": hidden}, "maxTokens": 5, "tokenizer": "z",
        "empty": {"password": ""}}
