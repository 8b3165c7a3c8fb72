"""The parts of a release, from this tree: wheels, the chart, one manifest, bills of materials, checksums, a signature,
images.

    python -m hack.release version 0.2.0           # write it wherever a version stands
    python -m hack.release build dist --sign KEY   # everything but images into dist/
    python -m hack.release images                  # by a container engine

A tree whose places disagree, or whose changelog does not date the version, is refused; `--draft` takes the latter.
docs/release.md has the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hack import generate
from hack.cluster.steps import ClusterError, fail, output, say, step

ROOT = generate.ROOT
APART = Path(sys.prefix) / "apart"  # tools that hack/setup.sh keeps out of the environment's own directory
DISTRIBUTIONS = ("api", "operator", "worker", "cli")
# Image, what it has beside the Dockerfile's defaults, and the requirements that become its bill of materials.
IMAGES = {
    "rlhf-operator:{}": ("operator.Dockerfile", (), "operator.txt"),
    "rlhf-worker:{}": ("worker.Dockerfile", (), "worker-gpu.txt"),
    "rlhf-worker:{}-cpu": (
        "worker.Dockerfile", ("BASE=python:3.11-slim-bookworm", "REQUIREMENTS=worker-cpu.txt"), "worker-cpu.txt",
    ),
}
ENGINES = ("docker", "podman", "buildah")
CHANGELOG = "CHANGELOG.md"
# Wherever a version stands, and the pattern whose one group it is.
PLACES = (
    *((f"{folder}pyproject.toml", r'^version = "(.+)"$') for folder in ("", *(f"{name}/" for name in DISTRIBUTIONS))),
    ("charts/rlhf-operator/Chart.yaml", r"^version: (.+)$"),
    ("charts/rlhf-operator/Chart.yaml", r"^appVersion: (.+)$"),
    ("README.md", r"image\.tag=([0-9]\S*)"),
    ("images/operator.Dockerfile", r"-t rlhf-operator:(\S+) "),
    ("images/worker.Dockerfile", r"-t rlhf-worker:(\S+) \."),
    ("images/worker.Dockerfile", r"-t rlhf-worker:(\S+)-cpu "),
    (CHANGELOG, r"^## ([^,\s]+)"),
)
UNDATED = "unreleased"
# SemVer, less build metadata, which image tags cannot hold.
VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?")


@dataclass(frozen=True)
class Place:
    """Where a version stands: the first match in the file. ``span`` is of the version in ``text``."""

    file: str
    text: str
    span: tuple[int, int]

    @property
    def version(self) -> str:
        return self.text[slice(*self.span)]

    def __str__(self) -> str:
        return f"{self.file}:{self.text.count(chr(10), 0, self.span[0]) + 1}"


def place(root: Path, name: str, pattern: str) -> Place:
    """Raises ClusterError for a file that holds no version any more."""
    text = (root / name).read_text()
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ClusterError(f"{name} has no version ({pattern})", "give it one, or take it out of hack/release.py")
    return Place(name, text, found.span(1))


def the_version(root: Path) -> str:
    """The one that all places have. Raises ClusterError that names those that differ from the workspace's."""
    first, *others = (place(root, *where) for where in PLACES)
    wrong = [f"{other} has {other.version}" for other in others if other.version != first.version]
    if wrong:
        remedy = f"python -m hack.release version {first.version}"
        raise ClusterError(f"{first} has version {first.version}, but {', '.join(wrong)}", remedy)
    return first.version


def set_version(root: Path, version: str) -> None:
    """Everywhere; the changelog gets a heading of its own. Raises ClusterError."""
    if not VERSION.fullmatch(version):
        raise ClusterError(f"{version!r} is no version", "give MAJOR.MINOR.PATCH, such as 0.2.0 or 0.2.0-rc.1")
    for where in PLACES:
        old = place(root, *where)
        if old.version != version:
            (root / old.file).write_text(_renewed(old, version))


def _renewed(old: Place, version: str) -> str:
    start, end = old.span
    if old.file != CHANGELOG:
        return old.text[:start] + version + old.text[end:]
    heading = start - len("## ")
    return f"{old.text[:heading]}## {version}, {UNDATED}\n\n{old.text[heading:]}"


