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
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from hack.bench import fleet
from hack.bench.client import Client, each, until
from hack.bench.control_plane import ADMIN, OPERATOR, ControlPlane, Process, isolated
from hack.bench.scale import AT_ONCE, CLONE
from hack.bench.usage import Calls, machine
from hack.cluster.kube import Object
from hack.cluster.steps import ClusterError, fail, say

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
        await asyncio.to_thread(leader.process.end, number)
        await self.client.send("POST", fleet.RLHFJOBS, fleet.RLHFJOB.make(job))
        done = await until(f"the RayCluster after {number.name}", lambda: has_clusters(self.client, [job]), self.limit)
        await self.add(Replica.waits)
        return done - begun


async def has_clusters(client: Client, jobs: list[str]) -> bool:
    found = {item["metadata"]["name"] for item in (await client.send("GET", fleet.RAYCLUSTERS))["items"]}
    return found >= {f"{job}-1" for job in jobs}


async def run(arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds by signal, and what was called more often than once a job."""
    async with AsyncExitStack() as stack:
        plane = stack.enter_context(ControlPlane())
        plane.install_all(arguments.tree)
        client = await stack.enter_async_context(Client.connect(plane.kubeconfig(ADMIN)))
        pair, calls, jobs = (
            Pair(plane, client, arguments.tree, arguments.limit),
            Calls(plane.audit_log),
            fleet.names(arguments.jobs),
        )
        try:
            await pair.start()
            await each(jobs, lambda job: client.send("POST", fleet.RLHFJOBS, fleet.RLHFJOB.make(job)), AT_ONCE)
            await until("all RayClusters", lambda: has_clusters(client, jobs), arguments.limit)
            taken = {
                number.name: [
                    await pair.handed_over(number, f"{number.name.lower()}-{n}") for n in range(arguments.rounds)
                ]
                for number in SIGNALS
            }
        except ClusterError:
            for replica in pair.replicas:
                say(f"the end of {replica.process.log.name}:\n{replica.process.words()}")
            raise
        return taken, twice(calls.since_last(OPERATOR), len(jobs) + len(SIGNALS) * arguments.rounds)


def twice(calls: Counter[str], jobs: int) -> dict[str, int]:
    """RayClusters made more often than there are jobs, or deleted at all. Refused calls count."""
    more = {"create rayclusters": calls["create rayclusters"] - jobs, "delete rayclusters": calls["delete rayclusters"]}
    return {name: number for name, number in more.items() if number}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100, help="jobs that are there")
    parser.add_argument("--rounds", type=int, default=3, help="of each signal")
    parser.add_argument("--tree", type=Path, default=CLONE, help="source tree of the operator and its CRD")
    parser.add_argument("--limit", type=float, default=300, help="seconds that each wait may take")
    arguments = parser.parse_args()
    if (status := isolated("hack.bench.handover", sys.argv[1:])) is not None:
        return status
    try:
        taken, more = asyncio.run(run(arguments))
    except ClusterError as error:
        return fail(error)
    print(f"\n{arguments.jobs} jobs; {machine()}\n")
    print("| leader ended by | seconds until the other acts | most |\n|---|---|---|")
    print(
        "\n".join(
            f"| {name} | {', '.join(f'{s:.1f}' for s in seconds)} | {max(seconds):.1f} |"
            for name, seconds in taken.items()
        )
    )
    print(f"\ndone twice: {more or 'nothing'}")
    print(json.dumps({"seconds": taken, "twice": more}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
