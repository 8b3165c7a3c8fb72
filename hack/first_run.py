"""`make try`: a rising reward within minutes, on this machine, without a cluster.

A model of 80,000 weights learns to write the letter "e", by the very manifest that a cluster would take
(manifests/samples/tiny-colocated.yaml), run by `rlhf_worker local`: a real vLLM engine and a real trainer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from hack.demo import NODE_DIRECTORY, curve

SAMPLE = Path("manifests/samples/tiny-colocated.yaml")
HOME = Path("runs/try")  # stands for the node's directory, which the manifest names
STEP = re.compile(r"^step (\d+)/\d+  reward (-?[\d.]+)")
NEXT = """
The run is in {checkpoints}: checkpoints, metrics, samples.

  .venv/bin/kubectl-rlhf report {checkpoints}     # one page of it, for a browser
  .venv/bin/kubectl-rlhf samples {checkpoints}    # prompts, answers, rewards
  .venv/bin/kubectl-rlhf init                     # a manifest for a model, data and a reward of yours
  make demo                                       # the same on a Kubernetes of this machine, with SmolLM2
"""


def command() -> list[str]:
    volume = f"{NODE_DIRECTORY}={HOME}"
    return [sys.executable, "-m", "rlhf_worker", "local", str(SAMPLE), "--volume", volume]


def followed(lines: list[str]) -> dict[int, float]:
    """The reward of each step, by the lines that a run prints."""
    return {int(found[1]): float(found[2]) for line in lines if (found := STEP.match(line))}


def main() -> int:
    shutil.rmtree(HOME, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "hack.tiny_model", str(HOME / "models/tiny")], check=True)
    process = subprocess.Popen(command(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if code := process.wait():
        return code
    print(f"\nreward\n{curve(followed(lines))}")
    print(NEXT.format(checkpoints=HOME / "checkpoints/tiny-colocated"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
