"""Two operators and one lease: how long nobody acts when the leader is killed, or told to end.

    python -m hack.bench.handover --jobs 100 --rounds 3

Each round ends the leader, then applies a job, and takes the time from the signal to that job's RayCluster; the ended
operator comes back as the standby. Calls that made or deleted something twice are in the last line. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from hack.bench import command, fleet
from hack.bench.client import Client, each, until
from hack.bench.command import AT_ONCE, Report
from hack.bench.control_plane import OPERATOR, ControlPlane, Process
from hack.bench.usage import Calls
from hack.cluster.kube import Object

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
FIRST_PORT = 8100


@dataclass
class Replica:
    process: Process
    port: int

    async def leads(self) -> bool:
        return bool((await self._livez() or {}).get("leader"))

    async def waits(self) -> bool:
        found = await self._livez()
        return found is not None and not found["leader"]

    async def _livez(self) -> Object | None:
        """None while it does not answer."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return None
        writer.write(b"GET /livez HTTP/1.0\r\n\r\n")
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
        found: Object | None = json.loads(body) if body else None
        return found


@dataclass
class Pair:
    """One leads and one waits."""

    plane: ControlPlane
    client: Client
    tree: Path
    limit: float
    replicas: list[Replica] = field(default_factory=list)
    ports: Callable[[], int] = field(default_factory=lambda: count(FIRST_PORT).__next__)

    async def start(self) -> None:
        await self.add(Replica.leads)
        await self.add(Replica.waits)

    async def add(self, state: Callable[[Replica], Coroutine[None, None, bool]]) -> None:
        """One more operator; returns when it is in that state."""
        port = self.ports()
        replica = Replica(self.plane.operator(self.tree, f"rlhf-operator-{port}", port), port)
        self.replicas.append(replica)
        await until(f"{state.__name__} of {replica.process.name}", lambda: state(replica), self.limit)

    async def handed_over(self, number: signal.Signals, job: str) -> float:
        """Seconds from the signal to the RayCluster of a job that was applied when the leader had ended."""
        leader, begun = self.replicas.pop(0), time.monotonic()
        await asyncio.to_thread(self.plane.end, leader.process, number)
        await self.client.send("POST", fleet.RLHFJOBS, fleet.RLHFJOB.make(job))
        done = await until(f"the RayCluster after {number.name}", lambda: has_clusters(self.client, [job]), self.limit)
        await self.add(Replica.waits)
        return done - begun


async def has_clusters(client: Client, jobs: list[str]) -> bool:
    found = {item["metadata"]["name"] for item in (await client.send("GET", fleet.RAYCLUSTERS))["items"]}
    return found >= {f"{job}-1" for job in jobs}


async def measure(arguments: argparse.Namespace) -> Report:
    """Seconds by signal, and what was called more often than once a job."""
    async with command.standing(arguments.tree) as (plane, client):
        pair, calls = Pair(plane, client, arguments.tree, arguments.limit), Calls(plane.audit_log)
        jobs = fleet.names(arguments.jobs)
        await pair.start()
        await each(jobs, lambda job: client.send("POST", fleet.RLHFJOBS, fleet.RLHFJOB.make(job)), AT_ONCE)
        await until("all RayClusters", lambda: has_clusters(client, jobs), arguments.limit)
        taken = {
            number.name: [await pair.handed_over(number, f"{number.name.lower()}-{n}") for n in range(arguments.rounds)]
            for number in SIGNALS
        }
        more = twice(calls.since_last(OPERATOR), len(jobs) + len(SIGNALS) * arguments.rounds)
    title = f"{arguments.jobs} jobs, done twice: {more or 'nothing'}"
    return Report(title, table(taken), {"seconds": taken, "twice": more})


def table(taken: dict[str, list[float]]) -> str:
    rows = ((name, ", ".join(f"{s:.1f}" for s in seconds), f"{max(seconds):.1f}") for name, seconds in taken.items())
    return command.table(("leader ended by", "seconds until the other acts", "most"), rows)


def twice(calls: Counter[str], jobs: int) -> dict[str, int]:
    """RayClusters made more often than there are jobs, or deleted at all. Refused calls count."""
    more = {"create rayclusters": calls["create rayclusters"] - jobs, "delete rayclusters": calls["delete rayclusters"]}
    return {name: number for name, number in more.items() if number}


def main() -> int:
    parser = command.parser(__doc__, jobs=100, limit=300)
    parser.add_argument("--rounds", type=int, default=3, help="of each signal")
    return command.run("hack.bench.handover", parser.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
