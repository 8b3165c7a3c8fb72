"""An engine's actor stopped, and so killed, in a whole run: training goes on, it comes back, every prompt is trained
once.

That a stopped core is found is shown on the cluster (tests/cluster/test_faults.py).
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hack.tiny_model import write
from tests.worker.checkpoints import checkpoint
from tests.worker.processes import named
from tests.worker.test_vllm_run import DEADLINE, changed, command

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(900)]


def test_a_lost_engine_costs_no_prompt_and_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "model")
    manifest = changed(
        tmp_path, rollout={"engines": 2}, trainer={"steps": 400}, placement={"mode": "Separated"},
        telemetry={"rolloutsEverySteps": 1},
        checkpoint={"everySteps": 100},
    )  # fmt: skip
    process = subprocess.Popen(
        command(manifest, tmp_path / "model", tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    start, seen, back = time.monotonic(), list[str](), False
    for text in process.stdout:
        seen.append(text)
        assert time.monotonic() - start < DEADLINE, "".join(seen)
        if text.startswith("step 3/"):
            os.kill(named(process.pid, "ray::Engine")[-1], signal.SIGSTOP)
        if back and text.startswith("step "):
            process.send_signal(signal.SIGTERM)
        back = back or (
            bool(re.match(r"engine \d: stale -> healthy \(synced\)", text)) and any("-> dead" in line for line in seen)
        )
    output = "".join(seen)
    assert process.wait(60) == 143, output
    died, came = (next(i for i, line in enumerate(seen) if part in line) for part in ("-> dead", "restarting -> stale"))
    assert any(line.startswith("step ") for line in seen[died:came]), output  # meanwhile training went on
    uids = [
        uid for file in (tmp_path / "out" / "rollouts").glob("*.parquet")
        for uid in pq.read_table(file, columns=["uid"]).column("uid").to_pylist()
    ]
    assert {uids.count(uid) for uid in uids} == {8}
    steps = [int(match[1]) for line in seen if (match := re.match(r"step (\d+)/", line))]
    assert len(set(uids)) == 16 * steps[-1] == 16 * len(steps)
    assert (tmp_path / "out" / "latest").read_text() == checkpoint(tmp_path / "out", steps[-1]).name
