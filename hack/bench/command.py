"""What the benchmarks of the control plane share: options, a control plane, and how they print what they found."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hack.bench.client import Client, meanwhile
from hack.bench.control_plane import ADMIN, ControlPlane, isolated
from hack.bench.usage import machine
from hack.cluster import settings
from hack.cluster.steps import ClusterError, fail

AT_ONCE = 32  # requests of a benchmark's own


@dataclass(frozen=True)
class Report:
    """`figures` is the table once more, for programs."""

    title: str
    table: str
    figures: Any


def parser(doc: str | None, jobs: int, limit: float) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--jobs", type=int, default=jobs)
    made.add_argument("--limit", type=float, default=limit, help="seconds that each wait may take")
    clone = settings.from_environment().clone
    made.add_argument("--tree", type=Path, default=clone, help="source tree of the operator and its CRD")
    return made


@asynccontextmanager
async def standing(tree: Path, kuberay_crds: Path | None = None) -> AsyncIterator[tuple[ControlPlane, Client]]:
    """A fresh control plane with the tree's CRD, and its admin."""
    with ControlPlane() as plane:
        plane.install_all(tree, kuberay_crds)
        async with Client.connect(plane.kubeconfig(ADMIN)) as client, meanwhile(plane.attend()):
            yield plane, client


def run(
    module: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Coroutine[Any, Any, Report]],
) -> int:
    """Exit status of the module, which runs in namespaces of its own."""
    if (status := isolated(module, sys.argv[1:])) is not None:
        return status
    try:
        found = asyncio.run(measure(arguments))
    except ClusterError as error:
        return fail(error)
    print(f"\n{found.title}; {machine()}\n\n{found.table}\n\n{json.dumps(found.figures)}")
    return 0


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
