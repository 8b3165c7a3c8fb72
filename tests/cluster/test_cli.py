"""`kubectl rlhf` on the real API server: a user's rights, an unknown field, a finished job and the files it left."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from hack.cluster import settings
from hack.kubectl import Kube
from rlhf_cli.app import app
from rlhf_cli.exits import Exit
from tests.api.specs import a_job
from tests.cluster.jobs import CLONE, Undisturbed, status

pytestmark = pytest.mark.cluster


def ran(*words: str | Path, kubeconfig: Path | None = None) -> Result:
    config = kubeconfig or settings.from_environment().kubeconfig
    return CliRunner().invoke(app, [*map(str, words)], env={"KUBECONFIG": str(config)})


@pytest.fixture
def viewer(operator: Kube, namespace: str, tmp_path: Path) -> Path:
    """Kubeconfig of a user who may read RLHFJobs in this namespace, and no more."""
    operator.run("create", "rolebinding", "viewer", "-n", namespace, "--user=viewer",
        "--clusterrole=rlhf-system-rlhf-operator-view")
    config = yaml.safe_load(settings.from_environment().kubeconfig.read_text())
    config["users"][0]["user"]["as"] = "viewer"
    path = tmp_path / "viewer"
    path.write_text(yaml.safe_dump(config))
    return path


def test_reading_needs_the_right_to_read_alone(operator: Kube, namespace: str, viewer: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(a_job("maths", suspend=True) | {"metadata": {"name": "maths"}}))
    made = ran("run", "-f", manifest, "-n", namespace, "--timeout", "1")
    assert made.exit_code == Exit.TIMED_OUT, made.output
    assert "maths" in ran("list", "-n", namespace, kubeconfig=viewer).stdout
    shown = ran("status", "maths", "-n", namespace, kubeconfig=viewer)
    assert (shown.exit_code, "maths" in shown.stdout) == (0, True), shown.output
    for verb in (["resume", "maths"], ["stop", "maths", "--yes"]):
        refused = ran(*verb, "-n", namespace, kubeconfig=viewer)
        assert (refused.exit_code, "-edit changes" in refused.stderr) == (Exit.NOT_ALLOWED, True), refused.output
    assert ran("stop", "maths", "--yes", "-n", namespace).exit_code == 0


def test_an_older_crd_names_the_fields_that_it_lacks(operator: Kube, namespace: str) -> None:
    """As a newer client would send them."""
    import asyncio

    from rlhf_client import Client, OtherVersion, connect

    async def send() -> None:
        async with Client(connect(str(settings.from_environment().kubeconfig), namespace=namespace)) as client:
            body = a_job("novel", novelty=1) | {"metadata": {"name": "novel"}}
            query = {"fieldValidation": "Strict"}
            await client._http.json("POST", client._jobs(), params=query, body=body)

    with pytest.raises(OtherVersion, match=r"spec\.novelty"):
        asyncio.run(send())


def test_a_finished_job_and_its_files(undisturbed: Undisturbed, volumes: Path, tmp_path: Path) -> None:
    name, namespace = undisturbed.job["metadata"]["name"], undisturbed.job["metadata"]["namespace"]
    watched = ran("watch", name, "-n", namespace)
    assert (watched.exit_code, watched.stdout.split()[0]) == (0, "Succeeded"), watched.output
    assert "30/30" in ran("status", name, "-n", namespace).stdout
    left = volumes / Path(undisturbed.job["spec"]["checkpoint"]["path"]).relative_to("/var/lib/rlhf")
    page = tmp_path / "run.html"
    assert ran("report", left, "--out", page).exit_code == 0
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["steps"][-1] == 30
    assert data["series"]["reward/mean"][-1] == pytest.approx(undisturbed.curve[30], rel=1e-3)
    assert data["attempts"][-1]["log"]
    assert data["unread"] == []
    assert ran("samples", left, "--limit", "1").stdout.startswith("step 30:")


@pytest.mark.timeout(600)
def test_the_quickstart_as_it_is_written(operator: Kube, namespace: str, volumes: Path, tmp_path: Path) -> None:
    """Five commands: own data, own reward, a manifest by flags that nobody edits, the run, a look at it."""
    config = yaml.safe_load(settings.from_environment().kubeconfig.read_text())
    config["contexts"][0]["context"]["namespace"] = namespace
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    given = operator.environment | {"KUBECONFIG": str(tmp_path / "kubeconfig"), "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), operator.environment["PATH"]])}
    commands = re.findall(r"```sh\n(.*?)```", (CLONE / "docs" / "quickstart.md").read_text(), re.DOTALL)
    assert len(commands) == 5
    said = [_said(command, tmp_path, given) for command in commands]
    assert "Succeeded" in said[3] and "Succeeded" in said[4] and "30/30" in said[4], said[3:]
    assert float(status(operator, namespace, "letters")["progress"]["reward"]) > 0.5, "it began below 0.1"
    files = operator.find("configmap", "letters-files", "-n", namespace) or {}
    assert files["data"]["prompts.jsonl"] == (tmp_path / "prompts.jsonl").read_text()
    assert [owner["name"] for owner in files["metadata"]["ownerReferences"]] == ["letters"]


def _said(command: str, folder: Path, environment: dict[str, str]) -> str:
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout
