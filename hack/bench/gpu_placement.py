"""Placement and weight sync on real GPUs: five GRPO steps colocated (0.4 + 0.4 on each of 2 GPUs), tensor-parallel, sleeping, separated (1 + 1).

usage: python hack/bench/gpu_placement.py [--out DIR] [--steps N] [--layers N]

Makes a random model of Qwen3-0.6B's shape with a word for every token, runs `rlhf_worker`'s own local driver on it, and prints a JSON
line and a Markdown table: the GPUs of every role, the checksums after each sync, and the seconds of each phase. Needs 2 GPUs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.local_run import job, run

VOCABULARY = 151936
REWARD = '''
def reward(prompt, completion, **row):
    """Share of the completion's words that hold a 7."""
    words = completion.split()
    return sum("7" in word for word in words) / len(words) if words else 0.0
'''
MODES: dict[str, dict[str, Any]] = {
    "colocated": {
        "rollout": {"engines": 2}, "trainer": {"gpus": 2},
        "placement": {"mode": "Colocated", "gpusPerNode": 2, "fractions": {"trainer": 0.4, "rollout": 0.4}},
    },
    "tensor-parallel": {
        "rollout": {"engines": 1, "tensorParallelSize": 2}, "trainer": {"gpus": 2},
        "placement": {"mode": "Colocated", "gpusPerNode": 2, "fractions": {"trainer": 0.4, "rollout": 0.4}},
    },
    "sleeping": {
        "rollout": {"engines": 1, "engineArgs": {"enforce_eager": True, "enable_sleep_mode": True}}, "trainer": {"gpus": 1},
        "placement": {"mode": "Colocated", "gpusPerNode": 1, "fractions": {"trainer": 0.4, "rollout": 0.4}},
    },
    "separated": {"rollout": {"engines": 1}, "trainer": {"gpus": 1}, "placement": {"mode": "Separated", "gpusPerNode": 1}},
}


def write_model(directory: Path, layers: int) -> int:
    """Qwen3-0.6B's shape, random weights, bfloat16. Returns the number of parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def tokenizer() -> Any:
    """A word for every token id, so that random weights write text that a reward can tell apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def manifest(mode: str, work: Path, steps: int) -> dict[str, Any]:
    """The RLHFJob of one mode. Every sync is proven."""
    extra = MODES[mode]
    rollout = {"promptsPerStep": 32, "samplesPerPrompt": 8, "maxTokens": 256, "engineArgs": {"enforce_eager": True}}
    spec = {
        "model": {"path": str(work / "model"), "dtype": "bfloat16"},
        "data": {"jsonl": {"path": str(work / "prompts.jsonl")}, "maxPromptTokens": 64},
        "rewards": [{"name": "letter", "type": "python", "code": REWARD}],
        "rollout": rollout | extra["rollout"], "trainer": {"steps": steps, "learningRate": 1e-5} | extra["trainer"],
        "placement": extra["placement"], "weightSync": {"verifyEverySteps": 1},
        "checkpoint": {"path": str(work / mode), "everySteps": 1000, "export": False},
    }
    return job(f"bench-{mode}", **spec)


def write_prompts(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": f"w{a + 4} w{b + 4}"}) + "\n" for a in range(16) for b in range(16)))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for mode, made in found.items():
        lines += [f"### {mode}", "", "| role | host/GPU |", "|---|---|"]
        lines += [f"| {role} | {', '.join(seats)} |" for role, seats in made["seats"].items()]
        lines += ["", "| step | generate s | score s | train s | sync s | proof s | step s | checksums equal | packed or loaded |", "|---|" + "---|" * 8]
        lines += [_row(step) for step in made["steps"]] + [""]
    return "\n".join(lines)


def _row(step: dict[str, Any]) -> str:
    phases = [step[f"seconds/{name}"] for name in ("generate", "score", "train")]
    cells = [*phases, step["sync/seconds"], step["proof/seconds"], step["seconds/step"]]
    return f"| {step['step']} | " + " | ".join(f"{value:.3f}" for value in cells) + f" | {step['equal']} | {step['indirect']} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep model, checkpoints and results here")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    given = parser.parse_args()
    work = (given.out or Path(tempfile.mkdtemp(prefix="gpu-placement-"))).absolute()
    (work / "model").mkdir(parents=True, exist_ok=True)
    parameters = write_model(work / "model", given.layers)
    write_prompts(work / "prompts.jsonl")
    found = {mode: run(manifest(mode, work, given.steps), work) for mode in given.modes}
    (work / "gpu_placement.json").write_text(json.dumps({"parameters": parameters, "runs": found}))
    (work / "gpu_placement.md").write_text(markdown(found))
    print(json.dumps({"parameters": parameters, "runs": found}))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
