"""The manifest that a user gives: read with words for everything that can be wrong with a file."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhf_api.parse import InvalidJob, parse_job
from rlhf_cli.exits import Wrong
from rlhf_client.files import MOUNT

Raw = dict[str, Any]


def load(path: Path) -> Raw:
    """The one RLHFJob of a YAML or JSON file, `-` for standard input. Raises Wrong."""
    raw = read(path)
    try:
        parse_job(raw)
    except InvalidJob as error:
        problems = (hinted(problem, raw) for problem in error.problems)
        raise Wrong("\n  ".join([f"{path}: no valid RLHFJob:", *problems])) from None
    return raw


def read(path: Path) -> Raw:
    """The same, which need not be valid but for its metadata."""
    text = text_of(path)
    try:
        documents = [one for one in yaml.safe_load_all(text) if one]
    except yaml.YAMLError as error:
        raise Wrong(f"{path}: not YAML: {error}") from None
    jobs = [one for one in documents if isinstance(one, dict) and one.get("kind") == "RLHFJob"]
    if len(jobs) != 1:
        kinds = sorted({str(one.get("kind")) if isinstance(one, dict) else "text" for one in documents})
        raise Wrong(f"{path}: holds {len(jobs)} RLHFJobs, one is needed; it has {', '.join(kinds) or 'nothing'}")
    return jobs[0]


def text_of(path: Path) -> str:
    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text()
    except OSError as error:
        raise Wrong(f"{path}: {error.strerror}{_near(path, error)}") from None
    except UnicodeDecodeError:
        raise Wrong(f"{path}: not YAML: it is no text") from None


def _near(path: Path, error: OSError) -> str:
    """The file that may have been meant by one that is not there."""
    folder = path.parent if path.parent.is_dir() else Path()
    near = get_close_matches(path.name, [one.name for one in folder.iterdir()], n=1)
    return f" (did you mean {folder / near[0]}?)" if near and isinstance(error, FileNotFoundError) else ""


def contents(paths: Sequence[Path], raw: Raw) -> dict[str, bytes]:
    """Of the files that go with a job, by their names. Raises Wrong, also where the manifest names one that is not
    given.
    """
    found: dict[str, bytes] = {}
    for path in paths:
        if path.name in found:
            raise Wrong(f"--with {path}: two files are called {path.name}: rename one")
        try:
            found[path.name] = path.read_bytes()
        except OSError as error:
            raise Wrong(f"--with {path}: {error.strerror}{_near(path, error)}") from None
    mounts = [one for role in raw["spec"].get("pods", {}).values() for one in role.get("volumeMounts", [])]
    missing = _named(raw["spec"]) - found.keys()
    if missing and not any(f"{one.get('mountPath')}/".startswith(f"{MOUNT}/") for one in mounts):
        raise Wrong(f"the manifest names {MOUNT}/{min(missing)}, and nothing is mounted there: give --with "
            f"{min(missing)}")
    return found


def _named(node: Any) -> set[str]:
    """Files of MOUNT that a spec names."""
    if isinstance(node, dict | list):
        return {one for part in (node.values() if isinstance(node, dict) else node) for one in _named(part)}
    found = re.fullmatch(rf"{MOUNT}/([^/\s]+)", node) if isinstance(node, str) else None
    return {found[1]} if found else set()


def hinted(problem: str, raw: Raw) -> str:
    """With the nearest field, or value of a closed set, to one that is misspelt."""
    path, _, words = problem.partition(": ")
    parent, _, name = path.rpartition(".")
    if words.startswith("unknown field"):
        near = get_close_matches(name, list(schema(parent).get("properties", {})), n=1)
    else:
        near = get_close_matches(str(_value(raw, path)), schema(path).get("enum", []), n=1)
    return problem + (f" (did you mean {near[0]}?)" if near else "")


@cache
def _whole_schema() -> Raw:
    from rlhf_api.crd import crd

    found: Raw = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def schema(path: str) -> Raw:
    """Of the field at this path, such as `spec.rewards[0]`, in the CRD. Empty where there is none."""
    node: Any = _whole_schema()
    for part in _parts(path):
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    found: Raw = node
    return found


def _value(raw: Any, path: str) -> Any:
    for part in _parts(path):
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _parts(path: str) -> list[str | int]:
    """spec.rewards[0].name -> spec, rewards, 0, name"""
    return [int(part[1:-1]) if part.startswith("[") else part for part in re.findall(r"\[\d+\]|[^.\[\]]+", path)]
