"""Generated files are what their sources give now, and the samples are jobs that can be planned."""

from pathlib import Path

import pytest
import yaml

from hack import generate
from rlhf_api.overrides import ephemeral
from rlhf_api.parse import load_job
from rlhf_api.run import resolve

SAMPLES = sorted((generate.MANIFESTS / "samples").glob("*.yaml"))


def test_the_kustomize_install_is_the_rendered_chart() -> None:
    expected = generate.manifests(generate.render("--set", "crds.install=false"))
    stale = [
        str(path.relative_to(generate.ROOT))
        for path, text in expected.items() if not path.exists() or path.read_text() != text
    ]
    assert stale == [], "run make generate"


def test_nothing_else_lies_in_the_generated_folders() -> None:
    expected = set(generate.manifests(generate.render("--set", "crds.install=false")))
    found = {
        path for folder in ("crd", "rbac", "operator", "default") for path in (generate.MANIFESTS / folder).iterdir()
    }
    assert found == expected


def test_the_charts_copies_are_fresh() -> None:
    copies = generate.chart_copies()
    assert [path.name for path, text in copies.items() if path.read_text() != text] == [], "run make generate"


def test_the_generated_pages_are_fresh() -> None:
    assert [path.name for path, text in generate.pages().items() if path.read_text() != text] == [], "run make generate"


def test_kustomize_files_say_nothing_of_helm() -> None:
    for path in (generate.MANIFESTS / "operator").glob("*.yaml"):
        assert "helm" not in path.read_text().lower(), path.name


@pytest.mark.parametrize("path", SAMPLES, ids=[path.stem for path in SAMPLES])
def test_a_sample_is_a_valid_job_and_says_what_it_needs(path: Path) -> None:
    job = load_job(path)
    assert resolve(job).placement.gpus >= 1
    header = path.read_text().split("apiVersion")[0]
    said = [line.split(":")[0] for line in header.splitlines() if line.split(":")[0] in ("# Shows", "# Expect", "# Needs")]
    assert said[:3] == ["# Shows", "# Expect", "# Needs"]
    assert "GPU" in header


@pytest.mark.parametrize("path", SAMPLES, ids=[path.stem for path in SAMPLES])
def test_a_samples_data_are_mounted_where_the_spec_names_them(path: Path) -> None:
    """A path under a mount of one kind of pod is under a mount of each kind that reads it."""
    (job,) = yaml.safe_load_all(path.read_text())
    spec = job["spec"]
    mounts = {kind: [mount["mountPath"] for mount in pod.get("volumeMounts", [])] for kind, pod in spec["pods"].items()}
    assert not ephemeral(load_job(path).spec), "a sample's checkpoints outlive its pods"
    if spec["model"]["path"].startswith("/"):
        readers = ["head", "trainer", *(["rollout"] if spec.get("placement", {}).get("mode") == "Separated" else [])]
        assert [
            kind for kind in readers
            if not any(spec["model"]["path"].startswith(mount) for mount in mounts.get(kind, []))
        ] == []


def test_sample_names_differ() -> None:
    names = [load_job(path).metadata.name for path in SAMPLES]
    assert len(names) == len(set(names)) >= 3
