"""What jobs cost that run and report: a thousand of them, each with a report every ten seconds.

    python -m hack.bench.heartbeats --jobs 1000

The operator makes their RayClusters; pods and drivers are written, not run (nodes.py). Three windows: nobody reports;
reports that say nothing but that the driver lives; reports of which every sixth tells of a finished step. CPU in per
cent of a core. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from hack.bench import command, fleet
from hack.bench.client import Client, each, meanwhile, until
from hack.bench.command import AT_ONCE, Report
from hack.bench.control_plane import DRIVERS, OPERATOR, ControlPlane, Process
from hack.bench.nodes import Nodes, report, stamp, trained
from hack.bench.usage import Calls
from hack.cluster.kube import ApiError, Object

EVERY_SECONDS = 10.0
REPORTS_A_STEP = 6
BUSY = (429, 504)
SETTLE_SECONDS = 10.0  # the last events of the start are no part of the first window


@dataclass
class Window:
    """One row. CPU in per cent of a core."""

    name: str
    seconds: float
    reports: int = 0
    lost: int = 0
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
    lost: int = 0

    async def window(self, name: str, seconds: float, reports_a_step: int | None) -> Window:
        """`reports_a_step` None: no reports; 0: none of them tells of a step."""
        found = Window(name, seconds)
        self.calls.since_last(OPERATOR)
        parts, begun = (self.operator, self.plane.api_server), time.monotonic()
        self.sent = self.lost = 0
        before = [part.usage().cpu_seconds for part in parts]
        await self._report_for(seconds, reports_a_step)
        took = time.monotonic() - begun
        cpu = [100 * (part.usage().cpu_seconds - old) / took for part, old in zip(parts, before, strict=True)]
        found.operator_cpu_percent, found.api_server_cpu_percent = cpu
        found.seconds, found.reports, found.lost = took, self.sent, self.lost
        found.operator_mib = self.operator.usage().peak_mib
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
            await self._report(job, told | {"activityTime": stamp()})
            count, due = count + 1, due + EVERY_SECONDS

    async def _report(self, job: str, told: Object) -> None:
        """One that a busy API server does not take is lost, as a driver's would be: the next one comes soon."""
        try:
            await report(self.drivers, job, self.nodes.heads[job], **told)
        except ApiError as error:
            if error.code not in BUSY:
                raise
            self.lost += 1
        else:
            self.sent += 1

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


async def measure(arguments: argparse.Namespace) -> Report:
    async with (
        command.standing(arguments.tree) as (plane, client),
        Client.connect(plane.kubeconfig(DRIVERS)) as drivers,
    ):
        nodes, operator = Nodes(client), plane.operator(arguments.tree, lease=False)
        going = Run(plane, operator, drivers, nodes, fleet.names(arguments.jobs), Calls(plane.audit_log))
        async with meanwhile(nodes.run()):
            await going.started(client, arguments.limit)
            await asyncio.sleep(min(SETTLE_SECONDS, arguments.seconds))
            found = await windows(going, arguments.seconds)
    return Report(f"{arguments.jobs} jobs", table(found), [asdict(window) for window in found])


async def windows(going: Run, seconds: float) -> list[Window]:
    return [
        await going.window("nobody reports", seconds, None),
        await going.window("signs of life", seconds, 0),
        await going.window("a step every minute", seconds, REPORTS_A_STEP),
    ]


def table(found: Sequence[Window]) -> str:
    head = ("", "reports a second", "operator's CPU, %", "its most MiB", "its API calls", "API server's CPU, %")
    return command.table(head, map(_row, found))


def _row(w: Window) -> tuple[str, ...]:
    calls = ", ".join(f"{count:,} {name}" for name, count in w.calls.items()) or "none"
    rate, cpu, server = w.reports / w.seconds, w.operator_cpu_percent, w.api_server_cpu_percent
    return w.name, f"{rate:.0f}", f"{cpu:.1f}", f"{w.operator_mib:.0f}", calls, f"{server:.0f}"


def main() -> int:
    parser = command.parser(__doc__, jobs=1000, limit=1800)
    parser.add_argument("--seconds", type=float, default=60, help="of each window")
    return command.run("hack.bench.heartbeats", parser.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
