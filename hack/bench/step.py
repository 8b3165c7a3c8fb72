"""Seconds of a whole step, by phase: GRPO, one update a step, by `rlhf_worker local`'s own driver, on one GPU or two.

usage: python hack/bench/step.py [--shape 1.7B] [--vocabulary 49152] [--prompts 128] [--samples 8] [--tokens 512]
  [--steps 6] [--micro-batch 10240] [--fractions 0.9 0.78] [--mode Colocated|Separated] [--staleness 0]
  [--device cuda|cpu] [--out DIR]

A random model, so that nearly all completions have --tokens tokens and each run does the same work. Prints a row
(`row.py`): of each phase the seconds a step, the median after two steps, and the slowest of those over it. """

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.gpu_placement import tokenizer
from hack.bench.local_run import job, run
from hack.bench.row import printed
from hack.bench.training import write_checkpoint
from hack.bench.weight_base import SHAPES

WARM = 2  # steps
PROMPT = 32  # tokens
PHASES = ("seconds/step", "seconds/generate", "seconds/score", "seconds/train", "seconds/sync")
REWARD = '''
def reward(prompt, completion, **row):
    """Something that differs within a group."""
    return len(set(completion.split())) / 100
'''


def write_prompts(path: Path, given: argparse.Namespace) -> None:
    rows = (
        {"prompt": " ".join(f"w{4 + (7 * i + 13 * j) % (given.vocabulary - 4)}" for j in range(PROMPT))}
        for i in range(4 * given.prompts)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    cuda = given.device == "cuda"
    engine = {} if cuda else {"kv_cache_memory_bytes": 1 << 28}
    shares = dict(zip(("trainer", "rollout"), given.fractions, strict=True))
    shared = {"fractions": shares} if given.mode == "Colocated" else {}
    return job(
        "step", model={"path": str(work / "model"), "dtype": given.dtype},
        data={"jsonl": {"path": str(work / "prompts.jsonl")}, "maxPromptTokens": 2 * PROMPT},
        rewards=[{"name": "words", "type": "python", "code": REWARD}],
        rollout={
            "promptsPerStep": given.prompts, "samplesPerPrompt": given.samples, "maxTokens": given.tokens,
            "engineArgs": engine, "staleness": given.staleness,
        },
        trainer={
            "steps": given.steps, "learningRate": 1e-6, "tokensPerMicroBatch": given.micro_batch,
            "gradientCheckpointing": False,
        },
        placement={"mode": given.mode, "gpusPerNode": 1, **shared},
        checkpoint={"path": str(work / "checkpoints"), "everySteps": 1000, "export": False},
    )  # fmt: skip


def measured(steps: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the row. `steps`: what the reporter was told of each."""
    seconds = {phase.removeprefix("seconds/"): [step[phase] for step in steps if phase in step] for phase in PHASES}
    late = {phase: values[WARM:] for phase, values in seconds.items() if values[WARM:]}
    medians = {phase: statistics.median(values) for phase, values in late.items()}
    return printed(
        "step", configuration(given), lower=medians, seconds=seconds,
        worst_over_median=max(late["step"]) / medians["step"],
        told={key: value for key, value in steps[-1].items() if isinstance(value, int | float)},
    )  # fmt: skip


def configuration(given: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "vocabulary", "prompts", "samples", "tokens", "micro_batch", "dtype", "mode", "fractions",
        "staleness")
    return {name: getattr(given, name) for name in names}


def parser(about: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shape", default="1.7B", choices=list(SHAPES))
    found.add_argument("--vocabulary", type=int, default=49152)
    found.add_argument("--prompts", type=int, default=128)
    found.add_argument("--samples", type=int, default=8)
    found.add_argument("--tokens", type=int, default=512)
    found.add_argument("--steps", type=int, default=6)
    found.add_argument("--micro-batch", type=int, default=10240, help="tokens")
    found.add_argument("--fractions", type=float, nargs=2, default=[0.9, 0.78], help="of a GPU's memory, for "
        "trainer and engine, which take turns")
    found.add_argument("--mode", default="Colocated", choices=["Colocated", "Separated"], help="the latter on two GPUs")
    found.add_argument("--staleness", type=int, default=0, help="of a Separated run")
    found.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--out", type=Path, help="keep results here")
    return found


def prepared(given: argparse.Namespace) -> Path:
    """A folder with model, tokenizer and prompts."""
    work = (given.out or Path(tempfile.mkdtemp(prefix="step-"))).absolute()
    (work / "model").mkdir(parents=True, exist_ok=True)
    write_checkpoint(work / "model", given)
    tokenizer(given.vocabulary).save_pretrained(work / "model")
    write_prompts(work / "prompts.jsonl", given)
    return work


def main() -> int:
    options = parser(__doc__)
    given = options.parse_args()
    if given.steps <= WARM:
        options.error(f"--steps must be more than {WARM}: the first ones warm up")
    work = prepared(given)
    measured(run(manifest(given, work), work)["steps"], given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
