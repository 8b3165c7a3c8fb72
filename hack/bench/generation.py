"""Generation by the product's engine actor against vLLM's own offline `LLM.generate`: the same prompts, the same engine
arguments (an fp32 head and processed log probabilities among them), one GPU (or CPU), in turn.

usage: python hack/bench/generation.py [--shapes 0.6B 1.7B] [--prompts 64] [--samples 8] [--tokens 512] [--args JSON]

A random model of a Qwen3 shape, so that completions do not end early: every row makes prompts x samples x tokens. The
engine's completions come back to the caller's process with their log probabilities, versions and text, as the loop gets
them; offline is measured without and with the log probabilities that training needs, and makes no text. A row
(`row.py`) each, as it comes: tokens a second of each round after the first, their median, and its share of offline's
without log probabilities. With `--args '{"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"}'` the
engine sends a token a message, as vLLM does by itself. """

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.gpu_placement import VOCABULARY, tokenizer
from hack.bench.local_run import config
from hack.bench.row import printed
from hack.bench.weight_base import SHAPES, local_ray, write_model

# of each: room for all samples at once. Two engines that start side by side cannot measure what is free
KV_CACHE_BYTES = 24 << 30
DEADLINE_SECONDS = 600.0
# What the worker gives to vLLM and `LLM` does without.
OURS_ALONE = {"weight_transfer_config"}


class Offline:
    """vLLM as its users run it without a server."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)

    def generate(self, prompts: list[list[int]], samples: int, tokens: int, logprobs: int | None) -> int:
        """Returns the number of tokens."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(
            temperature=1.0, max_tokens=tokens, logprobs=logprobs, flat_logprobs=True, detokenize=False,
        )
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts for _ in range(samples)]
        return sum(len(output.outputs[0].token_ids) for output in self.llm.generate(requests, params, use_tqdm=False))


def requests(prompts: list[list[int]], samples: int, tokens: int) -> list[Any]:
    from rlhf_worker.experience import Prompt
    from rlhf_worker.rollout.episode import Request

    made = [
        Prompt(uid=f"0:{i}", epoch=0, row=i, token_ids=tokens, text="", fields={}) for i, tokens in enumerate(prompts)
    ]
    return [
        Request(prompt=prompt, seed=None, temperature=1.0, max_tokens=tokens) for prompt in made for _ in range(samples)
    ]


class Pair:
    """vLLM alone and the product's engine, with the same model and arguments on the same device."""

    def __init__(self, given: argparse.Namespace, shape: str, work: Path) -> None:
        from rlhf_worker.engines.engine import Engine, RemoteEngine

        write_model(work, shape, given.dtype)
        tokenizer(VOCABULARY).save_pretrained(work)
        cpu = given.device == "cpu"
        args = {"load_format": "dummy", "kv_cache_memory_bytes": 1 << 30 if cpu else KV_CACHE_BYTES, **given.args}
        rollout = {"maxTokens": given.tokens, "engineArgs": args}
        run = config("generation", model={"path": str(work), "dtype": given.dtype}, rollout=rollout)
        where = (given.device, [0], os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","), os.cpu_count() or 1)
        self.backend = "shm" if cpu else "ipc"
        every = Engine(run, 0, *where)._engine_args(self.backend)
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(os.cpu_count()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        } if cpu else {}  # fmt: skip
        options = {"runtime_env": {"env_vars": environment}}
        alike = {name: value for name, value in every.items() if name not in OURS_ALONE}
        self.offline = ray.remote(Offline).options(**options).remote(alike)
        self.engine = RemoteEngine.options(**options).remote(run, 0, *where)

    def rows(self, prompts: list[list[int]], samples: int, tokens: int) -> dict[str, Callable[[], tuple[float, int]]]:
        """Of each row what measures it once: -> seconds, tokens."""
        asked = requests(prompts, samples, tokens)

        def offline(logprobs: int | None) -> tuple[float, int]:
            return timed(lambda: self.offline.generate.remote(prompts, samples, tokens, logprobs))

        def ours() -> tuple[float, int]:
            seconds, made = timed(lambda: self.engine.generate.remote(asked, DEADLINE_SECONDS))
            return seconds, sum(len(sample.token_ids) for sample in made)

        return {
            "vLLM offline": lambda: offline(None), "vLLM offline, log probabilities": lambda: offline(0), "ours": ours,
        }

    def start(self) -> None:
        """And a short round of each, which compiles what the first requests would."""
        ray.get([self.offline.__ray_ready__.remote(), self.engine.start.remote(self.backend)], timeout=DEADLINE_SECONDS)
        for once in self.rows([[5, 6, 7]], 2, 4).values():
            once()

    def close(self) -> None:
        ray.get(self.engine.close.remote(), timeout=60)
        ray.kill(self.engine)
        ray.kill(self.offline)


def timed(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = ray.get(call(), timeout=DEADLINE_SECONDS)
    return time.perf_counter() - began, found


def measure(given: argparse.Namespace, shape: str) -> None:
    """Prints a line a row."""
    pair = Pair(given, shape, Path(tempfile.mkdtemp(prefix="generation-")))
    try:
        pair.start()
        prompts = [[4 + (7 * i + 13 * j) % 1000 for j in range(32)] for i in range(given.prompts)]
        base = 0.0
        for row, once in pair.rows(prompts, given.samples, given.tokens).items():
            speeds = [round(tokens / seconds) for seconds, tokens in (once() for _ in range(1 + given.rounds))][1:]
            base = base or statistics.median(speeds)
            share = round(statistics.median(speeds) / base, 3)
            asked = {name: getattr(given, name) for name in ("prompts", "samples", "tokens", "args", "dtype")}
            printed(
                "generation", {"shape": shape, "row": row, **asked},
                higher={"tokens_per_second": statistics.median(speeds)}, of_offline=share, rounds=speeds,
            )
    finally:
        pair.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.6B"], choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="that count; one more comes before them")
    parser.add_argument("--args", type=json.loads, default={}, help="vLLM's engine arguments for both, as JSON")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    with local_ray():
        for shape in given.shapes:
            measure(given, shape)
    return 0


if __name__ == "__main__":
    from hack.bench import generation  # by its name, so that the actors' processes import it too

    sys.exit(generation.main())
