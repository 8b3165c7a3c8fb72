"""How much of a GPU the trainer uses: GRPO updates of a Qwen3 shape on packed sequences, by the product's own trainer,
one GPU.

usage: python hack/bench/training.py [--shape 4B] [--tokens 8192] [--micro-batches 4] [--compile]
  [--gradient-checkpointing]

Utilisation is model FLOPs over time over the GPU's dense bfloat16 peak (--peak, 989e12 for an H200): 6 a token and
parameter of the matrix products (embedding left out, head in), and 6 a token, layer and attended element of queries and
keys, values and weights (causal: half). What is recomputed does not count. """

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.local_run import config
from hack.bench.weight_base import SHAPES, free_ports, model_config, parameters

WARM, REPEAT = 2, 3


def write_checkpoint(directory: Path, shape: str, device: str) -> None:
    """Random weights, made on the device, in bfloat16."""
    import transformers

    with torch.device(device):
        model = getattr(
            transformers, f"{SHAPES[shape][0]}ForCausalLM",
        )(model_config(shape, "bfloat16")).to(torch.bfloat16)
    model.save_pretrained(directory)


def run_config(model: Path, given: argparse.Namespace) -> Any:
    trainer = {
        "steps": 100, "tokensPerMicroBatch": given.tokens, "compile": given.compile,
        "gradientCheckpointing": given.gradient_checkpointing,
    }
    return config(
        "training", model={"path": str(model), "dtype": given.dtype}, trainer=trainer,
        checkpoint={"path": str(model / "checkpoints")},
    )


def batches(run: Any, given: argparse.Namespace) -> list[Any]:
    """micro-batches of sequences of 1024 tokens, a quarter of each the prompt."""
    from rlhf_worker.algorithm.shape import shape
    from rlhf_worker.experience import TrainSequence, pack

    length, prompt = 1024, 256
    count = given.micro_batches * given.tokens // length
    generator = torch.Generator().manual_seed(0)
    sequences = [
        TrainSequence(
            token_ids=torch.randint(0, 1000, (length,), generator=generator).tolist(), prompt_length=prompt, index=i,
            mask=[True] * (length - prompt),
            columns={"rollout_logprobs": [-11.9] * (length - prompt)},
        )
        for i in range(count)
    ]  # fmt: skip
    rewards = [float(i % 2) for i in range(count)]
    groups, whole = [i // 4 for i in range(count)], [range(count)]
    shaped = shape(run.algorithm, 0.0, sequences, rewards, groups, updates=whole, max_tokens=length - prompt)
    return pack(shaped.updates[0], given.tokens)


def flops(shape: str, tokens: int, length: int) -> float:
    """Of forward and backward over so many tokens in sequences of `length`."""
    values: dict[str, int] = SHAPES[shape][1]
    named = parameters(shape)
    products = sum(prod(size) for name, size in named.items() if len(size) == 2 and "embed_tokens" not in name)
    head = values["vocab_size"] * values["hidden_size"] if values["tie_word_embeddings"] else 0
    attention = 6 * 2 * values["num_hidden_layers"] * values["num_attention_heads"] * values["head_dim"] * length / 2
    # three quarters of the positions have a target, and so a row of the head
    return float(tokens) * (6.0 * (products + head * 0.75) + attention)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4B", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192, help="of one packed micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peak", type=float, default=989e12)
    parser.add_argument("--model", type=Path, help="the checkpoint, made where it is not there")
    given = parser.parse_args()
    from rlhf_worker.trainer.rank import Trainer

    model = given.model or Path(tempfile.mkdtemp(prefix="training-"))
    if not (model / "config.json").exists():
        write_checkpoint(model, given.shape, given.device)
        torch.cuda.empty_cache()
    run = run_config(model, given)
    trainer = Trainer(run, ["policy"], 0, 1, given.device, os.cpu_count() or 1)
    trainer.join(("127.0.0.1", free_ports(1)[0]))
    trainer.load()
    update, seconds = batches(run, given), []
    for _ in range(WARM + REPEAT):
        began = time.perf_counter()
        metrics = trainer.train("policy", [update])  # which ends with numbers on the host
        seconds.append(time.perf_counter() - began)
    tokens = given.micro_batches * given.tokens
    took = statistics.median(seconds[WARM:])
    print(json.dumps({
        "shape": given.shape, "compile": given.compile, "gradient_checkpointing": given.gradient_checkpointing,
        "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / took, "utilisation": flops(given.shape, tokens, 1024) / took / given.peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if given.device == "cuda" else None,
        "loss": metrics["loss"], "grad_norm": metrics["grad_norm"],
    }), flush=True)  # fmt: skip
    trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
