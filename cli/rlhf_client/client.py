"""The client: everything that a user does with an RLHFJob in a cluster. `kubectl rlhf` is made of it.

    async with Client() as client:
        job = await client.submit(RLHFJob(metadata=ObjectMeta(name="maths"), spec=RLHFJobSpec(...)))
        async for seen in client.watch(job.name):
            print(seen.progress.step, seen.progress.reward)
        await client.wait(job.name)
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from rlhf_api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from rlhf_client import files as own
from rlhf_client import names
from rlhf_client.errors import (
    AlreadyThere,
    ClientError,
    Gone,
    JobFailed,
    NoConnection,
    NotFound,
    NotInstalled,
    Refused,
    TimedOut,
    nearest,
)
from rlhf_client.http import Http
from rlhf_client.job import Job
from rlhf_client.kubeconfig import Connection, connect

if TYPE_CHECKING:
    from rlhf_api.job import RLHFJob

Raw = dict[str, Any]
FIELD_MANAGER = "kubectl-rlhf"
PAGE = 500
WATCH_SECONDS = 300  # after which the API server ends a watch, and it begins anew
AGAIN_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # in which a watch outlives an API server that is away
MERGE = "application/merge-patch+json"


class Client:
    """Of one cluster and one namespace. Every call raises ClientError."""

    def __init__(self, connection: Connection | None = None) -> None:
        """connection: by kubeconfig.connect, which is also the default."""
        self.connection = connection or connect()
        self.namespace = self.connection.namespace
        self._http = Http(self.connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """What `async with` does at its end."""
        await self._http.close()

    # jobs

    async def jobs(self, *, everywhere: bool = False) -> list[Job]:
        """By namespace and name. `everywhere`: of all namespaces."""
        path = f"/apis/{GROUP}/{VERSION}/{PLURAL}" if everywhere else self._jobs()
        try:
            jobs = [Job.of(raw) for raw in await self._all(path)]
        except NotFound:
            raise _not_installed() from None
        return sorted(jobs, key=lambda job: (job.namespace, job.name))

    async def get(self, name: str) -> Job:
        """Raises NotFound, with the nearest name that there is."""
        try:
            if name:
                return Job.of(await self._http.json("GET", self._jobs(name)))
            raise NotFound(name)
        except NotFound:
            known = [job.name for job in await self.jobs()]  # NotInstalled where the kind is unknown
            there = f"; there are {', '.join(known[:8])}" if known else ""
            raise NotFound(f"no RLHFJob {name} in namespace {self.namespace}{nearest(name, known)}{there}") from None

    async def submit(
        self, job: "RLHFJob | Mapping[str, Any]", *, files: Mapping[str, bytes] | None = None,
    ) -> Job:
        """Create it in the client's namespace. `files`: contents by name, which its pods find in /files; together at
        most 1 MiB. Raises InvalidJob before anything is sent, AlreadyThere, OtherVersion for a field that the cluster's
        CRD lacks, Refused.
        """
        raw = dict(job) if isinstance(job, Mapping) else _written(job)
        if not files:
            return await self._create(raw)
        own.checked(files)
        tried = own.config_map(str(raw["metadata"]["name"]), files)
        with suppress(AlreadyThere):  # a right that is missing is told before the job is there
            await self._http.json("POST", self._config_maps(), params={"dryRun": "All"}, body=tried)
        made = await self._create(own.mounted(raw))
        try:
            await self.attach(made, files)
        except ClientError:
            await self.stop(made.name)  # its pods would wait for the files for ever
            raise
        return made

    async def attach(self, job: Job, files: Mapping[str, bytes]) -> None:
        """The ConfigMap of its files, as `submit` makes it. Raises Refused where it has other ones."""
        name, wanted = names.files(job.name), own.config_map(job.name, files, job.uid)
        try:
            await self._http.json("POST", self._config_maps(), body=wanted)
            return
        except AlreadyThere:
            there = await self._http.json("GET", self._config_maps(name))
        if own.owned_by(there, job.uid) and own.same(there, wanted):
            return
        if own.owned_by(there, job.uid) or (there["metadata"].get("labels") or {}).get(names.JOB_LABEL) != job.name:
            raise Refused(f"ConfigMap {name} is there already, and holds something else: run the job under another "
                "metadata.name")
        await self._http.json("DELETE", self._config_maps(name))  # a former job's, which is going anyway
        await self._http.json("POST", self._config_maps(), body=wanted)

    async def _create(self, raw: Raw) -> Job:
        from rlhf_api.parse import parse_job

        parse_job({**raw, "metadata": {"namespace": self.namespace, **raw.get("metadata", {})}})
        query = {"fieldValidation": "Strict", "fieldManager": FIELD_MANAGER}
        try:
            return Job.of(await self._http.json("POST", self._jobs(), params=query, body=raw))
        except AlreadyThere:
            name = raw["metadata"]["name"]
            raise AlreadyThere(f"an RLHFJob {name} is in namespace {self.namespace} already: follow it by kubectl "
                f"rlhf watch {name}, delete it by kubectl rlhf stop {name}, or take another name") from None
        except NotFound as error:
            raise _not_installed() if "namespaces" not in str(error) else error from None

    async def suspend(self, name: str) -> Job:
        """Save, and release every pod."""
        return await self._set_suspend(name, True)

    async def resume(self, name: str) -> Job:
        return await self._set_suspend(name, False)

    async def stop(self, name: str) -> None:
        """Delete the job; its pods go with it. With runPolicy.finalSave it saves first."""
        await self.get(name)
        await self._http.json("DELETE", self._jobs(name))

    async def _set_suspend(self, name: str, value: bool) -> Job:
        await self.get(name)  # for the words of a wrong name
        body = {"spec": {"suspend": value}}
        return Job.of(await self._http.json("PATCH", self._jobs(name), body=body, content=MERGE))

    # over time

    async def watch(self, name: str) -> AsyncIterator[Job]:
        """The job now, and again whenever it changed, until it has ended. Raises Gone when it is deleted. An API server
        that is away for less than a minute is waited for.
        """
        job = await self.get(name)
        uid, away = job.uid, 0.0
        while True:
            yield job
            if job.ended:
                return
            try:
                async for changed in self._changes(job):
                    job, away = changed, 0.0
                    yield job
                    if job.ended:
                        return
                job = await self._same(name, uid)
            except NoConnection:
                if (away := away + AGAIN_SECONDS) > PATIENCE_SECONDS:
                    raise
                await asyncio.sleep(AGAIN_SECONDS)

    async def wait(self, name: str, *, timeout_seconds: float | None = None) -> Job:
        """Until it has succeeded. Raises JobFailed, Gone, TimedOut."""
        job: Job | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                async for seen in self.watch(name):
                    job = seen
        except TimeoutError:
            at = f"it is {job.phase} at step {job.progress.display}" if job else "the API server did not answer"
            raise TimedOut(f"{name} did not end within {timeout_seconds:g} s: {at}") from None
        assert job is not None
        if job.phase == "Failed":
            raise JobFailed(name, job.status.reason or "", job.status.message or "")
        return job

    async def _changes(self, job: Job) -> AsyncIterator[Job]:
        """Until the watch ends, which it does by itself. A version that is too old ends it too."""
        query = {
            "watch": "true", "fieldSelector": f"metadata.name={job.name}", "timeoutSeconds": str(WATCH_SECONDS),
            "resourceVersion": str(job.raw["metadata"].get("resourceVersion", "")), "allowWatchBookmarks": "true",
        }
        async for line in self._http.lines(self._jobs(), query, silent_seconds=WATCH_SECONDS + 30.0):
            try:
                event = json.loads(line)
                kind, raw = event["type"], event["object"]
            except (ValueError, KeyError):  # a line that was cut off with the connection
                return
            if kind == "ERROR":
                return
            if kind == "BOOKMARK" or raw["metadata"]["name"] != job.name:
                continue
            if kind == "DELETED" or raw["metadata"].get("uid") != job.uid:
                raise Gone(f"RLHFJob {job.name} was deleted")
            yield Job.of(raw)

    async def _same(self, name: str, uid: str) -> Job:
        try:
            job = await self.get(name)
        except NotFound:
            raise Gone(f"RLHFJob {name} was deleted") from None
        if job.uid != uid:
            raise Gone(f"RLHFJob {name} was deleted, and another one has its name")
        return job

    # pods

    async def pods(self, name: str) -> list[Raw]:
        """Of the job, as they are."""
        own = {"labelSelector": f"{names.JOB_LABEL}={name}"}
        return await self._all(f"/api/v1/namespaces/{self.namespace}/pods", own)

    async def logs(
        self, name: str, *, pod: str = "", container: str = names.DRIVER, follow: bool = False, previous: bool = False,
        tail: int | None = None,
    ) -> AsyncIterator[str]:
        """Lines of one container; of the newest head pod by default. `previous`: of the container before the present
        one. Raises NotFound where there is no such pod, or it has written nothing yet.
        """
        pod = pod or await self.head(name)
        query = {"container": container, **({"follow": "true"} if follow else {}),
            **({"previous": "true"} if previous else {}), **({"tailLines": str(tail)} if tail is not None else {})}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{quote(pod, safe='')}/log"
        async for line in self._http.lines(path, query, silent_seconds=None if follow else 30.0):
            yield line

    async def head(self, name: str) -> str:
        """Name of the newest head pod. Raises NotFound."""
        await self.get(name)
        heads = [one for one in await self.pods(name) if one["metadata"]["labels"].get(names.ROLE_LABEL) == names.HEAD]
        if not heads:
            raise NotFound(f"{name} has no head pod now, so there is no log in the cluster: the driver's output is "
                "kept in checkpoint.path/logs")
        newest = max(heads, key=lambda one: one["metadata"].get("creationTimestamp", ""))
        return str(newest["metadata"]["name"])

    async def events(self, name: str) -> list[Raw]:
        """Kubernetes' events about the job and what is named after it."""
        found = await self._all(f"/api/v1/namespaces/{self.namespace}/events")
        return [one for one in found if str(one.get("involvedObject", {}).get("name", "")).startswith(name)]

    async def read(self, path: str) -> Raw:
        """Any object of the API server, by its path."""
        return await self._http.json("GET", path)

    async def _all(self, path: str, query: Mapping[str, str] | None = None) -> list[Raw]:
        items, more = list[Raw](), ""
        while True:
            params = {"limit": str(PAGE), **(query or {}), **({"continue": more} if more else {})}
            page = await self._http.json("GET", path, params=params)
            items += page.get("items") or []
            if not (more := (page.get("metadata") or {}).get("continue") or ""):
                return items

    def _config_maps(self, name: str = "") -> str:
        root = f"/api/v1/namespaces/{quote(self.namespace, safe='')}/configmaps"
        return f"{root}/{quote(name, safe='')}" if name else root

    def _jobs(self, name: str = "") -> str:
        root = f"/apis/{GROUP}/{VERSION}/namespaces/{quote(self.namespace, safe='')}/{PLURAL}"
        return f"{root}/{quote(name, safe='')}" if name else root


def _written(job: "RLHFJob") -> Raw:
    """What the user set alone, so that an older CRD is not sent fields that it lacks."""
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    meta = job.metadata.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec}


def _not_installed() -> ClientError:
    return NotInstalled(f"this cluster has no {PLURAL}.{GROUP}: install the operator (helm install rlhf-operator "
        "charts/rlhf-operator --namespace rlhf-system --create-namespace), or choose another --context")
