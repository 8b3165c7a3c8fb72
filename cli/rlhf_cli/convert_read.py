"""Options of another framework, out of a YAML file or the shell script that starts it. Pure but for the file."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.exits import Wrong
from rlhf_cli.manifest import text_of

Raw = dict[str, Any]


def options(path: Path) -> Raw:
    """By their names, with dots where they nest. Raises Wrong."""
    text = text_of(path)
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        loaded = None
    return flat(loaded) if isinstance(loaded, dict) else of_script(text, path)


def flat(node: Raw, prefix: str = "") -> Raw:
    found: Raw = {}
    for name, value in node.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return found


def of_script(text: str, path: Path) -> Raw:
    """`--name value`, `--flag`, `name=value` and `+name=value` of command lines; comments are left out."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise Wrong(f"{path}: neither YAML nor a shell script: {error}") from None
    found: Raw = {}
    for at, word in enumerate(words):
        name, equals, value = word.lstrip("+").partition("=")
        if word.startswith("--"):
            name = name[2:].replace("-", "_")
            values = [value] if equals else _values(words[at + 1:])
            found[name] = _parsed(values)
        elif equals and re.fullmatch(r"[A-Za-z_][\w.]*\.[\w.]+", name):
            found[name] = _parsed([value])
    return found


def _values(words: list[str]) -> list[str]:
    """Up to the next option."""
    found = []
    for word in words:
        if word.startswith("--") or re.fullmatch(r"[&|;]+", word):
            break
        found.append(word)
    return found


def _parsed(values: list[str]) -> Any:
    read = [number(yaml.safe_load(value)) if "$" not in value else value for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def number(value: Any) -> Any:
    """YAML takes 1e-6 for a text, command lines for a number."""
    try:
        return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+[eE][+-]?\d+", value) else value
    except ValueError:
        return value
