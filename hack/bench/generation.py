"""Generation by the product's engine actor against vLLM's own offline `LLM.generate`: the same prompts, one GPU (or
CPU), in turn.

usage: python hack/bench/generation.py [--shape 0.6B] [--prompts 64] [--samples 8] [--tokens 256] [--eager] [--share
  0.4]

A random model of a Qwen3 shape, so that no completion ends early: every row makes prompts x samples x tokens. The
engine's completions come back to the caller's process with their log probabilities, versions and text, as the loop gets
them; offline is measured without and with the log probabilities that training needs, and makes no text. Tokens a
second, median of 3. """

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.gpu_placement import tokenizer
from hack.bench.local_run import config
from hack.bench.weight_base import SHAPES, local_ray, write_model

REPEAT = 3
# of each: room for all samples at once. Two engines that start side by side cannot measure what is free
KV_CACHE_BYTES = 24 << 30
DEADLINE_SECONDS = 600.0


class Offline:
    """vLLM as its users run it without a server."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)

    def generate(self, prompts: list[list[int]], samples: int, tokens: int, logprobs: int | None) -> int:
        """Returns the number of tokens."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(temperature=1.0, max_tokens=tokens, logprobs=logprobs, detokenize=False)
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts for _ in range(samples)]
        return sum(len(output.outputs[0].token_ids) for output in self.llm.generate(requests, params, use_tqdm=False))


def requests(prompts: list[list[int]], given: argparse.Namespace) -> list[Any]:
    from rlhf_worker.experience import Prompt
    from rlhf_worker.rollout.episode import Request

    made = [
        Prompt(uid=f"0:{i}", epoch=0, row=i, token_ids=tokens, text="", fields={}) for i, tokens in enumerate(prompts)
    ]
    return [
        Request(prompt=prompt, seed=None, temperature=1.0, max_tokens=given.tokens) for prompt in made
        for _ in range(given.samples)
    ]


def timed(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = ray.get(call(), timeout=DEADLINE_SECONDS)
    return time.perf_counter() - began, found


def measure(given: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """Tokens a second of each round, by row."""
    from rlhf_worker.engines.engine import RemoteEngine

    write_model(work, given.shape, given.dtype)
    tokenizer().save_pretrained(work)
    shared = {"load_format": "dummy", "max_model_len": 64 + given.tokens, "enforce_eager": given.eager}
    cpu = {"kv_cache_memory_bytes": 1 << 30, "enable_chunked_prefill": False} if given.device == "cpu" else {
        "gpu_memory_utilization": given.share, "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    environment = {
        "env_vars": {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(os.cpu_count()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    } if given.device == "cpu" else {}
    offline = ray.remote(Offline).options(runtime_env=environment).remote(
        {"model": str(work), "dtype": given.dtype, "disable_log_stats": True, **shared, **cpu}
    )
    rollout = {"maxTokens": given.tokens, "engineArgs": shared | cpu}
    run = config("generation", model={"path": str(work), "dtype": given.dtype}, rollout=rollout)
    engine = RemoteEngine.options(runtime_env=environment).remote(
        run, 0, given.device, [0], os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","), os.cpu_count(),
    )
    prompts = [[4 + (7 * i + 13 * j) % 1000 for j in range(32)] for i in range(given.prompts)]
    asked = requests(prompts, given)
    ray.get(
        [
            offline.generate.remote(prompts[:2], 1, 8, None),
            engine.start.remote("ipc" if given.device == "cuda" else "shm")
        ],
        timeout=DEADLINE_SECONDS,
    )
    rows: dict[str, list[float]] = {"vLLM offline": [], "vLLM offline, log probabilities": [], "ours": []}
    for _ in range(REPEAT + 1):
        for row, logprobs in zip(list(rows)[:2], (None, 0), strict=True):
            seconds, tokens = timed(
                lambda value=logprobs: offline.generate.remote(prompts, given.samples, given.tokens, value)
            )
            rows[row].append(tokens / seconds)
        seconds, samples = timed(lambda: engine.generate.remote(asked, DEADLINE_SECONDS))
        rows["ours"].append(sum(len(sample.token_ids) for sample in samples) / seconds)
    return {row: values[1:] for row, values in rows.items()}  # the first round warms up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6B", choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--share", type=float, default=0.4, help="of the GPU's memory for each of the two")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    with local_ray():
        rows = measure(given, Path(tempfile.mkdtemp(prefix="generation-")))
    base = statistics.median(rows["vLLM offline"])
    print(json.dumps(rows))
    print("| way | tokens a second | of offline |\n|---|---|---|")
    for row, values in rows.items():
        print(f"| {row} | {statistics.median(values):,.0f} | {statistics.median(values) / base:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    from hack.bench import generation  # by its name, so that the actors' processes import it too

    sys.exit(generation.main())
