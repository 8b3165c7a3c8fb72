"""`kubectl rlhf report`: one HTML file that tells a run from what lies in its checkpoint.path, without any network."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from rlhf_cli.exits import NoFiles
from rlhf_cli.run_files import Attempt, Run, attempts, checkpoints, sample_files, samples, scalars, turns
from rlhf_cli.text import utc
from rlhf_client.job import Job

Raw = dict[str, Any]
PAGE = Path(__file__).parent / "page"
UPLOT_VERSION = "1.6.32"
DIGITS = 5
BINS = 30
# The page stays below 5 MB: 1,000 steps of 60 metrics are 0.5 MB, and these are the rest.
SAMPLE_BYTES = 2_000_000
LOG_BYTES = 1_000_000
LOG_HEAD, LOG_TAIL = 8_000, 56_000  # characters of one attempt
TEXT_CHARACTERS = 6_000
TOKENS = 512  # of a sample, with their log probabilities


def html(run: Run, source: str, job: Job | None) -> str:
    """The whole page. `source`: where the run lies, in words. `job`: as a cluster has it, where there is one."""
    title = escape(job.name if job else Path(source).name or source)
    data = json.dumps(facts(run, source, job), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "%TITLE%": title, "%UPLOT_CSS%": asset("uPlot.min.css"), "%CSS%": asset("page.css"),
        "%UPLOT_VERSION%": UPLOT_VERSION, "%UPLOT_JS%": asset("uPlot.iife.min.js"), "%JS%": asset("page.js"),
        "%DATA%": data,
    }  # fmt: skip
    return re.sub("|".join(parts), lambda found: parts[found[0]], asset("page.html"))


def asset(name: str) -> str:
    """A part of a page."""
    return (PAGE / name).read_text()


def facts(run: Run, source: str, job: Job | None) -> Raw:
    """What the page shows, as JSON."""
    found = scalars(run)
    steps = sorted({step for values in found.values() for step in values})
    histograms = list(_histograms(run))
    shown, note = _samples(run)
    whole, model = checkpoints(run)
    failures = [one.model_dump(mode="json", by_alias=True) for one in job.status.failures] if job else []
    return {
        "source": source, "made": utc().strftime("%Y-%m-%d %H:%M UTC"), "steps": steps,
        "series": {name: [_short(values.get(step)) for step in steps] for name, values in sorted(found.items())},
        "histograms": histograms, "samples": shown, "samplesNote": note,
        "attempts": list(_attempts(attempts(run))), "failures": failures, "turns": turns(run),
        "checkpoints": [
            {"step": one.step, "attempt": one.attempt, "version": one.version, "GiB": round(one.bytes / 2**30, 3),
                "name": one.name} for one in whole
        ],
        "model": yaml.safe_dump(model, sort_keys=False) if model else "",
        "configuration": yaml.safe_dump(job.spec, sort_keys=False) if job else "", "versions": _versions(job),
        "unread": run.unread,
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _versions(job: Job | None) -> list[str]:
    try:
        own = version("rlhf-cli")
    except PackageNotFoundError:  # run from a tree
        own = "unknown"
    return [f"page by rlhf-cli {own}", *([f"image {job.spec.get('image')}"] if job else [])]


def _histograms(run: Run) -> Iterator[Raw]:
    """Of each recorded step's rewards, over one range for all."""
    rewards = dict[int, list[float]]()
    for step, path in sample_files(run).items():
        try:
            rewards[step] = [row["reward"] for row in samples(path, ["reward"]) if row["reward"] is not None]
        except NoFiles as error:
            run.miss(path, str(error).partition(": no samples of a step: ")[2] or error)
    every = [one for values in rewards.values() for one in values if math.isfinite(one)]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    high = high if high > low else low + 1.0
    for step, values in rewards.items():
        counts = [0] * BINS
        for one in values:
            if math.isfinite(one):
                counts[min(BINS - 1, int((one - low) / (high - low) * BINS))] += 1
        yield {"step": step, "low": _short(low), "high": _short(high), "counts": counts}


def _samples(run: Run) -> tuple[list[Raw], str]:
    """Texts of the newest recorded step and of the first, as many as there is room for."""
    files = sample_files(run)
    chosen = list(dict.fromkeys([*list(files)[-1:], *list(files)[:1]]))
    shown, room, every = list[Raw](), SAMPLE_BYTES, 0
    for step in chosen:
        try:
            rows = samples(files[step])
        except NoFiles:
            continue  # named by the histograms
        every += len(rows)
        means = _group_means(rows)
        for row in rows:
            one = _sample(row, means)
            if (room := room - len(json.dumps(one))) < 0:
                break
            shown.append(one)
    left = f"; {every - len(shown)} more are in its files" if every > len(shown) else ""
    return shown, f"Samples of step {' and step '.join(map(str, chosen))}: {len(shown)} of {every}{left}. " \
        "Click one to read it. The trainer's own log probabilities are not recorded, the engine's are."


def _group_means(rows: Sequence[Raw]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["uid"], []).append(row["reward"])
    return {uid: fmean(rewards) for uid, rewards in groups.items()}


def _sample(row: Raw, means: dict[str, float]) -> Raw:
    advantages = [one for one in row.get("advantages") or () if one is not None]
    return {
        "step": row["step"], "sample": row["sample"], "group": row["uid"], "reward": _short(row["reward"]),
        "parts": {name: _short(value) for name, value in row["parts"] or ()},
        "advantage": _short(fmean(advantages)) if advantages else None, "length": len(row["token_ids"]),
        "finish": row["finish_reason"], "group mean": _short(means[row["uid"]]),
        "prompt": row["prompt"][:TEXT_CHARACTERS], "completion": row["completion"][:TEXT_CHARACTERS],
        "tokens": row["token_ids"][:TOKENS], "versions": row["versions"][:TOKENS],
        "logprobs": [round(one, 2) if math.isfinite(one) else 0.0 for one in row["logprobs"][:TOKENS]],
    }  # fmt: skip


def _attempts(found: Sequence[Attempt]) -> Iterator[Raw]:
    """The newest have their logs; of a long one its beginning and its end."""
    room, told = LOG_BYTES, list[Raw]()
    for one in reversed(found):
        text = one.log
        if len(text) > LOG_HEAD + LOG_TAIL:
            cut = len(text) - LOG_HEAD - LOG_TAIL
            text = f"{text[:LOG_HEAD]}\n({cut} characters are left out here)\n{text[-LOG_TAIL:]}"
        room -= len(text.encode())
        told.append({"number": one.number, "error": one.error, "log": text if room >= 0 else "(left out for room)"})
    yield from reversed(told)
