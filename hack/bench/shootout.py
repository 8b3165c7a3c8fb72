"""A step of GRPO by this project, by TRL and by verl: the same model, prompts, sampling, reward and work on one GPU.

usage: python hack/bench/shootout.py [--rows ours trl verl] [--trl-python PYTHON] [--trl-path DIR] [--verl-python
PYTHON] and the options of `step.py`

128 prompts x 8 samples of up to 512 tokens, Qwen3-1.7B's shape with a vocabulary of 49,152, random weights, float32
weights and bfloat16 products, one update a step, nothing recomputed, no reference model. Ours is `step.py`'s. TRL
1.16.0 and verl 0.9.1 run in environments of their own: the python that an option names, with --trl-path before its
path; micro-batches of 16 sequences for both. Our engine and trainer take turns on the GPU's memory and verl's do; TRL's
engine keeps its half, unless --trl-sleep has it take ours. Prints a row (`row.py`) each:
seconds of every step, weight sync and generation among them, the median after two and the slowest of those over it; a
row that fails says why. The exit code is then 1. """

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench import step
from hack.bench.local_run import run
from hack.bench.row import ROOT, printed

ROWS_OF_A_MICRO_BATCH = 16
CONTEXT = 2 * step.PROMPT
AWAKE = 0.5  # of the GPU's memory, for an engine that keeps it: all sequences fit, and the training beside them
DEADLINE_SECONDS = 1800.0
# verl reads chats, and its reward functions have another signature.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
VERL_REWARD = '''
def reward(data_source, solution_str, ground_truth, extra_info=None, **more):
    return len(set(solution_str.split())) / 100
'''
Seconds = tuple[list[float], dict[str, Any]]


def ours(given: argparse.Namespace, work: Path) -> Seconds:
    steps = run(step.manifest(given, work), work)["steps"]
    return [one["seconds/step"] for one in steps], {"told": steps[-1]}


def trl(given: argparse.Namespace, work: Path) -> Seconds:
    out = work / "trl.json"
    command = [
        given.trl_python, "hack/bench/shootout_trl.py", "--model", work / "model", "--prompts-file",
        work / "prompts.jsonl", "--out", out, "--steps", given.steps, "--prompts", given.prompts, "--samples",
        given.samples, "--tokens", given.tokens, "--context", CONTEXT + given.tokens, "--rows",
        min(ROWS_OF_A_MICRO_BATCH, given.prompts * given.samples), "--utilisation",
        given.fractions[1] if given.trl_sleep else AWAKE, "--device", given.device,
        *(["--sleep"] if given.trl_sleep else []),
    ]  # fmt: skip
    inherited = os.environ.get("PYTHONPATH", "") if given.trl_python == sys.executable else ""
    finished(command, os.pathsep.join(filter(None, [given.trl_path, inherited])), work / "trl.log")
    found = json.loads(out.read_text())
    return found.pop("seconds"), found


def verl(given: argparse.Namespace, work: Path) -> Seconds:
    (work / "verl_reward.py").write_text(VERL_REWARD)
    finished([given.verl_python, "-c", VERL_DATA, work / "prompts.jsonl", work / "verl.parquet"], "", work / "verl.log")
    settings = verl_settings(given, work)
    command = [given.verl_python, "-m", "verl.trainer.main_ppo", *(f"{key}={value}" for key, value in settings.items())]
    said = finished(command, "", work / "verl.log")
    return [float(each) for each in re.findall(r"timing_s/step:(?:np\.float64\()?([\d.]+)", said)], {}


VERL_DATA = """
import json, sys
import pandas
rows = [json.loads(line)["prompt"] for line in open(sys.argv[1])]
pandas.DataFrame([
    {"prompt": [{"role": "user", "content": row}], "data_source": "words", "reward_model": {"ground_truth": ""}}
    for row in rows
]).to_parquet(sys.argv[2])
"""


def verl_settings(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Of verl 0.9.1, by hydra's names. Its padded sequences are removed, its engine is let go while it trains."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    rows = min(ROWS_OF_A_MICRO_BATCH, given.prompts * given.samples)
    return {
        "algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": False,
        "data.train_files": work / "verl.parquet", "data.val_files": work / "verl.parquet",
        "data.train_batch_size": given.prompts, "data.max_prompt_length": CONTEXT,
        "data.max_response_length": given.tokens, "data.shuffle": False,
        "actor_rollout_ref.model.path": work / "model",
        "actor_rollout_ref.model.custom_chat_template": f'"{TEMPLATE}"',
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.model.use_remove_padding": True, f"{actor}.optim.lr": "1e-6",
        f"{actor}.ppo_mini_batch_size": given.prompts, f"{actor}.ppo_micro_batch_size_per_gpu": rows,
        f"{actor}.use_kl_loss": False, f"{actor}.entropy_coeff": 0, f"{rollout}.name": "vllm",
        f"{rollout}.n": given.samples, f"{rollout}.temperature": 1.0,
        f"{rollout}.gpu_memory_utilization": given.fractions[1], f"{rollout}.log_prob_micro_batch_size_per_gpu": rows,
        "reward.custom_reward_function.path": work / "verl_reward.py", "reward.custom_reward_function.name": "reward",
        "trainer.logger": "[console]", "trainer.nnodes": 1, "trainer.n_gpus_per_node": 1, "trainer.save_freq": -1,
        "trainer.test_freq": -1, "trainer.val_before_train": False, "trainer.total_training_steps": given.steps,
        "trainer.total_epochs": given.steps, "trainer.default_local_dir": work / "verl",
    }  # fmt: skip


def finished(command: list[Any], path: str, log: Path) -> str:
    """What it printed. Raises RuntimeError with the end of that, and what subprocess.run raises."""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        done = subprocess.run(
            [str(word) for word in command], check=False, cwd=ROOT, env=environment, stdout=file,
            stderr=subprocess.STDOUT, timeout=DEADLINE_SECONDS,
        )  # fmt: skip
    said = log.read_text(errors="replace")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(said.split())[-1000:]}")
    return said


ROWS: dict[str, Callable[[argparse.Namespace, Path], Seconds]] = {"ours": ours, "trl": trl, "verl": verl}


def attempt(name: str, given: argparse.Namespace, work: Path) -> bool:
    """Prints the row; whether there is one."""
    asked = {"row": name, **step.configuration(given)}
    try:
        seconds, more = ROWS[name](given, work)
        if len(seconds) <= step.WARM:
            raise RuntimeError(f"{len(seconds)} steps were told, {given.steps} asked for")
    except Exception as error:
        printed("shootout", asked, error=f"{type(error).__name__}: {error}")
        return False
    late = seconds[step.WARM :]
    median = statistics.median(late)
    printed(
        "shootout", asked, lower={"median": median}, seconds=seconds, worst_over_median=max(late) / median, **more,
    )
    return True


def main() -> int:
    parser = step.parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--trl-path", default="", help="a folder with trl, where that python lacks it")
    parser.add_argument("--trl-sleep", action="store_true", help="TRL's vLLM lends its memory to the training")
    parser.add_argument("--verl-python", default=sys.executable)
    given = parser.parse_args()
    if given.steps <= step.WARM:
        parser.error(f"--steps must be more than {step.WARM}: the first ones warm up")
    work = step.prepared(given)
    made = [attempt(name, given, work) for name in given.rows]
    return 0 if all(made) else 1


if __name__ == "__main__":
    sys.exit(main())
