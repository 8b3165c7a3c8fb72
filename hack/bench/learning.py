"""SmolLM2-135M-Instruct learns a reasoning-gym task on GPUs: the reward of each step, and where its time goes.

usage: python hack/bench/learning.py --model DIR [--runs colocated lora separated-0 separated-1 ppo] [--steps N] [--out
  DIR]

colocated and lora need one GPU, the others two: separated (1 + 1) with staleness 0 and 1, and PPO with a critic,
colocated on two. Prints a row (`row.py`) and a Markdown table a run: the reward at every fourth step, and the mean
seconds of a step and its phases, the first three left out. """

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.local_run import job, run
from hack.bench.row import printed

WARM = 3
FRACTIONS = {"trainer": 0.2, "rollout": 0.2}
KV_CACHE_BYTES = 8 << 30  # holds all samples of a step
RUNS: dict[str, dict[str, Any]] = {
    "colocated": {"placement": {"mode": "Colocated", "gpusPerNode": 1, "fractions": FRACTIONS}},
    "lora": {
        "placement": {"mode": "Colocated", "gpusPerNode": 1, "fractions": FRACTIONS},
        "model": {"lora": {"rank": 16, "alpha": 32}},
        "trainer": {"learningRate": 2e-4},
    },
    "separated-0": {"placement": {"mode": "Separated", "gpusPerNode": 1}},
    "separated-1": {"placement": {"mode": "Separated", "gpusPerNode": 1}, "rollout": {"staleness": 1}},
    "ppo": {
        "placement": {"mode": "Colocated", "gpusPerNode": 2, "fractions": FRACTIONS}, "trainer": {"gpus": 2},
        "rollout": {"engines": 2},
        "algorithm": {"name": "ppo"}, "critic": {"learningRate": 2e-5},
    },
}
TASK = {
    "task": "chain_sum", "size": 4000,
    "config": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2, "allow_negation": False},
}


def manifest(name: str, model: Path, work: Path, steps: int) -> dict[str, Any]:
    """The RLHFJob of one run."""
    extra = RUNS[name]
    rollout = {
        "promptsPerStep": 64, "samplesPerPrompt": 16, "maxTokens": 64,
        "engineArgs": {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES},
    }
    trainer = {"steps": steps, "learningRate": 4e-5, "tokensPerMicroBatch": 32768, "gradientCheckpointing": False}
    spec = {
        "data": {"reasoningGym": TASK, "maxPromptTokens": 128},
        "rewards": [
            {"name": "answer", "type": "python", "function": "rlhf_worker.rewards.reasoning_gym:score", "workers": 4}
        ],
        "checkpoint": {"path": str(work / name), "everySteps": 10000, "export": False},
        **extra, "model": {"path": str(model), "dtype": "bfloat16"} | extra.get("model", {}),
        "rollout": rollout | extra.get("rollout", {}), "trainer": trainer | extra.get("trainer", {}),
    }
    return job(name, **spec)


def markdown(name: str, steps: list[dict[str, Any]]) -> str:
    shown = [step for step in steps if step["step"] % 4 == 0 or step["step"] == 1]
    warm = steps[WARM:]
    phases = {
        key: statistics.mean(step.get(key, 0.0) for step in warm)
        for key in sorted({key for step in warm for key in step if key.startswith("seconds/")})
    }
    lines = [
        f"### {name}", "", "| step | " + " | ".join(str(step["step"]) for step in shown) + " |",
        "|---|" + "---|" * len(shown),
        "| reward | " + " | ".join(f"{step['reward/mean']:.3f}" for step in shown) + " |", "",
        "| " + " | ".join(key.removeprefix("seconds/") for key in phases) + " |", "|" + "---|" * len(phases),
        "| " + " | ".join(f"{value:.2f}" for value in phases.values()) + " |", "",
    ]
    return "\n".join(lines)


def measured(name: str, steps: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Prints the row."""
    late = [step["reward/mean"] for step in steps[-WARM:]]
    printed(
        "learning", {"run": name, "model": given.model.name, "steps": given.steps},
        lower={"step": statistics.median(step["seconds/step"] for step in steps[WARM:] or steps)},
        higher={"reward": statistics.mean(late)}, rewards=[step["reward/mean"] for step in steps],
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="keep checkpoints and results here")
    given = parser.parse_args()
    work = (given.out or Path(tempfile.mkdtemp(prefix="learning-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    for name in given.runs:
        steps = run(manifest(name, given.model.absolute(), work, given.steps), work)["steps"]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        print(markdown(name, steps), flush=True)
        measured(name, steps, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
