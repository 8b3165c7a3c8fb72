"""The files of a run, as the worker's own writers leave them: what the report and the others read is no imitation."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.feed import replay
from rlhf_worker.feed.logs import DriverLog
from rlhf_worker.feed.telemetry import TensorBoard
from rlhf_worker.storage import Store
from rlhf_worker.trainer.checkpoint import sealed
from rlhf_worker.trainer.fence import Fence, Writer

TRACE = 'Traceback (most recent call last):\n  File "loop.py", line 3, in step\nEnginesLost: 0 of 2 engines serve\n'


def values(step: int, attempt: int) -> dict[str, float]:
    """Metrics of one step; those of the loop's names that the page treats by name, and one that is not finite."""
    learnt = 1 - math.exp(-step / 30)
    return {
        "reward/mean": learnt, "reward/std": 0.1 * attempt, "reward/exact": learnt, "rollout/length": 100.0 + step,
        "rollout/tokens_per_second": 1000.0, "rollout/staleness": 0.5, "rollout/staleness_max": 1.0,
        "train/loss": math.nan if step == 2 else 0.1, "train/kl": 0.001 * step, "mismatch/abs": 0.01,
        "sync/seconds": 0.02, "seconds/generate": 2.0, "seconds/forward": 0.5, "seconds/shape": 0.1,
        "seconds/train": 1.0, "seconds/sync": 0.1, "seconds/step": 4.0, "seconds/productive": 4.0 * step,
    }  # fmt: skip


def scored(step: int, prompts: int = 4, size: int = 4, tokens: int = 8) -> list[ScoredSample]:
    found = []
    for at in range(prompts * size):
        text = f"what is {at // size} </script> & 2?"
        prompt = Prompt(uid=f"0:{at // size}", epoch=0, row=at // size, token_ids=[1, 2], text=text, fields={})
        sample = Sample(prompt=prompt, text=f"answer {at} of step {step} 🦊", finish_reason="stop",
            token_ids=np.arange(tokens, dtype=np.int32), logprobs=-0.1 * np.arange(tokens, dtype=np.float32),
            mask=np.ones(tokens, np.bool_), versions=np.full(tokens, step - 1, np.int32))  # fmt: skip
        reward = float(at % size) / size
        found.append(ScoredSample(sample=sample, reward=reward, parts={"exact": reward}))
    return found


def make(root: Path, steps: int = 40, every: int = 10) -> Path:
    """Two attempts: the first dies after three quarters of the steps, the second goes on from half of them."""
    store, half = Store(str(root)), steps // 2
    for attempt, (first, last) in enumerate([(1, steps * 3 // 4), (half + 1, steps)], start=1):
        writer = Writer(job="uid-maths", attempt=attempt, driver=f"driver-{attempt}")
        fence = Fence(store, writer)
        fence.take()
        fence.resume("" if attempt == 1 else f"step-{half}.{Writer('uid-maths', 1, 'driver-1').mark}")
        board, log = TensorBoard(store.url("tensorboard"), first), DriverLog(str(root), attempt)
        for step in range(first, last + 1):
            board.log(step, values(step, attempt))
            log.add(f"step {step}/{steps}  reward {step / steps:.3f}  1000 tok/s  version {step}  4.00 s (x)\n")
            if step % every == 0:
                items = scored(step)
                replay.write(store, step, items, [0.5 for _ in items])
            if step in (half, steps):
                checkpoint(root, f"step-{step}.{writer.mark}", step)
        board.close()
        log.add(TRACE if attempt == 1 else "exported the model\n")
    return root


def checkpoint(root: Path, name: str, step: int) -> None:
    (root / name).mkdir()
    model: dict[str, Any] = {"path": "some/model", "lora": None, "model_type": "qwen3", "hidden_size": 64}
    files = {"policy/part.json": [1 << 20, 7]}
    content = {"step": step, "version": step, "model": model, "sampler": {}, "loop": {}, "files": files}
    (root / name / "run.json").write_bytes(sealed(content))


def spoil(root: Path) -> None:
    """As a crash, a full disk and a stray hand leave it."""
    events = sorted((root / "tensorboard").iterdir())[-1]
    events.write_bytes(events.read_bytes()[:-7])
    parquet = sorted((root / "rollouts").iterdir())[0]
    parquet.write_bytes(parquet.read_bytes()[:100])
    (root / "fence" / "00000003.json").write_text('{"number": 3')
    (root / "logs" / "attempt-2" / "00000.log").write_bytes(b"caf\xe9 \xff\nstep 1")
    (root / "logs" / "attempt-x").mkdir()
    (root / "step-7.attempt-1-00000000").mkdir()
    (root / "step-8.attempt-1-00000000").mkdir()
    (root / "step-8.attempt-1-00000000" / "run.json").write_text(json.dumps([1]))
