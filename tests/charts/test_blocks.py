"""Every block of the documents is checked against what it is about: commands against their programs, fields against the
CRD, manifests against the contract and the planner. tests/cluster holds kubectl's own options against kubectl.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hack.cluster import binaries, settings
from hack.generate import CHART, ROOT
from rlhf_api.crd import job_schema
from rlhf_api.status import ConditionType
from rlhf_cli.app import app
from rlhf_operator.presets import read
from rlhf_worker import __main__ as worker
from tests.api.generated import PLANNED, outcome
from tests.blocks import Block, blocks, commands, mentions
from tests.charts.test_chart import rendered

Raw = dict[str, Any]
Words = list[str]
JOB = job_schema()
TASKS = sorted(path for path in (ROOT / "docs/tasks").glob("*.md") if path.stem != "index")
LANGUAGES = {"sh", "yaml", "python", "json", "text"}
TOP = {"apiVersion": {}, "kind": {}, "metadata": {}, **JOB["properties"]}
KINDS = {"rlhfjob", "rlhfjobs", "pods", "pod", "leases", "lease", "workloads", "configmap", "crd"}
VERBS = {"apply", "create", "delete", "describe", "get", "logs", "patch", "wait"}
OURS = ("manifests/", "charts/", "hack/", "images/", "docs/", "tests/")


def ids(found: list[Any]) -> list[str]:
    return [one.where if isinstance(one, Block) else f"{one[0]} {' '.join(one[1][:3])}" for one in found]


def unknown(node: Raw, value: Any, path: str) -> Iterator[str]:
    """The fields of `value` that a schema has not. What it leaves open may hold anything."""
    if isinstance(value, list):
        for item in value:
            yield from unknown(node.get("items", {}), item, f"{path}[]")
    if not isinstance(value, dict) or "properties" not in node or node.get("x-kubernetes-preserve-unknown-fields"):
        return
    for name, child in value.items():
        if name not in node["properties"]:
            yield f"{path}.{name}"
        else:
            yield from unknown(node["properties"][name], child, f"{path}.{name}")


def names(node: Raw) -> Iterator[tuple[str, Raw]]:
    for name, child in node.get("properties", {}).items():
        yield name, child
        yield from names(child)
    if isinstance(items := node.get("items"), dict):
        yield from names(items)


def test_every_block_says_what_it_is() -> None:
    assert [block.where for block in blocks() if block.language not in LANGUAGES] == [], f"one of {LANGUAGES}"
    assert len(blocks("sh")) > 20 and len(blocks("yaml")) > 20 and len(commands()) > 50, "the search must find them"


# --- commands


def make(words: Words) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words[1:] if "=" not in word} <= targets


def kubectl_rlhf(words: Words) -> None:
    """As far as its options and arguments are read."""
    group: Any = typer.main.get_command(app)
    verb = words[0]
    if verb.startswith("-"):
        assert verb in {"--help", "--install-completion", "--show-completion"}
        return
    assert verb in group.commands, f"known are {sorted(group.commands)}"
    group.commands[verb].make_context(verb, words[1:])


def kubectl(words: Words) -> None:
    if words[1] == "rlhf":
        return kubectl_rlhf(words[2:])
    given = [word for word in words[1:] if not word.startswith("-")]
    verb = next(word for word in given if word in VERBS)
    for kind in re.findall(r"\b(?:get|describe|delete|patch) ([a-z.]+)|\bwait .*?(?<= )([a-z]+)/", " ".join(words)):
        assert {*kind} - {""} <= KINDS, kind
    for path in re.findall(r"jsonpath=[^ ]*?\{\.([\w.]+)\}", " ".join(words)):
        value: Any = None
        for name in reversed(path.split(".")):
            value = {name: value}
        assert list(unknown({"properties": TOP}, value, "")) == []
    for condition in re.findall(r"--for=condition=(\w+)", " ".join(words)):
        assert condition in {*ConditionType}
    if verb == "patch":
        patch = json.loads(words[words.index("-p") + 1])
        assert list(unknown({"properties": TOP}, patch, "")) == []
    return None


def helm(words: Words) -> None:
    """Verb and options as the real Helm's help has them; values as the chart's schema has."""
    verb = words[1]
    program = str(binaries.helm(settings.from_environment()))
    told = subprocess.run([program, verb, "--help"], capture_output=True, text=True, check=True).stdout
    assert f"helm {verb}" in told
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= {*re.findall(r"--[a-z-]+", told)}
    schema = json.loads((CHART / "values.schema.json").read_text())
    for at in (i for i, word in enumerate(words) if word == "--set"):
        for setting in words[at + 1].split(","):
            value: Any = None
            for name in reversed(setting.partition("=")[0].split(".")):
                value = {name: value}
            assert list(unknown(schema, value, "")) == []


def python(words: Words) -> None:
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
    if words[2] == "rlhf_worker":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "_dispatch", lambda given: 0)
            assert worker.main(words[3:]) == 0


def pip(words: Words) -> None:
    """Names and extras of the distributions of this tree."""
    assert words[1] == "install"
    projects = dict[str, set[str]]()
    for file in ROOT.glob("*/pyproject.toml"):
        told = file.read_text()
        extras = set(re.findall(r"^(\w+) = \[", told, re.MULTILINE))
        projects |= {name: extras for name in (f"./{file.parent.name}", re.findall(r'^name = "(.+)"', told, re.M)[0])}
    for wanted in words[2:]:
        name, _, extra = wanted.rstrip("]").partition("[")
        assert name in projects and (not extra or extra in projects[name]), wanted


PROGRAMS: dict[str, Callable[[Words], None]] = {
    "make": make, "kubectl": kubectl, "kubectl-rlhf": lambda words: kubectl_rlhf(words[1:]), "helm": helm,
    "python": python, "python3": python, "pip": pip, **dict.fromkeys(("cat", "echo", "jq"), lambda words: None),
}  # fmt: skip


@pytest.mark.parametrize("command", commands(), ids=ids(commands()))
def test_a_command_is_one_that_its_program_takes(command: tuple[str, Words]) -> None:
    _, words = command
    assert words[0] in PROGRAMS, "a program whose commands nobody checks"
    try:
        PROGRAMS[words[0]](words)
    except SystemExit as error:
        pytest.fail(f"{' '.join(words)}: {error}")
    assert [word for word in words if word.startswith(OURS) and not (ROOT / word).exists()] == []


@pytest.mark.parametrize("mention", mentions(), ids=ids(mentions()))
def test_a_verb_that_the_text_names_is_there_with_its_options(mention: tuple[str, Words]) -> None:
    page, words = mention
    if words[0] == "make":
        return make(words)
    group: Any = typer.main.get_command(app)
    verb = words[2]
    known = {"--help", "--install-completion"} | {
        option for one in group.commands.values() if one.name == verb for param in one.params for option in param.opts
    }
    assert verb in group.commands or verb in known, page
    assert {word for word in words[3:] if word.startswith("-")} <= known, page
    return None


# --- manifests


@pytest.mark.parametrize("block", blocks("yaml"), ids=ids(blocks("yaml")))
def test_yaml_is_a_job_that_can_be_planned_or_has_fields_that_there_are(block: Block, tmp_path: Path) -> None:
    for raw in yaml.safe_load_all(block.text):
        if raw.get("kind") == "RLHFJob":
            assert list(unknown({"properties": TOP}, raw, "")) == []
            assert outcome({**raw, "metadata": {"namespace": "default", "uid": "u", **raw["metadata"]}}) == PLANNED
        elif "jobs" in raw:
            chart_values(raw, tmp_path)
        elif "kind" not in raw:
            fragment(raw)


def chart_values(raw: Raw, folder: Path) -> None:
    """As Helm takes them, and the operator takes the presets in them; and every sample can be planned on these."""
    rendered(raw, folder)
    presets = read(yaml.safe_dump(raw["jobs"]))
    for sample in (ROOT / "manifests/samples").glob("*.yaml"):
        job = presets.under(yaml.safe_load(sample.read_text()))
        assert outcome({**job, "metadata": {"namespace": "default", "uid": "u", **job["metadata"]}}) == PLANNED


def fragment(raw: Raw) -> None:
    """A part of a spec: at its top, or below a field that the page names."""
    known = [(name, child) for name, child in [*JOB["properties"].items(), *names(JOB["properties"]["spec"])]]
    for name, value in raw.items():
        trials = [list(unknown(child, value, name)) for known_name, child in known if known_name == name]
        assert trials, f"no field {name}"
        assert [] in trials, min(trials, key=len)


@pytest.mark.parametrize("page", TASKS, ids=[page.stem for page in TASKS])
def test_a_task_has_a_whole_manifest_and_says_what_to_look_at_and_what_goes_wrong(page: Path) -> None:
    jobs = [one for block in blocks("yaml", page) for one in yaml.safe_load_all(block.text) if "kind" in one]
    assert [one["kind"] for one in jobs].count("RLHFJob") == 1
    headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert {"What to look at", "What goes wrong"} <= {*headings}
    assert page.name in (page.parent / "index.md").read_text()


# --- python and JSON


@pytest.mark.parametrize("block", blocks("python"), ids=ids(blocks("python")))
def test_python_compiles_and_imports_what_there_is(block: Block) -> None:
    """What a block asserts it proves."""
    tree = compile(block.text, block.where, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module = importlib.import_module(node.module) if isinstance(node, ast.ImportFrom) and node.module else None
            assert hasattr(module, alias.name) if module else importlib.util.find_spec(alias.name), alias.name
    if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        subprocess.run([sys.executable, "-c", block.text], check=True)


@pytest.mark.parametrize("block", blocks("yaml"), ids=ids(blocks("yaml")))
def test_code_in_a_manifest_compiles(block: Block) -> None:
    for text in codes(list(yaml.safe_load_all(block.text))):
        compile(text, block.where, "exec")


def codes(node: Any) -> Iterator[str]:
    if isinstance(node, list | dict):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(child, str) and (name == "code" or str(name).endswith(".py")):
                yield child
            yield from codes(child)


def test_json_is_an_object_a_line() -> None:
    lines = [(block.where, line) for block in blocks("json") for line in block.text.splitlines()]
    assert [where for where, line in lines if not isinstance(json.loads(line), dict)] == []
