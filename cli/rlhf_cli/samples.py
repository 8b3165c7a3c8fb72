"""`kubectl rlhf samples`: prompts, answers, rewards and advantages of a step, as text or JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rlhf_cli import run_files
from rlhf_cli.exits import NoFiles, Wrong
from rlhf_cli.fetch import run_directory
from rlhf_cli.options import Output, Target
from rlhf_client.errors import nearest

Raw = dict[str, Any]
# Ways to order samples; a name with `-` before it is the other way round.
ORDERS: dict[str, Callable[[Raw], float]] = {
    "order": lambda row: float(row["sample"]), "reward": lambda row: -float(row["reward"]),
    "advantage": lambda row: -_advantage(row), "length": lambda row: -float(len(row["token_ids"])),
}


def show(target: Target, where: str, step: int | None, sort: str, limit: int, output: Output) -> None:
    """Raises NoFiles, Wrong, ClientError."""
    name = sort.removeprefix("-")
    if name not in ORDERS:
        raise Wrong(f"--sort {sort}{nearest(name, list(ORDERS))}: one of {', '.join(ORDERS)}, or - before it")
    part = "rollouts" if step is None else f"rollouts/step-{step}.parquet"
    with run_directory(target, where, (part,)) as (folder, _):
        number, path = _file(folder, where, step)
        rows = run_files.samples(path)
    chosen = sorted(rows, key=ORDERS[name], reverse=sort.startswith("-"))[:limit]
    if output is Output.JSON:
        print(json.dumps([_plain(row) for row in chosen], ensure_ascii=False, indent=2, default=str))
        return
    for line in told(number, rows, chosen):
        print(line)


def _file(folder: Path, where: str, step: int | None) -> tuple[int, Path]:
    """Of that step, or the newest."""
    root = folder.parent if folder.name == "rollouts" else folder
    there = run_files.sample_files(run_files.Run(root))
    if not there:
        which = "" if step is None else f" of step {step}"
        raise NoFiles(f"{where}: no samples{which}: telemetry.rolloutsEverySteps makes rollouts/step-N.parquet")
    if step is not None and step not in there:
        raise NoFiles(f"{where}: no samples of step {step}, only of {', '.join(map(str, there))}")
    number = max(there) if step is None else step
    return number, there[number]


def told(step: int, rows: Sequence[Raw], chosen: Sequence[Raw]) -> Iterator[str]:
    if not rows:
        yield f"step {step}: no samples"
        return
    rewards = [float(row["reward"]) for row in rows]
    groups = {row["uid"] for row in rows}
    spread = f"{fmean(rewards):.3f} ± {pstdev(rewards):.3f} ({min(rewards):.3f} to {max(rewards):.3f})"
    yield f"step {step}: {len(rows)} samples of {len(groups)} prompts, reward {spread}"
    for row in chosen:
        yield ""
        yield _head(row)
        yield f"prompt  {row['prompt']}"
        yield f"answer  {row['completion']}"
    if len(chosen) < len(rows):
        yield f"\n{len(rows) - len(chosen)} more: --limit"


def _head(row: Raw) -> str:
    parts = ", ".join(f"{name} {value:.3f}" for name, value in row["parts"] or ())
    versions = sorted(set(row["versions"]))
    made = f"weights {versions[0]}" + (f" to {versions[-1]}" if len(versions) > 1 else "") if versions else "no token"
    advantage = f", advantage {_advantage(row):+.3f}" if row.get("advantages") else ""
    facts = f"{len(row['token_ids'])} tokens, {row['finish_reason']}, {made}"
    return f"── sample {row['sample']}, group {row['uid']}: reward {row['reward']:.3f} ({parts}){advantage}; {facts}"


def _advantage(row: Raw) -> float:
    """Mean over the tokens that are trained."""
    known = [one for one, counts in zip(row.get("advantages") or (), row["mask"], strict=False) if counts]
    return fmean(known) if known else 0.0


def _plain(row: Raw) -> Raw:
    return row | {"parts": dict(row["parts"] or ()), "fields": json.loads(row["fields"] or "{}")}
