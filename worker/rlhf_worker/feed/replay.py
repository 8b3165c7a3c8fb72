"""The samples of a step as a Parquet file, and `rlhf_worker replay`, which prints them and scores them anew."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_api.job import RewardSpec
from rlhf_api.parse import InvalidJob, load_job
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import NO_TOKENS, Column, Prompt, Sample, ScoredSample
from rlhf_worker.rewards.scorer import Scorer
from rlhf_worker.storage import Store

FILE = re.compile(r"step-(\d+)\.parquet")
SAME = 1e-9  # values of a reward that differ by less are equal
Row = dict[str, Any]

SCHEMA = pa.schema(
    {
        "step": pa.int64(), "sample": pa.int64(), "uid": pa.string(), "prompt": pa.string(),
        "prompt_token_ids": pa.list_(pa.int32()),
        "fields": pa.string(),  # the row's other columns, as JSON
        "completion": pa.string(), "token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()),
        "mask": pa.list_(pa.bool_()),
        "versions": pa.list_(pa.int32()), "finish_reason": pa.string(), "episode_reward": pa.float64(),
        "reward": pa.float64(), "parts": pa.map_(pa.string(), pa.float64()),
        "advantages": pa.list_(pa.float32()),  # null where they were not given
        "source": pa.string(), "rewards": pa.list_(pa.string()),  # of data.sources; null: all
    }
)  # fmt: skip
LATER = ("source", "rewards")  # columns that older files lack


def write(
    store: Store, step: int, scored: Sequence[ScoredSample], advantages: Sequence[Column] | None = None,
) -> None:
    """rollouts/step-<step>.parquet, whole or not at all. `advantages`: of each sample, one a completion token, or one
    for all of them. Raises OSError.
    """
    given: Sequence[Column | None] = advantages or [None] * len(scored)
    rows = [_row(step, i, item, own) for i, (item, own) in enumerate(zip(scored, given, strict=True))]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
    store.write(f"rollouts/step-{step}.parquet", buffer.getvalue())


def _row(step: int, index: int, item: ScoredSample, advantages: Column | None) -> Row:
    sample, prompt = item.sample, item.sample.prompt
    if advantages is not None:
        advantages = np.where(sample.mask, advantages, np.float32(0))
    return {
        "step": step, "sample": index, "uid": prompt.uid, "prompt": prompt.text, "prompt_token_ids": prompt.token_ids,
        "fields": json.dumps(prompt.fields, default=str), "completion": sample.text, "token_ids": sample.token_ids,
        "logprobs": sample.logprobs,
        "mask": sample.mask, "versions": sample.versions, "finish_reason": sample.finish_reason,
        "episode_reward": sample.episode_reward,
        "reward": item.reward, "parts": list(item.parts.items()),
        "advantages": advantages, "source": prompt.source, "rewards": prompt.rewards,
    }  # fmt: skip


def read(path: Path, step: int | None = None) -> list[ScoredSample]:
    """Of a file, or of one step (the newest by default) in a directory of them or in a checkpoint.path. Raises BadData.
    """
    file = path if path.is_file() else _file(path, step)
    try:
        table = pq.read_table(file)
        names = [name for name in SCHEMA.names if name in table.column_names or name not in LATER]
        rows = table.select(names).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise BadData(f"{file}: no samples of a step: {error}") from None
    return [_scored(row) for row in rows]


def _file(path: Path, step: int | None) -> Path:
    folder = path / "rollouts" if (path / "rollouts").is_dir() else path
    there = {int(found[1]): file for file in folder.glob("*.parquet") if (found := FILE.fullmatch(file.name))}
    if not there:
        raise BadData(f"{folder}: no step-N.parquet: give a checkpoint.path, its directory rollouts, or a file "
            "(telemetry.rolloutsEverySteps makes them)")
    if step is not None and step not in there:
        raise BadData(f"{folder}: no samples of step {step}, only of {', '.join(map(str, sorted(there)))}")
    return there[max(there) if step is None else step]


def _scored(row: Row) -> ScoredSample:
    epoch, number = ["", *row["uid"].split(":")][-2:]
    prompt = Prompt(
        uid=row["uid"], epoch=int(epoch) if epoch.isdigit() else 0, row=int(number), token_ids=row["prompt_token_ids"],
        text=row["prompt"],
        fields=json.loads(row["fields"]), source=row.get("source") or "",
        rewards=tuple(row["rewards"]) if row.get("rewards") else None,
    )  # fmt: skip
    arrays: dict[str, Any] = {name: np.array(row[name], empty.dtype) for name, empty in NO_TOKENS.items()}
    sample = Sample(
        prompt=prompt, text=row["completion"], finish_reason=row["finish_reason"],
        episode_reward=row["episode_reward"], **arrays,
    )  # fmt: skip
    return ScoredSample(sample=sample, reward=row["reward"], parts=dict(row["parts"]))


def show(scored: Sequence[ScoredSample], by_reward: bool, limit: int) -> Iterator[str]:
    """Blocks of text: a summary, then one a sample, the best first where `by_reward`."""
    rewards = [item.reward for item in scored]
    yield f"{len(scored)} samples, reward {sum(rewards) / len(rewards):.3f} ({min(rewards):.3f} to {max(rewards):.3f})"
    order = sorted(range(len(scored)), key=lambda i: -rewards[i]) if by_reward else range(len(scored))
    for index in list(order)[:limit]:
        yield _block(index, scored[index])


def _block(index: int, item: ScoredSample) -> str:
    sample = item.sample
    parts = ", ".join(f"{name} {value:.3f}" for name, value in item.parts.items())
    head = (f"--- sample {index}, prompt {sample.prompt.uid}: reward {item.reward:.3f} ({parts}), "
        f"{len(sample.token_ids)} tokens, {sample.finish_reason}")
    return f"{head}\n{sample.prompt.text}\n>>> {sample.text}"


def compare(stored: Sequence[ScoredSample], specs: Sequence[RewardSpec], limit: int) -> Iterator[str]:
    """Score the same samples by these rewards, and tell how each differs from what is stored. Raises BadSpec or
    RewardFailed.
    """
    mine = [spec.model_copy(update={"on_failure": "stop"}) for spec in specs if spec.type != "model"]
    if not mine:
        raise BadSpec("spec.rewards: all are of type model, which needs the run's GPUs: nothing can be scored here")
    with Scorer(mine) as scorer:
        anew = scorer.score([item.sample for item in stored])
    for spec in specs:
        if spec.type == "model":
            yield f"{spec.name}: of type model, not scored here"
            continue
        yield from _difference(
            spec.name, [item.parts.get(spec.name) for item in stored], [item.parts[spec.name] for item in anew], limit
        )


def _difference(name: str, old: Sequence[float | None], new: Sequence[float], limit: int) -> Iterator[str]:
    known = [value for value in old if value is not None]
    if len(known) < len(new):
        yield f"{name}: not stored; now {sum(new) / len(new):.3f}"
        return
    changed = sorted(
        (i for i in range(len(new)) if abs(new[i] - known[i]) > SAME), key=lambda i: -abs(new[i] - known[i])
    )
    means = f"stored {sum(known) / len(known):.3f}, now {sum(new) / len(new):.3f}"
    yield f"{name}: {means}; {len(changed)} of {len(new)} samples differ"
    yield from (f"  sample {i}: {known[i]:.3f} -> {new[i]:.3f}" for i in changed[:limit])


def replay(path: Path, step: int | None, by_reward: bool, limit: int, job: Path | None) -> None:
    """The command. Raises BadData or BadSpec."""
    stored = read(path, step)
    try:
        rewards = load_job(job).spec.rewards if job else []
    except InvalidJob as error:
        raise BadSpec("; ".join(error.problems)) from error
    for text in compare(stored, rewards, limit) if job else show(stored, by_reward, limit):
        print(text)
