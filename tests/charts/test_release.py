"""A release's parts hold what they should, and a tree that is not ready for one is refused."""

import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from hack import generate, release
from hack.cluster.steps import ClusterError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("release")
    release.build(into, None, draft=True)
    return into


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files in which a version stands."""
    for name, _ in release.PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(release.ROOT / name, tmp_path / name)
    return tmp_path


VERSION = release.the_version(release.ROOT)


def test_all_parts_are_there_and_their_checksums_hold(parts: Path) -> None:
    wheels = [f"rlhf_{name}-{VERSION}-py3-none-any.whl" for name in release.DISTRIBUTIONS]
    materials = [f"{image.format(VERSION).replace(':', '-')}.cdx.json" for image in release.IMAGES]
    install = [f"rlhf-operator-{VERSION}.tgz", f"rlhf-operator-{VERSION}.yaml"]
    assert {path.name for path in parts.iterdir()} == {*wheels, *materials, *install, "SHA256SUMS"}
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=parts, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count(": OK") == len([*wheels, *materials, *install])


@pytest.mark.parametrize("name", release.DISTRIBUTIONS)
def test_a_wheel_holds_the_package_and_nothing_else(parts: Path, name: str) -> None:
    with zipfile.ZipFile(parts / f"rlhf_{name}-{VERSION}-py3-none-any.whl") as wheel:
        held = {file.split("/")[0] for file in wheel.namelist()}
        (told,) = [file for file in wheel.namelist() if file.endswith("dist-info/METADATA")]
        assert f"Version: {VERSION}" in wheel.read(told).decode()
    packages = {path.parent.name for path in (release.ROOT / name).glob("*/__init__.py")}
    assert held == {*packages, f"rlhf_{name}-{VERSION}.dist-info"}


def test_the_packed_chart_is_the_chart(parts: Path) -> None:
    with tarfile.open(parts / f"rlhf-operator-{VERSION}.tgz") as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
        said = yaml.safe_load(packed.extractfile("rlhf-operator/Chart.yaml") or b"")
    assert held == {str(file.relative_to(generate.CHART)) for file in generate.CHART.rglob("*") if file.is_file()}
    assert (said["version"], said["appVersion"]) == (VERSION, VERSION)


def test_the_one_manifest_makes_what_others_need_first(parts: Path) -> None:
    kinds = [one["kind"] for one in yaml.safe_load_all((parts / f"rlhf-operator-{VERSION}.yaml").read_text())]
    chart = [one["kind"] for one in generate.render() if "helm.sh/hook" not in one["metadata"].get("annotations", {})]
    assert sorted(kinds) == sorted(["Namespace", *chart])
    assert kinds[:2] == ["Namespace", "CustomResourceDefinition"]
    assert kinds.index("ServiceAccount") < kinds.index("Deployment")


@pytest.mark.parametrize("image", release.IMAGES)
def test_a_bill_of_materials_names_each_package_of_the_image(parts: Path, image: str) -> None:
    bill = json.loads((parts / f"{image.format(VERSION).replace(':', '-')}.cdx.json").read_text())
    pinned = (release.ROOT / "requirements" / release.IMAGES[image][2]).read_text()
    wanted = {tuple(line.split(" ")[0].split("==")) for line in pinned.splitlines() if "==" in line}
    assert {(one["name"], one["version"]) for one in bill["components"]} == wanted
    assert all(one["externalReferences"][0]["hashes"] for one in bill["components"])


def test_a_signature_can_be_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "gpg"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    quiet = ["gpg", "--batch", "--passphrase", ""]
    subprocess.run([*quiet, "--quick-generate-key", "release@test", "ed25519"], check=True, capture_output=True)
    (tmp_path / "part").write_text("part")
    sums = release.checksums(tmp_path)
    release.sign(sums, "release@test")
    verify = ["gpg", "--verify", f"{sums}.asc", str(sums)]
    assert subprocess.run(verify, capture_output=True).returncode == 0
    sums.write_text("other")
    assert subprocess.run(verify, capture_output=True).returncode != 0
    subprocess.run(["gpgconf", "--kill", "all"], check=False)
    with pytest.raises(ClusterError, match="nobody@test"):
        release.sign(sums, "nobody@test")


def test_places_that_differ_are_named_with_their_line(tree: Path) -> None:
    chart = tree / "charts/rlhf-operator/Chart.yaml"
    chart.write_text(chart.read_text().replace(f"appVersion: {VERSION}", "appVersion: 9.9.9"))
    with pytest.raises(ClusterError, match=r"charts/rlhf-operator/Chart.yaml:6 has 9\.9\.9") as refused:
        release.the_version(tree)
    assert refused.value.remedy == f"python -m hack.release version {VERSION}"


def test_a_version_is_written_everywhere(tree: Path) -> None:
    release.set_version(tree, "9.8.7-rc.1")
    assert release.the_version(tree) == "9.8.7-rc.1"
    assert f"## 9.8.7-rc.1, unreleased\n\n## {VERSION}" in (tree / "CHANGELOG.md").read_text()
    left = [name for name, _ in release.PLACES if VERSION in (tree / name).read_text() and name != "CHANGELOG.md"]
    assert left == []
    release.set_version(tree, "9.8.7-rc.1")
    assert (tree / "CHANGELOG.md").read_text().count("9.8.7") == 1


@pytest.mark.parametrize("wrong", ["", "1.0", "v1.0.0", "1.0.0+build", "1.0.0 "])
def test_what_is_no_version_is_refused(tree: Path, wrong: str) -> None:
    with pytest.raises(ClusterError, match="is no version"):
        release.set_version(tree, wrong)


def test_a_changelog_without_a_date_is_refused(tree: Path) -> None:
    release.set_version(tree, "9.8.7")
    with pytest.raises(ClusterError, match=r"9\.8\.7 unreleased"):
        release.check_dated(tree, "9.8.7")
    changelog = tree / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("9.8.7, unreleased", "9.8.7, 2027-01-01"))
    release.check_dated(tree, "9.8.7")


def test_no_engine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match="none of docker, podman, buildah works here"):
        release.images(VERSION)


def test_an_engine_builds_what_the_dockerfiles_say() -> None:
    commands = [" ".join(command) for command in release.image_commands("podman", "1.2.3")]
    assert commands[0] == "podman build --file images/operator.Dockerfile --tag rlhf-operator:1.2.3 ."
    assert "--build-arg REQUIREMENTS=worker-cpu.txt" in commands[2]
