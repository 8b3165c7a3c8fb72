"""The verbs that need a cluster. Each is a coroutine of a client; `app.py` gives them their options."""

import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_cli.exits import Exit, Wrong, end
from rlhf_cli.history import Step, of_source, steps
from rlhf_cli.options import Output, Target, console
from rlhf_cli.text import age, table, utc
from rlhf_client.errors import AlreadyThere, NotAllowed, NotFound
from rlhf_client.files import mounted
from rlhf_client.job import Job
from rlhf_client.names import RAY

if TYPE_CHECKING:
    from rlhf_client.client import Client

COLUMNS = ("NAME", "PHASE", "STEP", "REWARD", "ETA", "REASON", "TOK/S", "GPUS", "RESTARTS", "AGE", "QUEUE")
KEEP = ("NAMESPACE", "NAME", "PHASE")  # however narrow the terminal is
TAIL = 2000  # lines of the driver's log that the curves of `status` are read from


def say(text: str) -> None:
    """Beside the answer: on standard error, so that a pipe gets the answer alone."""
    print(text, file=sys.stderr, flush=True)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


async def list_jobs(target: Target, output: Output, everywhere: bool) -> None:
    async with target.client() as client:
        jobs = await client.jobs(everywhere=everywhere)
    if output is Output.JSON:
        as_json([job.raw for job in jobs])
    elif jobs:
        _print_table(jobs, everywhere)
    else:
        say(f"no RLHFJobs{'' if everywhere else f' in namespace {client.namespace}'}")


def _print_table(jobs: list[Job], everywhere: bool) -> None:
    columns = ("NAMESPACE", *COLUMNS) if everywhere else COLUMNS
    rows = [((job.namespace, *cells(job)) if everywhere else cells(job)) for job in jobs]
    out = console()
    for line in table(columns, rows, out.width, KEEP):
        out.print(line, markup=False, no_wrap=True, overflow="ellipsis")


def cells(job: Job) -> tuple[str, ...]:
    """One job in COLUMNS."""
    status, progress = job.status, job.progress
    return (
        job.name, job.phase or "-", progress.display, progress.reward or "", (progress.eta or "") if not job.ended
        else "", status.reason or "", progress.tokens_per_second or "", str(status.gpus or ""),
        str(status.restarts.total), age(job.raw["metadata"].get("creationTimestamp"), utc()), status.queue or "",
    )  # fmt: skip


async def status(target: Target, output: Output, name: str) -> None:
    async with target.client() as client:
        job = await client.get(name)
        history = await _history(client, job) if output is Output.TEXT else []
    if output is Output.JSON:
        as_json(job.raw)
    else:
        _print_page(job, history)