def check_dated(root: Path, version: str) -> None:
    if f"## {version}, {UNDATED}" in (root / CHANGELOG).read_text():
        raise ClusterError(f"{CHANGELOG} calls {version} {UNDATED}", "write the date there, or build a --draft")


# --- the parts --------------------------------------------------------------------------------------------------


def wheels(into: Path) -> None:
    for name in DISTRIBUTIONS:
        command: list[str | Path] = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
        output([*command, into], "see the message of hatchling", cwd=ROOT / name)


def chart(into: Path) -> None:
    output([generate.helm(), "package", generate.CHART, "--destination", into], "see the message of helm")


def manifest(into: Path, version: str) -> None:
    """The kustomize install as one file, in the order in which `kubectl apply` needs it."""
    files = generate.manifests(generate.render("--set", "crds.install=false"))
    rank = {"default": 0, "crd": 1, "rbac": 2, "operator": 3}
    texts = [text for path, text in sorted(files.items(), key=lambda item: rank[item[0].parent.name])
        if path.name != "kustomization.yaml"]
    (into / f"rlhf-operator-{version}.yaml").write_text("---\n".join(texts))


def materials(into: Path, version: str) -> None:
    """What each image installs, as CycloneDX, with the hashes that the installer checks. The tool's validation of what
    it has just written takes eight times as long as the writing, and is left out."""
    for image, (_, _, requirements) in IMAGES.items():
        name = image.format(version).replace(":", "-")
        command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--no-validate", "--output-reproducible"]
        files: list[str | Path] = ["--output-file", into / f"{name}.cdx.json", ROOT / "requirements" / requirements]
        env = {**os.environ, "PYTHONPATH": str(APART)}
        output([*command, *files], "see the message of cyclonedx-py", env=env)


def checksums(into: Path) -> Path:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    sums = into / "SHA256SUMS"
    files = sorted(path for path in into.iterdir() if path.is_file() and path != sums)
    sums.write_text("".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files))
    return sums


def sign(sums: Path, key: str) -> None:
    """By gpg, beside the file: whoever trusts the key and SHA256SUMS can trust every other file."""
    command = ["gpg", "--batch", "--yes", "--armor", "--local-user", key, "--detach-sign"]
    output([*command, str(sums)], "install gpg, or name a key that it has (gpg --list-secret-keys)")


def engine() -> str | None:
    """A container engine that works, or None."""
    works = (name for name in ENGINES if shutil.which(name)
        and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0)
    return next(works, None)


def image_commands(engine: str, version: str) -> list[list[str]]:
    return [
        [engine, "build", "--file", f"images/{dockerfile}", "--tag", image.format(version),
            *(word for argument in arguments for word in ("--build-arg", argument)), "."]
        for image, (dockerfile, arguments, _) in IMAGES.items()
    ]


def images(version: str) -> None:
    found = engine()
    if found is None:
        raise ClusterError(f"none of {', '.join(ENGINES)} works here", "build the images on a machine where one does")
    for command in image_commands(found, version):
        with step(command[command.index("--tag") + 1]):
            output(command, f"see the message of {found}", cwd=ROOT)


def build(into: Path, key: str | None, *, draft: bool) -> None:
    """Every part into the folder, which is emptied first. Raises ClusterError."""
    version = the_version(ROOT)
    if not draft:
        check_dated(ROOT, version)
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    with step("wheels"):
        wheels(into)
    with step("chart and manifest"):
        chart(into)
        manifest(into, version)
    with step("bills of materials"):
        materials(into, version)
    sums = checksums(into)
    if key:
        sign(sums, key)
    say(f"{version} is in {into}: " + ("signed" if key else "NOT signed: --sign names a key of gpg's"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("version", help="write a version wherever one stands").add_argument("version")
    making = verbs.add_parser("build", help="everything but images into a folder")
    making.add_argument("into", type=lambda text: Path(text).resolve())
    making.add_argument("--sign", metavar="KEY", help="a key of gpg's")
    making.add_argument("--draft", action="store_true", help="the changelog need not date the version")
    verbs.add_parser("images", help="build the images, by docker, podman or buildah")
    told = parser.parse_args(arguments)
    try:
        match told.verb:
            case "version":
                set_version(ROOT, told.version)
                say("now: make generate")
            case "build":
                build(told.into, told.sign, draft=told.draft)
            case "images":
                images(the_version(ROOT))
    except ClusterError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
