"""Whole runs on real GPUs, a mode each: where every role sits, the weights' proof after each sync, and the seconds of
each phase.

usage: python hack/bench/gpu_placement.py [--modes MODE ...] [--out DIR] [--steps N] [--layers N] [--share 0.4]

Makes a random model of Qwen3-0.6B's shape (`experts`: of Qwen3 MoE, 8 layers of 32 experts) with a word for every
token, runs `rlhf_worker`'s own local driver on it, and prints a row (`row.py`) a mode and a Markdown table. A mode
needs one GPU, or two where it says so below. Colocated engines sleep while the trainer works, but in `awake`. """

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.local_run import job, run
from hack.bench.row import printed

VOCABULARY = 151936
REWARD = '''
def reward(prompt, completion, **row):
    """Share of the completion's words that hold a 7."""
    words = completion.split()
    return sum("7" in word for word in words) / len(words) if words else 0.0
'''
# Engines that start side by side cannot measure what memory is free.
ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 4 << 30}
ONE = {"mode": "Colocated", "gpusPerNode": 1}
TWO = {"mode": "Colocated", "gpusPerNode": 2}
MODES: dict[str, dict[str, Any]] = {
    "colocated": {"rollout": {"engines": 2}, "trainer": {"gpus": 2}, "placement": TWO},
    "tensor-parallel": {"rollout": {"engines": 1, "tensorParallelSize": 2}, "trainer": {"gpus": 2}, "placement": TWO},
    "context-parallel": {"rollout": {"engines": 2}, "trainer": {"gpus": 2, "contextParallel": 2}, "placement": TWO},
    "separated": {"placement": {"mode": "Separated", "gpusPerNode": 1}},  # two GPUs
    "one": {"placement": ONE},
    "awake": {"rollout": {"sleep": False}, "placement": ONE},  # the engine keeps its memory while the trainer works
    "offload": {
        "algorithm": {"name": "ppo", "kl": {"coefficient": 0.001}}, "critic": {},
        "trainer": {"gpus": 2, "offload": True}, "rollout": {"engines": 2}, "placement": TWO,
    },
    "lora": {
        "model": {"lora": {"rank": 16, "alpha": 32}}, "algorithm": {"kl": {"coefficient": 0.001}},
        "trainer": {"learningRate": 1e-4}, "placement": ONE,
    },
    "experts": {"placement": ONE},
}


def write_model(directory: Path, layers: int, *, experts: bool) -> int:
    """Random weights in bfloat16. Returns the number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "dtype": "bfloat16",
    }
    if experts:
        shape |= {
            "num_hidden_layers": min(layers, 8), "num_experts": 32, "num_experts_per_tok": 4,
            "moe_intermediate_size": 512, "norm_topk_prob": True,
        }
    config = AutoConfig.for_model("qwen3_moe" if experts else "qwen3", **shape)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer(VOCABULARY).save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def tokenizer(vocabulary: int) -> Any:
    """A word for every token id, so that random weights write text that a reward can tell apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, vocabulary))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )


def manifest(mode: str, work: Path, steps: int, share: float) -> dict[str, Any]:
    """The RLHFJob of one mode. Every sync is proven."""
    rollout = {"engines": 1, "promptsPerStep": 32, "samplesPerPrompt": 8, "maxTokens": 256, "engineArgs": ENGINE}
    spec: dict[str, dict[str, Any]] = {
        "model": {"path": str(model_of(mode, work)), "dtype": "bfloat16"},
        "data": {"jsonl": {"path": str(work / "prompts.jsonl")}, "maxPromptTokens": 64},
        "rollout": rollout, "trainer": {"steps": steps, "learningRate": 1e-5}, "weightSync": {"verifyEverySteps": 1},
        "placement": {"fractions": {"trainer": share, "rollout": share}} if mode != "separated" else {},
        "checkpoint": {"path": str(work / mode), "everySteps": 1000, "export": False},
    }
    for section, values in MODES[mode].items():
        spec[section] = spec.get(section, {}) | values
    return job(f"bench-{mode}", rewards=[{"name": "letter", "type": "python", "code": REWARD}], **spec)


def model_of(mode: str, work: Path) -> Path:
    return work / ("experts-model" if mode == "experts" else "model")


def write_prompts(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": f"w{a + 4} w{b + 4}"}) + "\n" for a in range(16) for b in range(16)))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for mode, made in found.items():
        lines += [f"### {mode}", "", "| role | host/GPU |", "|---|---|"]
        lines += [f"| {role} | {', '.join(seats)} |" for role, seats in made["seats"].items()]
        lines += ["", "| step | generate s | forward s | train s | sync s | proof s | step s | checksums equal | "
            "packed or loaded |", "|---|" + "---|" * 8]
        lines += [_row(step) for step in made["steps"]] + [""]
    return "\n".join(lines)


def _row(step: dict[str, Any]) -> str:
    phases = [step[f"seconds/{name}"] for name in ("generate", "forward", "train")]
    cells = [*phases, step["sync/seconds"], step["proof/seconds"], step["seconds/step"]]
    return f"| {step['step']} | " + " | ".join(
        f"{value:.3f}" for value in cells
    ) + f" | {step['equal']} | {step['indirect']} |"


def measured(mode: str, steps: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Prints the row: of the last step, by when all is warm."""
    phases = {name: steps[-1][f"seconds/{name}"] for name in ("generate", "train", "step")}
    printed(
        "gpu_placement", {"mode": mode, "layers": given.layers, "share": given.share},
        lower=phases | {"sync": steps[-1]["sync/seconds"]}, equal=[step["equal"] for step in steps], steps=steps,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep model, checkpoints and results here")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--share", type=float, default=0.4, help="of a GPU, for each trainer rank and each engine "
        "rank where they share it")
    given = parser.parse_args()
    work = (given.out or Path(tempfile.mkdtemp(prefix="gpu-placement-"))).absolute()
    models = {model_of(mode, work) for mode in given.modes}
    for model in models:
        model.mkdir(parents=True, exist_ok=True)
    parameters = {
        model.name: write_model(model, given.layers, experts=model.name == "experts-model") for model in models
    }
    write_prompts(work / "prompts.jsonl")
    found = {mode: run(manifest(mode, work, given.steps, given.share), work) for mode in given.modes}
    (work / "gpu_placement.json").write_text(json.dumps({"parameters": parameters, "runs": found}))
    (work / "gpu_placement.md").write_text(markdown(found))
    print(markdown(found))
    for mode, made in found.items():
        measured(mode, made["steps"], given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
