"""A thousand jobs at once on one API server: how long until all have their RayCluster, and what that costs.

    python -m hack.bench.scale --jobs 1000 [--kuberay MANAGER --kuberay-crds DIRECTORY] [--pods none|standin|kuberay]

No node runs: pods stay Pending. With KubeRay's own operator and CRDs, as many RayJobs of the same pods are measured
after it in the same way. Needs root. Prints a table and the same as one line of JSON, and each column as soon as it is
known, which a run that is cut off shows too.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hack.bench import command, fleet
from hack.bench.client import Client, each, meanwhile, until
from hack.bench.command import AT_ONCE, Report
from hack.bench.control_plane import KUBERAY, OPERATOR, ControlPlane, Process
from hack.bench.fleet import Kind, Timeline
from hack.bench.usage import Calls, news
from hack.cluster.components import Identity
from hack.cluster.kube import Object

QUIET_SECONDS = 10.0  # so long nothing changes, and it is the end
LEFTOVERS = (
    "/api/v1/namespaces/default/configmaps",
    "/api/v1/namespaces/default/secrets",
    "/api/v1/namespaces/default/services",
)


@dataclass
class Result:
    """One column of the table. Times in seconds, memory in MiB; the operator is that of the kind."""

    kind: str
    jobs: int
    applied: float = 0.0
    all_clusters: float = 0.0
    all_pods: float = 0.0
    steady: float = 0.0
    status_behind_median: float = 0.0
    status_behind_most: float = 0.0
    settled_behind_median: float = 0.0
    settled_behind_most: float = 0.0
    api_server_cpu_a_job: float = 0.0
    operator_cpu: float = 0.0
    operator_mib: float = 0.0
    kuberay_cpu: float = 0.0
    calls_a_job: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    kuberay_calls_a_job: float = 0.0
    idle_calls: int = 0
    idle_watches: int = 0
    idle_operator_cpu: float = 0.0
    idle_api_server_cpu: float = 0.0
    deleted: float = 0.0
    deleted_all: float = 0.0


ROWS: tuple[tuple[str, str], ...] = (
    ("jobs", "jobs"),
    ("applied", "all applied, s"),
    ("all_clusters", "last apply to all RayClusters, s"),
    ("all_pods", "last apply to all pods, s"),
    ("steady", "last apply to the last change, s"),
    ("status_behind_median", "RayCluster to a status that knows it, median s"),
    ("status_behind_most", "the same, most s"),
    ("settled_behind_median", "last change to the last status, median s"),
    ("settled_behind_most", "the same, most s"),
    ("api_server_cpu_a_job", "API server's CPU a job, s"),
    ("operator_cpu", "operator's CPU, s"),
    ("operator_mib", "operator's memory at most, MiB"),
    ("kuberay_cpu", "KubeRay's CPU, s"),
    ("calls_a_job", "operator's API calls a job"),
    ("kuberay_calls_a_job", "KubeRay's API calls a job"),
    ("idle_calls", "operator's calls while nothing changes"),
    ("idle_watches", "watches renewed meanwhile"),
    ("idle_operator_cpu", "operator's CPU meanwhile, s"),
    ("idle_api_server_cpu", "API server's CPU meanwhile, s"),
    ("deleted", "delete to no job, RayCluster and pod, s"),
    ("deleted_all", "delete to nothing left, s"),
)


@dataclass
class Series:
    """One kind of job on a fresh control plane. `operator` is the process that serves it."""

    plane: ControlPlane
    client: Client
    timeline: Timeline
    operator: Process
    kuberay: Process | None
    pods: int  # of a job; 0: nobody makes them
    limit: float

    async def measure(self, count: int, idle_seconds: float) -> Result:
        result = Result(self.timeline.kind.name, count)
        calls = (Calls(self.plane.audit_log), Calls(self.plane.audit_log))
        for log in calls:
            log.since_last(OPERATOR)
        await self._burst(result, calls, min(QUIET_SECONDS, idle_seconds))
        await self._idle(result, calls[0], idle_seconds)
        print(f"before they are deleted:\n\n{table([result])}\n", flush=True)
        await self._delete(result)
        return result

    async def _burst(self, result: Result, calls: tuple[Calls, Calls], quiet: float) -> None:
        kind, names = self.timeline.kind, fleet.names(result.jobs)
        before = [self._cpu(part) for part in (self.plane.api_server, self.operator, self.kuberay)]
        begun = time.monotonic()
        await each(names, lambda name: self.client.send("POST", kind.path, kind.make(name)), AT_ONCE)
        last = time.monotonic()
        result.applied = last - begun
        result.all_clusters = (
            await self._until("all RayClusters", lambda: len(self.timeline.clusters) >= result.jobs) - last
        )
        if self.pods:
            every = self.pods * result.jobs
            result.all_pods = await self._until("all pods", lambda: len(self.timeline.pods) >= every) - last
        await self._until("the last change", lambda: time.monotonic() - self.timeline.moved > quiet)
        result.steady = self.timeline.moved - last
        server, operator, kuberay = (
            self._cpu(part) - old
            for part, old in zip((self.plane.api_server, self.operator, self.kuberay), before, strict=True)
        )
        result.api_server_cpu_a_job, result.operator_cpu, result.kuberay_cpu = server / result.jobs, operator, kuberay
        result.operator_mib = self.operator.usage().peak_mib
        self._told(result, calls)

    def _told(self, result: Result, calls: tuple[Calls, Calls]) -> None:
        first, last = fleet.lags(self.timeline)
        result.status_behind_median, result.status_behind_most = statistics.median(first), first[-1]
        result.settled_behind_median, result.settled_behind_most = statistics.median(last), last[-1]
        found = calls[0].since_last(self._identity())
        result.calls = dict(found.most_common())
        result.calls_a_job = sum(found.values()) / result.jobs
        result.kuberay_calls_a_job = sum(calls[1].since_last(KUBERAY).values()) / result.jobs

    def _identity(self) -> Identity:
        return KUBERAY if self.operator is self.kuberay else OPERATOR

    async def _idle(self, result: Result, calls: Calls, seconds: float) -> None:
        before = [self._cpu(part) for part in (self.operator, self.plane.api_server)]
        await asyncio.sleep(seconds)
        after = [self._cpu(part) for part in (self.operator, self.plane.api_server)]
        result.idle_operator_cpu, result.idle_api_server_cpu = (
            new - old for new, old in zip(after, before, strict=True)
        )
        found = calls.since_last(self._identity())
        result.idle_calls, result.idle_watches = news(found), sum(found.values()) - news(found)

    async def _delete(self, result: Result) -> None:
        kind, names = self.timeline.kind, fleet.names(result.jobs)
        begun = time.monotonic()
        await each(names, lambda name: self.client.send("DELETE", f"{kind.path}/{name}"), AT_ONCE)
        there = self.timeline
        result.deleted = await self._until("the end", lambda: not (there.jobs or there.clusters or there.pods)) - begun
        result.deleted_all = await until("the end of all else", self._nothing_left, self.limit) - begun

    async def _nothing_left(self) -> bool:
        lists = [await self.client.send("GET", f"{path}?limit=500") for path in LEFTOVERS]
        return not any(item["metadata"].get("ownerReferences") for found in lists for item in found["items"])

    async def _until(self, what: str, reached: Callable[[], bool]) -> float:
        """When it was reached."""

        async def now() -> bool:
            return reached()

        return await until(what, now, self.limit, self._there)

    def _there(self) -> str:
        there = self.timeline
        return f"{len(there.jobs)} jobs, {len(there.clusters)} RayClusters and {len(there.pods)} pods are there"

    @staticmethod
    def _cpu(part: Process | None) -> float:
        return part.usage().cpu_seconds if part else 0.0


async def warmed_up(client: Client, kind: Kind, pods: int, limit: float) -> Object:
    """One job and its RayCluster, made and deleted again: every watch stands then. Returns the RayCluster."""
    await client.send("POST", kind.path, kind.make("warm-up"))
    await until("the first RayCluster", lambda: _at_least(client, fleet.RAYCLUSTERS, 1), limit)
    await until("the first pod", lambda: _at_least(client, fleet.PODS, pods), limit)
    cluster: Object = (await client.send("GET", fleet.RAYCLUSTERS))["items"][0]
    await client.send("DELETE", f"{kind.path}/warm-up")
    await until("the end of the first job", lambda: _nothing_runs(client), limit)
    return cluster


async def _at_least(client: Client, path: str, number: int) -> bool:
    return await client.count(path) >= number


async def _nothing_runs(client: Client) -> bool:
    return not await client.count(fleet.RAYCLUSTERS) and not await client.count(fleet.PODS)


async def series(arguments: argparse.Namespace, kind: Kind, cluster: Object | None) -> tuple[Result, Object]:
    """One kind on a fresh control plane, with the RayCluster of its first job. `cluster`: what the kind was made of."""
    async with command.standing(arguments.tree, arguments.kuberay_crds) as (plane, client):
        kuberay = _kuberay(plane, arguments.pods if cluster is None else "kuberay", arguments.kuberay)
        operator = plane.operator(arguments.tree, lease=False) if cluster is None else kuberay
        assert operator is not None
        first = await warmed_up(client, kind, 0 if kuberay is None else 1, 60)
        timeline, pods = Timeline(kind, client), fleet.pods_of(first) if kuberay else 0
        await timeline.begin()
        one = Series(plane, client, timeline, operator, kuberay, pods, arguments.limit)
        async with meanwhile(timeline.follow_jobs(), timeline.follow_clusters(), timeline.follow_pods()):
            return await one.measure(arguments.jobs, arguments.idle_seconds), first


def _kuberay(plane: ControlPlane, pods: str, program: Path | None) -> Process | None:
    if pods == "none":
        return None
    return plane.standin() if pods == "standin" or program is None else plane.kuberay(program)


def table(results: Sequence[Result]) -> str:
    rows = ((words, *(_figure(getattr(result, name)) for result in results)) for name, words in ROWS)
    return command.table(("", *(result.kind for result in results)), rows)


def _figure(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if value < 1 else f"{value:,.1f}"


async def measure(arguments: argparse.Namespace) -> Report:
    result, cluster = await series(arguments, fleet.RLHFJOB, None)
    results = [result]
    if arguments.kuberay:
        print(f"{table(results)}\n", flush=True)
        results.append((await series(arguments, fleet.rayjob(cluster), cluster))[0])
    return Report(f"pods: {arguments.pods}", table(results), [asdict(result) for result in results])


def parse() -> argparse.Namespace:
    parser = command.parser(__doc__, jobs=1000, limit=1800)
    parser.add_argument("--kuberay", type=Path, help="KubeRay's operator, to measure RayJobs too")
    parser.add_argument("--kuberay-crds", type=Path, help="the directory of its CRDs")
    whose = "who makes the RLHFJobs' pods; default: KubeRay where it is given"
    parser.add_argument("--pods", choices=("none", "standin", "kuberay"), help=whose)
    parser.add_argument("--idle-seconds", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.kuberay and not arguments.kuberay_crds:
        parser.error("--kuberay needs --kuberay-crds: its operator serves no RayJob without them")
    arguments.pods = arguments.pods or ("kuberay" if arguments.kuberay else "none")
    return arguments


if __name__ == "__main__":
    sys.exit(command.run("hack.bench.scale", parse(), measure))
