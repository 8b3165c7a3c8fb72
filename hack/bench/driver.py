"""Microseconds of the driver's process a token of a step, by phase: a real loop between actors that only pretend.

usage: python hack/bench/driver.py [--prompts 128] [--samples 8] [--tokens 512] [--prompt-tokens 128] [--steps 5]
  [--engines 2] [--ranks 2]

GRPO with a reference model, so that there is a forward pass; every step's samples are recorded. The engines answer at
once with samples of --tokens tokens, the ranks pack what they get and answer with zeros; both are Ray actors, and what
they do does not count. CPU time of the driver, all of its threads, so that another process on the machine is no part of
it. Prints one line of JSON: of each phase the median over the steps after the first. """

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.local_run import config
from hack.bench.row import printed
from rlhf_worker import loop as loops
from rlhf_worker.experience import Floats, Prompt, Sample, ScoredSample, TrainSequence, taken
from rlhf_worker.loop import Loop
from rlhf_worker.rollout.episode import Episode, Request, Turn
from rlhf_worker.rollout.producer import Rollouts
from rlhf_worker.stop import Stop
from rlhf_worker.weights.sync import Synced

PHASES = ("generate", "forward", "shape", "train", "sync")


class CpuTimer:
    """In the place of the loop's own: seconds of this process's work by phase."""

    newest: "CpuTimer"

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        CpuTimer.newest = self

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


class Engine:
    async def generate(self, requests: list[Request], deadline: float, place: Any = None) -> list[Sample]:
        return [self._sample(request) for request in requests]

    def _sample(self, request: Request) -> Sample:
        episode, count = Episode(request), request.max_tokens
        episode.add(Turn([7] * count, [-1.5] * count, [0] * count, "length"))
        return episode.sample(SimpleNamespace(text=lambda *_: "word " * count))  # type: ignore[arg-type]


class Feed:
    def __init__(self, prompt_tokens: int) -> None:
        self.drawn, self.tokens = 0, list(range(prompt_tokens))

    def draw(self, again: list[str], count: int) -> list[Prompt]:
        self.drawn += count
        rows = range(self.drawn - count, self.drawn)
        text = "word " * len(self.tokens)
        return [
            Prompt(uid=f"0:{row}", epoch=0, row=row, token_ids=self.tokens, text=text, fields={"answer": row})
            for row in rows
        ]

    def sampler_state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def score(self, samples: list[Sample], models: dict[str, list[float]], judge: str) -> list[ScoredSample]:
        return [
            ScoredSample(sample=sample, reward=float(i % 2), parts={"none": float(i % 2)})
            for i, sample in enumerate(samples)
        ]

    def log(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...


class Rank:
    def __init__(self, run: Any) -> None:
        self.spec = run.trainer

    def logprobs(self, role: str, sequences: list[TrainSequence], batches: list[list[int]]) -> dict[int, Floats]:
        taken(sequences, batches, self.spec)
        return {i: np.zeros(len(sequences[i].mask), np.float32) for numbers in batches for i in numbers}

    def train(self, role: str, updates: list[list[TrainSequence]], dealing: list[list[list[int]]]) -> dict[str, float]:
        for sequences, batches in zip(updates, dealing, strict=True):
            taken(sequences, batches, self.spec)
        return {"loss": 0.0}


RemoteEngine: Any = ray.remote(num_cpus=0)(Engine)
RemoteFeed: Any = ray.remote(num_cpus=0)(Feed)
RemoteRank: Any = ray.remote(num_cpus=0)(Rank)


class Fleet:
    short, slots = False, 1024

    def __init__(self, engines: list[Any]) -> None:
        self.serving = engines

    def loads(self) -> list[dict[int, float]]:
        return []

    def sync(self, *, prove: bool) -> Synced:
        return Synced(1, 0.0, "none", None)


class Reporter:
    drain, bounded = False, nullcontext

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **fields: None


def looping(given: argparse.Namespace) -> Loop:
    run = config(
        "driver", model={"path": "none"}, algorithm={"name": "grpo", "kl": {"coefficient": 0.001}},
        rollout={
            "promptsPerStep": given.prompts, "samplesPerPrompt": given.samples, "maxTokens": given.tokens,
            "engines": given.engines,
        },
        trainer={"steps": given.steps + 1, "gpus": given.ranks, "tokensPerMicroBatch": 8192},
        placement={"mode": "Separated", "gpusPerNode": given.ranks + given.engines},
        telemetry={"rolloutsEverySteps": 1}, data={"jsonl": {"path": "none"}, "maxPromptTokens": given.prompt_tokens},
    )  # fmt: skip
    ranks = [RemoteRank.remote(run) for _ in range(given.ranks)]
    crew: Any = SimpleNamespace(
        fleet=Fleet([RemoteEngine.remote() for _ in range(given.engines)]), feed=RemoteFeed.remote(given.prompt_tokens),
        ranks={"policy": ranks, "reference": ranks}, policy=ranks, padded=False,
    )
    made = Loop(run, crew, Reporter(), Stop())  # type: ignore[arg-type]
    made.rollouts = Rollouts(run, crew, 0)
    return made


def measured(given: argparse.Namespace) -> list[dict[str, float]]:
    """Microseconds a token of each step, by phase; `rest` is metrics, telemetry and what a checkpoint needs."""
    vars(loops)["PhaseTimer"] = CpuTimer
    made, found = looping(given), []
    tokens = given.prompts * given.samples * given.tokens
    for _ in range(given.steps + 1):
        start = time.process_time()
        made._step()
        seconds = time.process_time() - start
        phases = {name: CpuTimer.newest.seconds[name] for name in PHASES}
        phases |= {"rest": seconds - sum(phases.values()), "step": seconds}
        found.append({name: 1e6 * value / tokens for name, value in phases.items()})
    return found[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="bench-ray-")
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30,
        _temp_dir=directory,
    )
    steps = measured(given)
    found = {name: round(statistics.median(step[name] for step in steps), 4) for name in steps[0]}
    printed("driver", {name: value for name, value in vars(given).items() if name != "steps"}, lower=found)
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
