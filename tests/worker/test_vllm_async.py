"""A whole run whose generation and training overlap, with an environment, and its resume: real Ray, real vLLM, the tiny
model.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hack.tiny_model import write
from tests.worker.checkpoints import checkpoint
from tests.worker.test_vllm_run import changed, run

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(1200)]
STEPS, GROUP = 6, 8
AGAIN = """
class Environment:
    def reset(self, **row):
        self.turns = 0
    def step(self, completion):
        self.turns += 1
        return {"observation": " and?", "done": self.turns == 2, "reward": 0.0}
"""


def samples(out: Path, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "rollouts" / f"step-{step}.parquet").to_pylist()
    return rows


def uids(out: Path, steps: range) -> Counter[str]:
    return Counter(row["uid"] for step in steps for row in samples(out, step))


def test_staleness_environment_and_resume(tmp_path: Path) -> None:
    write(tmp_path / "model")
    manifest = changed(
        tmp_path, rollout={"staleness": 1, "maxTokens": 40, "environment": {"code": AGAIN, "workers": 1}},
        trainer={"steps": STEPS},
        placement={"mode": "Separated"}, telemetry={"rolloutsEverySteps": 1}, checkpoint={"everySteps": 3},
    )  # fmt: skip
    first = run(manifest, tmp_path / "model", tmp_path / "first")
    assert first.code == 0, first.output
    whole = [row for step in range(1, STEPS + 1) for row in samples(first.checkpoints, step)]
    assert any(len(set(row["versions"])) > 1 for row in whole)  # the weights changed under running requests
    for step in range(1, STEPS + 1):  # with one update a step, versions count steps
        assert all(step - 1 - row["versions"][0] <= 1 for row in samples(first.checkpoints, step))
    assert any(not all(row["mask"]) for row in whole) and all(row["mask"][0] for row in whole)
    assert all(
        value == 0.0 for row in whole for value, ours in zip(row["logprobs"], row["mask"], strict=True) if not ours
    )

    pending = json.loads((checkpoint(first.checkpoints, 3) / "run.json").read_text().splitlines()[0])["loop"]["pending"]
    shutil.copytree(checkpoint(first.checkpoints, 3), tmp_path / "second" / "step-3")
    second = run(manifest, tmp_path / "model", tmp_path / "second")
    assert second.code == 0, second.output
    done = uids(first.checkpoints, range(1, 4)) + uids(second.checkpoints, range(4, STEPS + 1))
    assert set(done.values()) == {GROUP}
    assert len(pending) == 16 and set(pending) <= set(done)
