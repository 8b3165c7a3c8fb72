"""`kubectl rlhf status`: everything about one job on one page. Pure: from the job, what its driver printed, and the
time, to lines of rich's markup.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.markup import escape

from rlhf_api.status import Condition, Failure
from rlhf_cli.advice import what_to_do
from rlhf_cli.history import Step
from rlhf_cli.text import age, short, sparkline
from rlhf_client.job import Job

COLOURS = {"Succeeded": "green", "Running": "green", "Failed": "red", "Restarting": "yellow", "Suspended": "blue"}
LABEL = 12  # characters before a curve
CURVE = 60


def page(job: Job, history: Sequence[Step], now: datetime, width: int) -> Iterator[str]:
    yield from _head(job, now)
    yield from _progress(job)
    yield from curves(history, width)
    yield from _section("placement", _placement(job))
    yield from _section("conditions", (_condition(one, now) for one in job.status.conditions))
    if failure := job.last_failure:
        yield from _section(f"last failure ({_restarts(job)})", _failure(failure, now))
    yield from _section("what to do", map(escape, what_to_do(job)))
    if job.not_understood:
        yield from _section("written by a newer operator, not shown", map(escape, job.not_understood))


def _section(title: str, lines: Iterator[str] | list[str]) -> Iterator[str]:
    rows = list(lines)
    if rows:
        yield ""
        yield f"[bold]{title}[/bold]"
        yield from (f"  {row}" for row in rows)


def _head(job: Job, now: datetime) -> Iterator[str]:
    phase, status = job.phase or "not seen by an operator", job.status
    reason = f" ({escape(status.reason)})" if status.reason else ""
    facts = [f"{status.gpus} GPU{'s' if status.gpus > 1 else ''}" if status.gpus else "", status.mode or "",
        f"queue {status.queue}" if status.queue else "", f"goodput {status.goodput}" if status.goodput else "",
        f"age {age(job.raw['metadata'].get('creationTimestamp'), now)}"]
    colour = COLOURS.get(phase, "default")
    yield f"[bold]{escape(job.name)}[/bold]  [{colour}]{escape(phase)}[/{colour}]{reason}"
    yield "  ".join(escape(fact) for fact in facts if fact)
    if status.message and status.message != (job.last_failure.message if job.last_failure else None):
        yield escape(status.message)


def _progress(job: Job) -> Iterator[str]:
    progress = job.progress
    if progress.total_steps:
        share = min(1.0, progress.step / progress.total_steps)
        filled = round(share * 30)
        bar = f"[green]{'━' * filled}[/green][dim]{'━' * (30 - filled)}[/dim]"
        eta = f"  eta {progress.eta}" if progress.eta and not job.ended else ""
        yield f"step {progress.display}  {bar} {share:.0%}{eta}"
    facts = {
        "reward": progress.reward, "tokens/s": progress.tokens_per_second, "KL": progress.kl,
        "mismatch": progress.mismatch, "weights": str(progress.sync.version) if progress.sync else None,
        "checkpoint": f"step {progress.checkpoint.step}" if progress.checkpoint else None,
    }
    if told := "  ".join(f"{name} {escape(value)}" for name, value in facts.items() if value):
        yield told
    yield from (escape(words) for words in (progress.detail, progress.degraded, progress.save_error)
        if words and not job.ended)


def curves(history: Sequence[Step], width: int) -> Iterator[str]:
    """Reward and throughput, with the first and the last value."""
    if len(history) < 2:
        return
    room = max(8, min(CURVE, width - LABEL - 24))
    lines = {"reward": [one.reward for one in history], "tokens/s": [one.tokens_per_second for one in history]}
    for name, values in lines.items():
        ends = f"{short(values[0])} … {short(values[-1])}"
        yield f"{name.ljust(LABEL)}[cyan]{sparkline(values, room)}[/cyan]  {ends}"


def _placement(job: Job) -> list[str]:
    """Nothing for a spec that this client cannot read."""
    from rlhf_api.parse import parse_lenient
    from rlhf_api.placement import plan_placement
    from rlhf_cli.placement import drawn

    read = parse_lenient(job.raw)
    if read.job is None or read.problems:
        return []
    return list(map(escape, drawn(plan_placement(read.job.spec))))


def _condition(one: Condition, now: datetime) -> str:
    mark = {"True": "[green]✓[/green]", "False": "[dim]–[/dim]", "Unknown": "[yellow]?[/yellow]"}[one.status]
    words = f": {escape(one.message)}" if one.message else ""
    return f"{mark} {one.type} [dim]{age(one.last_transition_time, now)}[/dim] {escape(one.reason)}{words}"


def _restarts(job: Job) -> str:
    counts = job.status.restarts.model_dump(exclude={"total"})
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"restarts: {told}" if told else "no restarts"


def _failure(failure: Failure, now: datetime) -> Iterator[str]:
    facts = [f"{failure.failure_class}: {failure.reason}", f"{age(failure.time, now)} ago", f"step {failure.step}",
        f"attempt {failure.attempt}" if failure.attempt is not None else "",
        f"exit code {failure.exit_code}" if failure.exit_code is not None else "",
        f"signal {failure.signal}" if failure.signal is not None else "", f"pod {failure.pod}" if failure.pod else ""]
    yield escape(", ".join(fact for fact in facts if fact))
    yield escape(failure.message)
    yield from (f"[dim]{escape(line)}[/dim]" for line in (failure.words or "").splitlines())


def live_page(job: Job, history: Sequence[Step], now: datetime, width: int) -> Iterator[str]:
    """The part of the page that changes while one looks."""
    yield from _head(job, now)
    yield from _progress(job)
    yield from curves(history, width)
    yield from _section("amiss", (_condition(one, now) for one in job.troubles()))
    yield from _section("what to do", map(escape, what_to_do(job)))
