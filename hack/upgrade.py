"""The operator and CRD of an earlier tree against those of this one: no upgrade may change what becomes of a job.

    git worktree add --detach /tmp/old v0.1.0 && python -m hack.upgrade --old /tmp/old

Under the old pair, jobs are brought into every state that lasts. Then one half is upgraded and every job touched, and
so the other half, once in either order. No job may change its phase or its RayCluster, or be charged for a restart;
then each resumes or goes on, and succeeds. Pods and drivers are written, not run. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hack.bench import fleet
from hack.bench.client import APPLY, MERGE, Client, meanwhile, until
from hack.bench.control_plane import ADMIN, ControlPlane, Process, isolated
from hack.bench.nodes import Nodes, stamp, trained
from hack.cluster import settings
from hack.cluster.kube import Object
from hack.cluster.steps import ClusterError, fail, say

LIMIT_SECONDS = 90.0
QUIET_SECONDS = 3.0
QUEUE = "trainers"
# What the drivers of the earlier tree do not say yet, and its CRD does not hold.
NEW_PROGRESS = ("activityTime", "podUid", "attempt", "productiveSeconds")
ORDERS = ("CRD first", "operator first")
# Every state that lasts, and the phase that the job shows in it.
STATES = {
    "suspended": "Suspended",
    "refused": "Pending",
    "queued": "Queued",
    "provisioning": "Provisioning",
    "starting": "Starting",
    "running": "Running",
    "paused": "Suspended",
    "succeeded": "Succeeded",
    "failed": "Failed",
}
WITHOUT_PODS = ("queued", "provisioning")
ENDED = ("succeeded", "failed")


CONFIG_MAPS = f"/api/v1/namespaces/{fleet.NAMESPACE}/configmaps"
QUEUES = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{fleet.NAMESPACE}/localqueues"
QUEUE_OBJECT: Object = {
    "apiVersion": "kueue.x-k8s.io/v1beta2",
    "kind": "LocalQueue",
    "metadata": {"name": QUEUE},
    "spec": {},
}


def job(state: str) -> Object:
    made = fleet.RLHFJOB.make(state)
    made["spec"] |= {
        "suspended": {"suspend": True},
        "queued": {"queue": {"name": QUEUE}},
        "refused": {"queue": {"name": "no-such-queue"}},
    }.get(state, {})
    return made


def kueue() -> Iterator[Object]:
    """As much of Kueue's CRDs as the operator reads."""
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    for plural, kind in (("localqueues", "LocalQueue"), ("workloads", "Workload")):
        version = {
            "name": "v1beta2",
            "served": True,
            "storage": True,
            "schema": {"openAPIV3Schema": free},
            "subresources": {"status": {}},
        }
        names = {"plural": plural, "kind": kind}
        spec = {"group": "kueue.x-k8s.io", "scope": "Namespaced", "names": names, "versions": [version]}
        name = {"name": f"{plural}.kueue.x-k8s.io"}
        yield {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": name,
            "spec": spec,
        }


@dataclass(frozen=True)
class Look:
    """A job as its user sees it, and what must not be made anew."""

    phase: str
    cluster_uid: str | None
    restarts: int


