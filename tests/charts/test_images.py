"""The images hold what their programs need, as far as this can be told without a container engine."""

import ast
import fnmatch
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

from hack.generate import ROOT

IMAGES = ROOT / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
# What an image installs: its requirements, and our distributions. vLLM's image brings what worker-gpu.txt names.
HOLDS = {
    "operator.txt": ("api", "operator"),
    "worker-cpu.txt": ("api", "worker"),
    "worker-gpu.txt": ("api", "worker"),
}
MEGABYTE = 1 << 20
OPERATOR_MEGABYTES = 130  # of Python packages, most of it the Kubernetes client's models


def instructions(dockerfile: Path) -> list[str]:
    return re.sub(r"\\\n", " ", dockerfile.read_text()).splitlines()


def copied(dockerfile: Path) -> Iterator[str]:
    """What it takes from the tree; a build argument may be any of our requirement files."""
    for line in instructions(dockerfile):
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            for source in words[1:-1]:
                yield from ([source] if "${" not in source else [f"requirements/{name}" for name in HOLDS])


def in_context(path: str) -> bool:
    """By .dockerignore, of which the last line that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        if any(fnmatch.fnmatch(part, pattern) for part in (path, *map(str, Path(path).parents))):
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_is_there_and_in_the_context(dockerfile: Path) -> None:
    sources = list(copied(dockerfile))
    assert len(sources) >= 3
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not in_context(source)] == []
    assert not in_context("tests") and not in_context(".git")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_as_the_user_that_pods_have(dockerfile: Path) -> None:
    users = [line.split()[1] for line in instructions(dockerfile) if line.startswith("USER ")]
    assert users[-1:] == ["65532:65532"]


def imported(module: Path) -> Iterator[str]:
    """Top-level names of what its import needs: not what a function imports, nor what `try` or TYPE_CHECKING guards."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]


def pinned(requirements: str) -> set[str]:
    text = (ROOT / "requirements" / requirements).read_text()
    return {normal(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}


def test_cuda_s_python_packages_are_of_one_version() -> None:
    """The two write the same modules, and vLLM's CuTe kernels are not found with those of CUDA 12."""
    lock = (ROOT / "requirements" / "worker-gpu.txt").read_text()
    versions = dict(re.findall(r"^(cuda-python|cuda-bindings)==([\d.]+)", lock, re.MULTILINE))
    assert versions["cuda-python"] == versions["cuda-bindings"]
    assert int(versions["cuda-bindings"].split(".")[0]) >= 13


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirements", HOLDS)
def test_every_import_is_among_the_requirements(requirements: str) -> None:
    ours = {package.parent.name for name in HOLDS[requirements] for package in (ROOT / name).glob("*/__init__.py")}
    modules = [file for name in ours for file in ROOT.glob(f"*/{name}/**/*.py")]
    needed = {name for file in modules for name in imported(file)} - set(sys.stdlib_module_names) - ours
    offered = packages_distributions()
    installed = pinned(requirements)
    missing = {name for name in needed if not installed & {normal(one) for one in (name, *offered.get(name, ()))}}
    assert len(modules) > 10 and len(needed) >= 5
    assert missing == set()


@pytest.mark.parametrize("name", ["kubernetes-validate", "rfc3987-syntax"])
def test_nothing_of_the_environment_is_imported_because_it_is_there(name: str) -> None:
    """By the Kubernetes client, and by jsonschema, which every process of Ray imports: 2 s each."""
    with pytest.raises(PackageNotFoundError):  # hack/setup.sh keeps such tools apart
        distribution(name)


def test_the_operators_packages_are_few() -> None:
    files = [file for name in pinned("operator.txt") for file in distribution(name).files or ()]
    size = sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).exists())
    assert 5 < size / MEGABYTE < OPERATOR_MEGABYTES
