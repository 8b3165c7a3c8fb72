"""Trainer ranks and ranks of tensor-parallel engines on the same GPUs, in one placement group: by the manifest
manifests/samples/qwen3-4gpu.yaml where every role sits, what greedy completions and the weights in the engines do as
the trainer's weights change, and the seconds of each phase.

usage: python hack/bench/shared_gpus.py [--shape 0.6B] [--steps 3]
       python hack/bench/shared_gpus.py --gpus 2 --shape tiny-moe --device cpu --dtype float32    (of logical GPUs)

--gpus takes other numbers than the manifest's, with engines of as many ranks as there. A random model of the shape is
trained on words, with the product's own crew and loop. After the last step all of its weights are set to zero and
synced: the engines then hold zeros, and find every token equally likely. Every sync is proven by the checksums of every
parameter. Exits with 1 where a pair does not share its GPU, an engine's weights differ or are not zero in the end, or
greedy completions stay as they were. """

import argparse
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.generation import requests
from hack.bench.gpu_placement import REWARD, tokenizer, write_prompts
from hack.bench.local_run import recorder
from hack.bench.row import printed
from hack.bench.training import write_checkpoint
from hack.bench.weight_base import ROOT, SHAPES
from rlhf_api.parse import parse_job
from rlhf_api.run import resolve
from rlhf_worker.calls import call, call_all, gather
from rlhf_worker.crew import Crew, close, start
from rlhf_worker.engines.arguments import settled
from rlhf_worker.local import local_ray
from rlhf_worker.loop import Loop
from rlhf_worker.placement import Patience, reserve
from rlhf_worker.roll import Roll
from rlhf_worker.stop import Stop

MANIFEST = ROOT / "manifests" / "samples" / "qwen3-4gpu.yaml"
DEADLINE_SECONDS = 600.0
PROMPTS, SAMPLES, TOKENS = 32, 8, 64


def manifest(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The sample's roles, placement and engines, with a model and data that need no network."""
    job: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    spec = job["spec"]
    gpus = given.gpus or spec["trainer"]["gpus"]
    spec["trainer"] |= {"gpus": gpus, "steps": given.steps, "learningRate": 1e-3, "warmupSteps": 0}
    spec["rollout"] |= {
        "engines": gpus // spec["rollout"]["tensorParallelSize"], "promptsPerStep": PROMPTS,
        "samplesPerPrompt": SAMPLES, "maxTokens": TOKENS,
        "engineArgs": {"kv_cache_memory_bytes": 256 << 20},  # side by side they cannot measure what is free
    }
    spec["placement"]["gpusPerNode"] = gpus
    return job | {"spec": spec | {
        "model": {"path": str(work), "dtype": given.dtype},
        "data": {"jsonl": {"path": str(work / "prompts.jsonl")}, "maxPromptTokens": 64},
        "rewards": [{"name": "sevens", "type": "python", "code": REWARD}],
        "checkpoint": {"path": str(work / "checkpoints"), "everySteps": 1000, "export": False},
    }}  # fmt: skip


def unshared(seats: dict[str, list[str]], size: int) -> list[str]:
    """Ranks of engines, of `size` each, that sit elsewhere than the trainer's rank of the same number."""
    trainer = [seats[f"trainer {rank}"][0] for rank in range(sum(name.startswith("trainer") for name in seats))]
    engines = [seat for number in range(len(trainer) // size) for seat in seats[f"engine {number}"]]
    return [
        f"trainer rank {rank} on {own}, rank {rank % size} of engine {rank // size} on {theirs}"
        for rank, (own, theirs) in enumerate(zip(trainer, engines, strict=True)) if own != theirs
    ]


def greedy(crew: Crew) -> list[list[Any]]:
    """Of each engine, its samples of the same prompts."""
    prompts = [[4 + number, 5 + number, 6 + number] for number in range(4)]
    asked = [replace(one, temperature=0.0) for one in requests(prompts, 1, 8)]
    answers = [engine.generate.remote(asked, DEADLINE_SECONDS) for engine in crew.fleet.serving]
    found: list[list[Any]] = gather(answers, DEADLINE_SECONDS, "greedy completions")
    return found


def tokens(made: list[list[Any]]) -> list[list[list[int]]]:
    return [[sample.token_ids.tolist() for sample in samples] for samples in made]


def zeroed(policy: Any) -> None:
    """In the process of a trainer's rank."""
    import torch

    with torch.no_grad():
        for parameter in policy.trainer.roles["policy"].module.parameters():
            parameter.zero_()
    policy.trainer.version += 1


def not_zero(crew: Crew, vocabulary: int) -> list[str]:
    """What in the engines is not as with weights of zero: sums of bits, and log probabilities of a token."""
    sums = call_all(crew.fleet.serving, "checksums", deadline_seconds=DEADLINE_SECONDS, what="checksums")
    found = [
        f"engine {number} rank {rank}: {name}"
        for number, ranks in enumerate(sums) for rank, held in enumerate(ranks)
        for name, total in held.sums.items() if total
    ]
    even = -math.log(vocabulary)
    odd = {value for samples in greedy(crew) for one in samples for value in one.logprobs if abs(value - even) > 1e-3}
    return found + [f"a log probability of {value:.4f}, of {even:.4f}" for value in sorted(odd)]


def measure(given: argparse.Namespace, work: Path) -> bool:
    """Prints the row. Whether all was as it should be."""
    config = resolve(parse_job(manifest(given, work)))
    with local_ray(config, verbose=True):
        reporter, stop = recorder(config), Stop()
        stage = reserve(config.placement, Patience(120.0, lambda: True), "bench")
        config = settled(config, stage.device)
        crew, seats = start(config, stage, reporter, Roll(stop))
        call(crew.feed, "begin", 0, None, deadline_seconds=DEADLINE_SECONDS, what="start of the data")
        loop = Loop(config, crew, reporter, stop)
        loop.begin(0, {})
        before = tokens(greedy(crew))
        loop.run()
        after = tokens(greedy(crew))
        gather([rank.__ray_call__.remote(zeroed) for rank in crew.policy], DEADLINE_SECONDS, "weights of zero")
        emptied = crew.fleet.sync(prove=True)
        wrong = unshared(seats, config.rollout.tensor_parallel_size) + not_zero(crew, given.vocabulary)
        wrong += ["greedy completions are what they were"] if before == after else []
        close(crew)
    last = reporter.steps[-1]
    phases = {name: last[f"seconds/{name}"] for name in ("generate", "train", "sync", "step")}
    printed(
        "shared_gpus", {"shape": given.shape, "dtype": given.dtype, "gpus": len(config.placement.trainer_slots)},
        lower=phases, seats=seats, equal=[step["equal"] for step in reporter.steps],
        of_zeros=emptied.proof and emptied.proof.equal, greedy_before=before, greedy_after=after, wrong=wrong,
    )  # fmt: skip
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6B", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpus", type=int, help="the manifest's, where it is not given")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    given.vocabulary = SHAPES[given.shape][1]["vocab_size"]
    work = Path(tempfile.mkdtemp(prefix="shared-gpus-"))
    write_checkpoint(work, given)
    tokenizer(given.vocabulary).save_pretrained(work)
    write_prompts(work / "prompts.jsonl")
    return 0 if measure(given, work) else 1


if __name__ == "__main__":
    sys.exit(main())