def _print_page(job: Job, history: list[Step]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from rlhf_cli.status_page import page

    out = console()
    for line in page(job, history, utc(), out.width):
        told = line.lstrip(" ")  # what is wrapped keeps its place
        shown = Padding(Text.from_markup(told), (0, 0, 0, len(line) - len(told)), expand=False)
        out.print(shown if told else "")


async def _history(client: "Client", job: Job) -> list[Step]:
    """Of the driver's newest log. Nothing where it is gone, or the user may not read it: the status needs no more than
    the right to read the job.
    """
    try:
        return steps([line async for line in client.logs(job.name, tail=TAIL)])
    except (NotFound, NotAllowed):
        return []


# following


async def watch(target: Target, output: Output, name: str) -> None:
    """Until the job ends."""
    async with target.client() as client:
        await _follow(client.watch(name), output, await _history(client, await client.get(name)))


async def run(
    target: Target, output: Output, raw: Mapping[str, Any], files: Mapping[str, bytes], timeout_seconds: float | None,
) -> None:
    """Submit and follow. The process ends as the job does."""
    name = str(raw["metadata"]["name"])
    async with target.client() as client:
        job = await _submitted(client, raw, files)
        try:
            async with asyncio.timeout(timeout_seconds):
                job = await _follow(client.watch(name), output, [])
        except TimeoutError:
            end(Exit.TIMED_OUT, f"{name} did not end within {timeout_seconds:g} s; it goes on: kubectl rlhf watch "
                f"{name}")
        except asyncio.CancelledError:
            end(Exit.INTERRUPTED, f"\n{name} goes on: kubectl rlhf watch {name} follows, stop {name} ends it")
    if job.phase == "Failed":
        end(Exit.FAILED, _epitaph(job))


async def _submitted(client: "Client", raw: Mapping[str, Any], files: Mapping[str, bytes]) -> Job:
    """The job, which may be there already if it is the very same."""
    name = str(raw["metadata"]["name"])
    try:
        job = await client.submit(raw, files=files)
        say(f"rlhfjob/{name} made in namespace {client.namespace}")
    except AlreadyThere:
        job = await client.get(name)
        sent = mounted(raw) if files else raw
        if others := list(differences(sent["spec"], job.spec, "spec")):
            raise AlreadyThere(f"an RLHFJob {name} is there already, with another {', '.join(others[:5])}: change it "
                f"by kubectl apply, or run this one under another metadata.name") from None
        if files:
            await client.attach(job, files)
        say(f"rlhfjob/{name} is there already, and the same")
    return job


def differences(given: Any, there: Any, path: str) -> list[str]:
    """Paths of what was given and is otherwise in the cluster, where defaults were added."""
    if isinstance(given, Mapping) and isinstance(there, Mapping):
        return [one for key, value in given.items() for one in differences(value, there.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(there, list) and len(given) == len(there):
        return [one for at, pair in enumerate(zip(given, there, strict=True))
            for one in differences(*pair, f"{path}[{at}]")]
    return [] if given == there else [path]


def _epitaph(job: Job) -> str:
    """Why it failed, and what to do."""
    from rlhf_cli.advice import what_to_do

    failure = job.last_failure
    words = (failure.words or failure.message) if failure else ""
    lines = [f"{job.name} failed: {job.status.reason}: {job.status.message}", words, *what_to_do(job)]
    return "\n".join(line for line in lines if line)


async def _follow(jobs: AsyncIterator[Job], output: Output, history: list[Step]) -> Job:
    """Show each; the last one."""
    if output is Output.TEXT and sys.stdout.isatty():
        return await _live(jobs, history)
    job, told = None, ""
    async for job in jobs:
        line = json.dumps(job.raw, ensure_ascii=False) if output is Output.JSON else _line(job)
        if line != told:
            print(line, flush=True)
        told = line
    assert job is not None
    return job


def _line(job: Job) -> str:
    progress = job.progress
    facts = {"reward": progress.reward, "tok/s": progress.tokens_per_second, "eta": progress.eta}
    told = "  ".join(f"{name} {value}" for name, value in facts.items() if value and not job.ended)
    return f"{job.phase or '-'}  {job.status.reason or '-'}  {progress.display or '-'}  {told}".rstrip()


async def _live(jobs: AsyncIterator[Job], history: list[Step]) -> Job:
    """The status page's head with a bar, drawn anew in place."""
    from rich.live import Live
    from rich.text import Text

    from rlhf_cli.status_page import live_page

    seen = {one.number: one for one in history}
    job = None
    with Live(console=console(), auto_refresh=False, vertical_overflow="crop") as live:
        async for job in jobs:
            _remember(seen, job)
            lines = live_page(job, [seen[number] for number in sorted(seen)], utc(), live.console.width)
            live.update(Text.from_markup("\n".join(lines)), refresh=True)
    assert job is not None
    return job


def _remember(seen: dict[int, Step], job: Job) -> None:
    progress = job.progress
    if progress.reward and progress.tokens_per_second and progress.step not in seen:
        seen[progress.step] = Step(
            progress.step, progress.total_steps, float(progress.reward), float(progress.tokens_per_second), 0.0,
        )


# logs


async def logs(
    target: Target, name: str, *, source: str, pod: str, follow: bool, previous: bool, tail: int | None,
) -> None:
    """Of the driver, or of the actors of one kind, which print through it; or of Ray's container of one pod."""
    async with target.client() as client:
        if pod:
            await _known_pod(client, name, pod)
            lines = client.logs(name, pod=pod, container=RAY, follow=follow, previous=previous, tail=tail)
            async for line in lines:
                print(line, flush=follow)
            return
        last: deque[str] = deque(maxlen=None if follow or tail is None else tail)
        async for line in client.logs(name, follow=follow, previous=previous):
            for own in of_source([line], source):
                if follow:
                    print(own, flush=True)
                else:
                    last.append(own)
        for line in last:
            print(line)
        if not last and not follow:
            say(f"nothing from {source} in this log; --previous has the one of the driver before")


async def _known_pod(client: "Client", name: str, pod: str) -> None:
    from rlhf_client.errors import nearest

    pods = [str(one["metadata"]["name"]) for one in await client.pods(name)]
    if pod not in pods:
        raise NotFound(f"{name} has no pod {pod}{nearest(pod, pods)}; it has {', '.join(pods) or 'none'}")


# changes


async def suspend(target: Target, name: str) -> None:
    async with target.client() as client:
        job = await client.suspend(name)
    refused = job.condition("Suspended")
    if refused and refused.reason == "WouldLoseCheckpoint":
        raise Wrong(f"{name} is not suspended: {refused.message}")
    say(f"rlhfjob/{name}: saving, then its pods go; kubectl rlhf watch {name} follows")


async def resume(target: Target, name: str) -> None:
    async with target.client() as client:
        await client.resume(name)
    say(f"rlhfjob/{name}: resuming; kubectl rlhf watch {name} follows")


async def stop(target: Target, name: str) -> None:
    async with target.client() as client:
        await client.stop(name)
    say(f"rlhfjob/{name}: deleted; its pods are going")
