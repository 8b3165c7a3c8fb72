"""How far the engine's log probabilities are from the trainer's, a token, on the same weights: one GPU, a run each.

usage: python hack/bench/mismatch.py --model DIR [--runs plain nucleus lora] [--steps N] [--device cuda|cpu] [--out DIR]

GRPO on sums of two numbers, Colocated, engines in the model's dtype, and the trainer's weights in float32 with products
in that. Prints a row (`row.py`) a run: the mean over the steps of `mismatch/abs` (mean absolute difference of a sampled
token's two log probabilities) and `mismatch/kl`, and the largest of a step. The exit code is 1 where a run is above
--most. """

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

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nucleus": {"rollout": {"sampling": {"topK": 50, "topP": 0.9}}},
    "lora": {"model": {"lora": {"rank": 16, "alpha": 32}}, "trainer": {"learningRate": 2e-4}},
}
REWARD = '''
def reward(prompt, completion, answer, **row):
    """1 for the answer, and little for a text that holds it."""
    return 1.0 if completion.strip().rstrip(".") == answer else 0.2 * (answer in completion)
'''


def write_prompts(path: Path) -> None:
    """400 sums of two numbers below 100."""
    pairs = [(3 * i % 97, 7 * i % 89) for i in range(1, 401)]
    rows = ({"prompt": f"Question: what is {a} + {b}?\nAnswer:", "answer": str(a + b)} for a, b in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(name: str, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The RLHFJob of one run."""
    extra, cuda = RUNS[name], given.device == "cuda"
    engine = {"kv_cache_memory_bytes": (8 if cuda else 1) << 30, "enforce_eager": True}
    rollout = {"promptsPerStep": given.prompts, "samplesPerPrompt": 8, "maxTokens": 64, "engineArgs": engine}
    trainer = {"steps": given.steps, "learningRate": 1e-5, "tokensPerMicroBatch": 16384}
    spec = {
        "data": {"jsonl": {"path": str(work / "prompts.jsonl")}, "maxPromptTokens": 128},
        "rewards": [{"name": "sum", "type": "python", "code": REWARD, "workers": 2}],
        "placement": {"mode": "Colocated", "gpusPerNode": 1, "fractions": {"trainer": 0.4, "rollout": 0.4}},
        "checkpoint": {"path": str(work / name), "everySteps": 10000, "export": False},
        "model": {"path": str(given.model.absolute()), "dtype": given.dtype} | extra.get("model", {}),
        "rollout": rollout | extra.get("rollout", {}), "trainer": trainer | extra.get("trainer", {}),
    }
    return job(f"mismatch-{name}", **spec)


def measured(name: str, steps: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the row."""
    differences = [step["mismatch/abs"] for step in steps]
    return printed(
        "mismatch", {"run": name, "model": given.model.name, "prompts": given.prompts, "dtype": given.dtype},
        lower={
            "abs": statistics.mean(differences), "abs_most": max(differences),
            "kl": statistics.mean(step["mismatch/kl"] for step in steps),
        },
        steps=len(steps), reward=[step["reward/mean"] for step in steps],
        seconds=statistics.median(step["seconds/step"] for step in steps),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64, help="of a step")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--most", type=float, default=0.0104, help="mean difference that is well: SkyRL's gate")
    parser.add_argument("--out", type=Path, help="keep results here")
    given = parser.parse_args()
    work = (given.out or Path(tempfile.mkdtemp(prefix="mismatch-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    write_prompts(work / "prompts.jsonl")
    worst = 0.0
    for name in given.runs:
        steps = run(manifest(name, given, work), work)["steps"]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        worst = max(worst, measured(name, steps, given)["lower"]["abs"])
    return 0 if worst <= given.most else 1


if __name__ == "__main__":
    sys.exit(main())