@dataclass
class Upgrade:
    plane: ControlPlane
    client: Client
    nodes: Nodes
    old: Path
    new: Path
    operator: Process
    found: list[str] = field(default_factory=list)
    touches: int = 0

    async def prepare(self) -> None:
        """Every job in its state, under the old pair."""
        for state in STATES:
            await self.client.send("POST", fleet.RLHFJOBS, job(state))
        with_pods = [state for state in STATES if state not in (*WITHOUT_PODS, "suspended", "refused")]
        await until("all pods", lambda: self._have_pods(with_pods), LIMIT_SECONDS)
        for state in with_pods:
            if state != "starting":
                await self.report(state, trained(5))
        await self.phases(dict.fromkeys(("running", "paused", *ENDED), "Running"))
        await self.nodes.tell(self.nodes.heads["succeeded"], ended(0), "driver")
        await self.nodes.tell(self.nodes.heads["failed"], ended(64), "driver")
        await self.edit("paused", {"suspend": True})
        await self.report("paused", {**trained(6), "state": "Drained"})
        await self.phases(STATES)

    async def _have_pods(self, states: list[str]) -> bool:
        return all(state in self.nodes.heads for state in states)

    async def report(self, state: str, progress: Object) -> None:
        told = {key: value for key, value in progress.items() if key not in NEW_PROGRESS} | {
            "totalSteps": 1000,
            "reportTime": stamp(),
        }
        body = {
            "apiVersion": "rlhf.dev/v1alpha1",
            "kind": "RLHFJob",
            "metadata": {"name": state},
            "status": {"progress": told},
        }
        await self.client.send(
            "PATCH", f"{fleet.RLHFJOBS}/{state}/status?fieldManager=rlhf-driver&force=true", body, APPLY
        )

    async def edit(self, state: str, spec: Object) -> None:
        await self.client.send("PATCH", f"{fleet.RLHFJOBS}/{state}", {"spec": spec}, MERGE)

    async def phases(self, wanted: dict[str, str]) -> None:
        """Wait for them."""
        seen: dict[str, str] = {}

        async def all_seen() -> bool:
            seen.update({state: look.phase for state, look in (await self.looks()).items() if state in wanted})
            return seen == wanted

        await until(f"phases {wanted}", all_seen, LIMIT_SECONDS, lambda: f"they are {seen}")

    async def looks(self) -> dict[str, Look]:
        jobs = (await self.client.send("GET", fleet.RLHFJOBS))["items"]
        clusters = (await self.client.send("GET", fleet.RAYCLUSTERS))["items"]
        uids = {owner["name"]: c["metadata"]["uid"] for c in clusters for owner in c["metadata"]["ownerReferences"]}
        statuses = {j["metadata"]["name"]: j.get("status", {}) for j in jobs}
        return {
            name: Look(status.get("phase", ""), uids.get(name), status.get("restarts", {}).get("total", 0))
            for name, status in statuses.items()
        }

    async def upgrade(self, order: str) -> None:
        """Half by half, with a look after each."""
        before = await self.looks()
        halves = {"CRD": self._crd, "operator": self._operator}
        first = order.split()[0]
        for half in (first, *(set(halves) - {first})):
            await halves[half]()
            await self._touch()
            await self._quiet()
            self._compare(f"{order}: after the {half}", before, await self.looks())

    async def _crd(self) -> None:
        await asyncio.to_thread(self.plane.install_tree, self.new)

    async def _operator(self) -> None:
        await asyncio.to_thread(self.plane.end, self.operator, signal.SIGTERM)
        self.operator = self.plane.operator(self.new, "new-operator")

    async def _touch(self) -> None:
        """What makes an operator look at every job and tells it nothing; and a driver's report."""
        self.touches += 1
        mark = {"metadata": {"annotations": {"touched": str(self.touches)}}}
        for state in STATES:
            await self.client.send("PATCH", f"{fleet.RLHFJOBS}/{state}", mark, MERGE)
        for pod in (await self.client.send("GET", fleet.PODS))["items"]:
            await self.client.send("PATCH", f"{fleet.PODS}/{pod['metadata']['name']}", mark, MERGE)
        await self.report("running", trained(6 + self.touches))

    async def _quiet(self) -> None:
        """Until no status was written for QUIET_SECONDS, and the operator had time to start."""
        seen, since = "", time.monotonic()

        async def quiet() -> bool:
            nonlocal seen, since
            now = json.dumps(
                [j.get("status") for j in (await self.client.send("GET", fleet.RLHFJOBS))["items"]], sort_keys=True
            )
            if now != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > QUIET_SECONDS and await self._leads()

        await until("quiet", quiet, LIMIT_SECONDS)

    async def _leads(self) -> bool:
        return self.operator.handle.poll() is None and b"serving" in self.operator.log.read_bytes()

    def _compare(self, when: str, before: dict[str, Look], after: dict[str, Look]) -> None:
        changed = [
            f"{when}: {state} was {before[state]}, is {after[state]}"
            for state in STATES
            if before[state] != after[state]
        ]
        self.found += changed
        say(f"{when}: {len(changed) or 'nothing'} changed")

    async def go_on(self, order: str) -> None:
        """Each job that is not over gets further, and ends well."""
        living = [state for state in STATES if state not in ENDED]
        await self.client.send("POST", QUEUES, {**QUEUE_OBJECT, "metadata": {"name": "no-such-queue"}})
        for state in ("suspended", "paused"):
            await self.edit(state, {"suspend": False})
        await self._admit("provisioning")
        await self._admit("queued", suspended=True)
        await self._admit("refused", suspended=True)
        await until("the pods of all that resumed", lambda: self._have_pods(living), LIMIT_SECONDS)
        self._run_config_readable(order, await self.client.send("GET", f"{CONFIG_MAPS}/paused-run"))
        for state in living:
            await self.report(state, {**trained(7), "resumedFromStep": 6})
        await self.phases(dict.fromkeys(living, "Running"))
        for state in living:
            await self.nodes.tell(self.nodes.heads[state], ended(0), "driver")
        await self.phases({**dict.fromkeys(living, "Succeeded"), "succeeded": "Succeeded", "failed": "Failed"})

    async def _admit(self, state: str, suspended: bool = False) -> None:
        """As Kueue admits the RayCluster, and as KubeRay then makes its pods."""
        path = f"{fleet.RAYCLUSTERS}/{state}-1"
        await until(f"RayCluster {state}-1", lambda: self._is_there(f"{state}-1"), LIMIT_SECONDS)
        await self.client.send("PATCH", path, {"spec": {"suspend": False}} if suspended else {}, MERGE)
        await self.nodes.make(await self.client.send("GET", path))

    async def _is_there(self, cluster: str) -> bool:
        return any(
            c["metadata"]["name"] == cluster for c in (await self.client.send("GET", fleet.RAYCLUSTERS))["items"]
        )

    def _run_config_readable(self, order: str, config_map: Object) -> None:
        """`image` is the old one: its driver must read what the new operator wrote."""
        script = "import pathlib, sys; from rlhf_api.run import RunConfig; RunConfig.read(pathlib.Path(sys.argv[1]))"
        file = self.plane.cfg.state / "run.yaml"
        file.write_text(config_map["data"]["run.yaml"])
        environment = {**os.environ, "PYTHONPATH": str(self.old / "api")}
        done = subprocess.run(
            [sys.executable, "-c", script, str(file)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            self.found.append(
                f"{order}: the old image cannot read the run config of a resumed job: {done.stderr[-600:]}"
            )


def ended(exit_code: int) -> dict[str, Any]:
    reason = {
        "reason": "Error" if exit_code else "Completed",
        "message": "spec.data: no such file" if exit_code else "",
    }
    return {"terminated": {"exitCode": exit_code, "startedAt": stamp(), "finishedAt": stamp(), **reason}}


async def run(order: str, old: Path, new: Path) -> list[str]:
    """What went wrong in this order."""
    async with AsyncExitStack() as stack:
        plane = stack.enter_context(ControlPlane())
        plane.install_all(old)
        for crd in kueue():
            schema = plane.cfg.state / f"{crd['metadata']['name']}.json"
            schema.write_text(json.dumps(crd))
            plane.install(schema)
        operator = plane.operator(old, "old-operator")
        client = await stack.enter_async_context(Client.connect(plane.kubeconfig(ADMIN)))
        await client.send("POST", QUEUES, QUEUE_OBJECT)
        nodes = Nodes(client, without_pods=WITHOUT_PODS)
        upgrade = Upgrade(plane, client, nodes, old, new, operator)
        try:
            async with meanwhile(nodes.run()):
                await upgrade.prepare()
                await upgrade.upgrade(order)
                await upgrade.go_on(order)
        except ClusterError as error:
            say(f"the end of {upgrade.operator.log.name}:\n{upgrade.operator.words()}")
            upgrade.found.append(f"{order}: {error}")
        return upgrade.found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="tree of the earlier version")
    parser.add_argument("--new", type=Path, default=settings.from_environment().clone, help="tree of the later one")
    arguments = parser.parse_args()
    if (status := isolated("hack.upgrade", sys.argv[1:])) is not None:
        return status
    try:
        found = [line for order in ORDERS for line in asyncio.run(run(order, arguments.old, arguments.new))]
    except ClusterError as error:
        return fail(error)
    print("\n".join(found) or f"{len(STATES)} jobs, either order: nothing changed, and each went on")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
