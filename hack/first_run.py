"""`make try`: a rising reward within minutes, on this machine, without a cluster.

A model of 80,000 weights learns to write the letter "e", by the very manifest that a cluster would take
(manifests/samples/tiny-colocated.yaml, or another sample by its name), run by `rlhf_worker local`: a real vLLM engine
and a real trainer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from hack import samples
from hack.cluster import settings
from hack.demo import NODE_DIRECTORY, curve, prepare

JOB = "tiny-colocated"
HOME = Path("runs/try")  # stands for the node's directory, which the manifest names
STEP = re.compile(r"^step (\d+)/\d+  reward (-?[\d.]+)")


def command(manifest: Path) -> list[str]:
    volume = f"{NODE_DIRECTORY}={HOME}"
    return [sys.executable, "-m", "rlhf_worker", "local", str(manifest), "--volume", volume]


def followed(lines: list[str]) -> dict[int, float]:
    """The reward of each step, by the lines that a run prints."""
    return {int(found[1]): float(found[2]) for line in lines if (found := STEP.match(line))}


def last_words(job: str) -> str:
    """Where the run is, and how to go on."""
    run, others = HOME / "checkpoints" / job, [name for name in samples.names() if name != job]
    rows = {
        f".venv/bin/kubectl-rlhf report {run}": "one page of it, for a browser",
        f".venv/bin/kubectl-rlhf samples {run}": "prompts, answers, rewards",
        ".venv/bin/kubectl-rlhf init": "a manifest for a model, data and a reward of yours: docs/quickstart.md",
        f"make try JOB={others[-1]}": f"another sample: {', '.join(others)}",
        "make demo": "the same on a Kubernetes of this machine, with SmolLM2",
    }
    width = max(map(len, rows))
    lines = [f"  {command:{width}}  # {words}" for command, words in rows.items()]
    return "\n".join([f"\nThe run is in {run}: checkpoints, metrics, samples.\n", *lines, ""])


def main() -> int:
    job = sys.argv[1] if len(sys.argv) > 1 else JOB
    manifest = samples.found(job)
    shutil.rmtree(HOME, ignore_errors=True)
    prepare(settings.from_environment().cache, HOME, manifest)
    process = subprocess.Popen(command(manifest), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if code := process.wait():
        return code
    print(f"\nreward\n{curve(followed(lines))}")
    print(last_words(job), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
