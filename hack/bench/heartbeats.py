"""What jobs cost that run and report: a thousand of them, each with a report every ten seconds.

    python -m hack.bench.heartbeats --jobs 1000

The operator makes their RayClusters; pods and drivers are written, not run (nodes.py). Three windows: nobody reports;
reports that say nothing but that the driver lives; reports of which every sixth tells of a finished step. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hack.bench import fleet
from hack.bench.client import Client, each, meanwhile, until
from hack.bench.control_plane import ADMIN, DRIVERS, OPERATOR, ControlPlane, Process, isolated
from hack.bench.nodes import Nodes, report, stamp, trained
from hack.bench.scale import AT_ONCE, CLONE
from hack.bench.usage import Calls, machine
from hack.cluster.kube import ApiError, Object
from hack.cluster.steps import ClusterError, fail, say

EVERY_SECONDS = 10.0
REPORTS_A_STEP = 6


@dataclass
class Window:
    """One row. CPU in per cent of a core."""

    name: str
    seconds: float
    reports: int = 0
    operator_cpu_percent: float = 0.0
    operator_mib: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    api_server_cpu_percent: float = 0.0


@dataclass
class Run:
    plane: ControlPlane
    operator: Process
    drivers: Client
    nodes: Nodes
    jobs: list[str]
    calls: Calls
    step: int = 0
    sent: int = 0

    async def window(self, name: str, seconds: float, reports_a_step: int | None) -> Window:
        """`reports_a_step` None: no reports; 0: none of them tells of a step."""
        found = Window(name, seconds)
        self.calls.since_last(OPERATOR)
        parts, self.sent, begun = (self.operator, self.plane.api_server), 0, time.monotonic()
        before = [part.usage().cpu_seconds for part in parts]
        await self._report_for(seconds, reports_a_step)
        took = time.monotonic() - begun
        cpu = [100 * (part.usage().cpu_seconds - old) / took for part, old in zip(parts, before, strict=True)]
        found.operator_cpu_percent, found.api_server_cpu_percent = cpu
        found.seconds, found.reports, found.operator_mib = took, self.sent, self.operator.usage().peak_mib
        found.calls = dict(self.calls.since_last(OPERATOR).most_common())
        return found

    async def _report_for(self, seconds: float, reports_a_step: int | None) -> None:
        if reports_a_step is None:
            await asyncio.sleep(seconds)
            return
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number, job in enumerate(self.jobs):
                delay = EVERY_SECONDS * number / len(self.jobs)
                group.create_task(self._driver(job, number, delay, end, reports_a_step))

    async def _driver(self, job: str, number: int, delay: float, end: float, reports_a_step: int) -> None:
        """A report every EVERY_SECONDS; jobs finish their steps at different reports."""
        due, told, count = time.monotonic() + delay, trained(self.step), number
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if reports_a_step and count % reports_a_step == 0:
                told = trained(self.step + count)
            await report(self.drivers, job, self.nodes.heads[job], **told | {"activityTime": stamp()})
            self.sent, count, due = self.sent + 1, count + 1, due + EVERY_SECONDS

    async def started(self, client: Client, limit: float) -> None:
        """Every job applied, its pods up, its first step done, its status Running."""
        await each(self.jobs, lambda job: client.send("POST", fleet.RLHFJOBS, fleet.RLHFJOB.make(job)), AT_ONCE)

        async def up() -> bool:
            return len(self.nodes.heads) == len(self.jobs)

        async def running() -> bool:
            jobs = (await client.send("GET", fleet.RLHFJOBS))["items"]
            return all(job.get("status", {}).get("phase") == "Running" for job in jobs)

        await until("all pods", up, limit, lambda: f"{len(self.nodes.heads)} of {len(self.jobs)} have theirs")
        await each(
            self.jobs, lambda job: report(self.drivers, job, self.nodes.heads[job], **trained(self.step)), AT_ONCE
        )
        await until("phase Running of all", running, limit)


async def run(arguments: argparse.Namespace) -> list[Window]:
    async with AsyncExitStack() as stack:
        plane = stack.enter_context(ControlPlane())
        plane.install_all(arguments.tree)
        operator = plane.operator(arguments.tree)
        client = await stack.enter_async_context(Client.connect(plane.kubeconfig(ADMIN)))
        drivers = await stack.enter_async_context(Client.connect(plane.kubeconfig(DRIVERS)))
        nodes = Nodes(client)
        going = Run(plane, operator, drivers, nodes, fleet.names(arguments.jobs), Calls(plane.audit_log))
        try:
            async with meanwhile(nodes.run()):
                await going.started(client, arguments.limit)
                await asyncio.sleep(
                    min(10.0, arguments.seconds)
                )  # the last events of the start are no part of the first window
                return await windows(going, arguments.seconds)
        except (ClusterError, ApiError):
            say(f"the end of {operator.log.name}:\n{operator.words()}")
            raise


async def windows(going: Run, seconds: float) -> list[Window]:
    return [
        await going.window("nobody reports", seconds, None),
        await going.window("signs of life", seconds, 0),
        await going.window("a step every minute", seconds, REPORTS_A_STEP),
    ]


def table(found: Sequence[Window]) -> str:
    head = "| | reports a second | operator's CPU, % of a core | its most MiB | its API calls | API server's CPU, % |"
    rows = (
        f"| {w.name} | {w.reports / w.seconds:.0f} | {w.operator_cpu_percent:.1f} | {w.operator_mib:.0f} "
        f"| {_calls(w.calls)} | {w.api_server_cpu_percent:.0f} |"
        for w in found
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _calls(calls: Object) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in calls.items()) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60, help="of each window")
    parser.add_argument("--tree", type=Path, default=CLONE, help="source tree of the operator and its CRD")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that each wait may take")
    arguments = parser.parse_args()
    if (status := isolated("hack.bench.heartbeats", sys.argv[1:])) is not None:
        return status
    try:
        found = asyncio.run(run(arguments))
    except ClusterError as error:
        return fail(error)
    print(f"\n{arguments.jobs} jobs; {machine()}\n")
    print(table(found))
    print(json.dumps([asdict(window) for window in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
