"""What a run tells about itself besides its status: TensorBoard scalars, phase times, rollouts as Parquet."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.tensorboard import SummaryWriter

from rlhf_worker.experience import ScoredSample


class PhaseTimer:
    """Seconds by phase; a phase entered twice adds up, also when it raises."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Telemetry:
    """TensorBoard under `directory`. Steps from `first_step` on are purged: a resumed run logs them again."""

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        self.directory = directory
        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def dump_rollouts(directory: Path, step: int, scored: Sequence[ScoredSample]) -> Path:
    """One Parquet file a step, one row a sample; written under another name first, so that a reader never sees half of it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:06d}.parquet"
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist([_row(item) for item in scored]), partial)
    return partial.replace(path)


def _row(item: ScoredSample) -> dict[str, Any]:
    sample = item.sample
    return {
        "uid": sample.prompt.uid, "prompt": sample.prompt.text, "completion": sample.text, "reward": item.reward,
        "parts": [{"name": name, "value": value} for name, value in item.parts.items()], "finish_reason": sample.finish_reason, "weight_version": sample.weight_version,
        "prompt_token_ids": sample.prompt.token_ids, "token_ids": sample.token_ids, "logprobs": sample.logprobs,
    }
