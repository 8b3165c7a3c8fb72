"""Seconds of a whole weight sync of a sharded trainer into engines, on its GPUs or on others: pause, transfer and
resume, the proof left out. By the product's own crew, but that the trainer's weights are random, made on the device,
and have no optimizer.

usage: python hack/bench/weight_sharded.py [--shape 30B-A3B] [--ranks 2] [--engines 1] [--nodes 1]
         [--mode Colocated|Separated] [--sharding Full|Hybrid] [--syncs 10]
       python hack/bench/weight_sharded.py --shape tiny-moe --dtype float32    (does it still run?)

--ranks is how many GPUs each side has, the same ones where Colocated: each holds a trainer rank and a part of an
engine, which has ranks / engines tensor-parallel ranks. --nodes divides them over as many Ray nodes on this machine,
between which nothing is read in memory. The weights change before each sync. After the last one checksums of every
parameter are compared; the exit code is 1 where any differs. Prints one line of JSON: the seconds of each sync, their
median and worst after two. """

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.gpu_placement import REWARD, tokenizer, write_prompts
from hack.bench.local_run import config as run_config
from hack.bench.row import printed
from hack.bench.weight_base import ENVIRONMENT, ROOT, SHAPES, elements, site, write_model
from rlhf_worker import crew as crews
from rlhf_worker.calls import call_all, gather
from rlhf_worker.placement import Patience, device_here, reserve
from rlhf_worker.pretrained import load_config
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.roll import Roll
from rlhf_worker.stop import Stop
from rlhf_worker.trainer.model import mesh_of
from rlhf_worker.trainer.policy import Policy
from rlhf_worker.trainer.rank import Trainer
from rlhf_worker.watcher import HOOK
from rlhf_worker.weights.layout import layout_of
from rlhf_worker.weights.source import PolicySource

WARM = 2  # syncs
START_SECONDS = 600.0


class RandomTrainer(Trainer):
    """A rank with the shards of a model, and nothing to train it with."""

    def load(self) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        shards, kind = self.config.shards(self.world), getattr(torch, self.config.model.dtype)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(load_config(self.config.model), dtype=kind)
        mesh = mesh_of(self.device.type, self.world, shards)
        torch.manual_seed(self.rank % shards)  # copies are equal
        tensors = {}
        for name, parameter in lm.named_parameters():
            placements = [Replicate(), Shard(0)][-mesh.ndim :]
            size, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            local = torch.empty(size, dtype=kind, device=self.device).normal_(std=0.02)
            tensors[name] = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride(),
            )
        self.source = PolicySource(lambda: tensors.items(), kind, layout_of(lm))
        return {}

    @contextmanager
    def _briefly(self, name: str) -> Iterator[Any]:
        yield None  # all of it is on the device


class RandomPolicy(Policy):
    def join(self, address: tuple[str, int]) -> None:
        self.trainer = RandomTrainer(*self.given)
        self.trainer.join(address)

    def change(self) -> None:
        """As an update does."""
        torch._foreach_add_(self.trainer.source.local_tensors(), 1e-3)
        self.trainer.version += 1
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def nodes(count: int, gpus: int, resources: Sequence[str]) -> Iterator[None]:
    """A Ray of so many nodes on this machine, with its GPUs, or logical ones, dealt among them. resources: each node
    has as many of each as GPUs.
    """
    paths = [str(ROOT), str(ROOT / "api"), str(ROOT / "worker"), str(site()), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("RAY_EXPERIMENTAL")}  # Ray deals GPUs out
    os.environ.update(environment | HOOK | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster()
    try:
        for number in range(count):
            own = ",".join(str(number * gpus // count + gpu) for gpu in range(gpus // count))
            cluster.add_node(
                num_cpus=8, num_gpus=gpus // count, resources=dict.fromkeys(resources, gpus // count),
                object_store_memory=256 << 20, include_dashboard=False,
                env_vars={"CUDA_VISIBLE_DEVICES": own} if device_here() == "cuda" else {},
            )
        ray.init(address=cluster.address, namespace="bench", log_to_driver=True)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def config(given: argparse.Namespace, work: Path) -> Any:
    cuda = device_here() == "cuda"
    own = {"moe_backend": "triton"} if cuda and "moe" in SHAPES[given.shape][0].lower() else {}
    engine = {"load_format": "dummy", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
    shares = {"fractions": {"trainer": 0.3, "rollout": 0.6}} if given.mode == "Colocated" else {}
    return run_config(
        "sharded", model={"path": str(work), "dtype": given.dtype},
        data={"jsonl": {"path": str(work / "prompts.jsonl")}, "maxPromptTokens": 64},
        rewards=[{"name": "sevens", "type": "python", "code": REWARD}],
        rollout={
            "engines": given.engines, "tensorParallelSize": given.ranks // given.engines, "maxTokens": 64,
            "engineArgs": engine | own,
        },
        trainer={"gpus": given.ranks, "steps": 1, "sharding": given.sharding},
        placement={"mode": given.mode, "gpusPerNode": given.ranks // given.nodes, **shares},
        checkpoint={"path": str(work / "checkpoints")},
    )  # fmt: skip


def opened(config: Any, opening: Any, *rest: Any) -> None:
    """In place of the preflight, which wants a checkpoint's weights, and memory for an optimizer."""
    gather([call for calls in opening.values() for call in calls], START_SECONDS, "start of the actors")


def measure(given: argparse.Namespace, made: Any) -> dict[str, Any]:
    stand_ins: Any = crews
    stand_ins.RemotePolicy, stand_ins.preflight = ray.remote(RandomPolicy), opened
    if device_here() == "cpu" and given.nodes > 1:
        stand_ins._prove_seats = lambda *_: {}  # logical GPUs of one host have one number on each of its nodes
    stage = reserve(made.placement, Patience(120.0, lambda: True), "bench")
    began = time.monotonic()
    crew: Any = crews.start(made, stage, ConsoleReporter(made), Roll(Stop()))[0]
    crew.fleet.close()
    started, weights, seconds = time.monotonic() - began, crew.fleet.weights, []
    for number in range(WARM + given.syncs + 1):
        call_all(crew.policy, "change", deadline_seconds=START_SECONDS, what="other weights")
        last = number == WARM + given.syncs  # and what is packed away is summed up, for the comparison
        weights.prove = lambda version: None
        synced = weights(prove=last)
        seconds += [] if last else [synced.seconds]
    compared = weights._compare()
    size, timed = elements(given.shape) * getattr(torch, given.dtype).itemsize, seconds[WARM:]
    names = ("shape", "dtype", "ranks", "engines", "nodes", "mode", "sharding")
    return printed(
        "weight_sharded", {name: getattr(given, name) for name in names},
        lower={"median": statistics.median(timed), "worst": max(timed)}, backend=weights.backend, gigabytes=size / 1e9,
        start_seconds=started, seconds=seconds, equal=compared.equal, indirect=compared.indirect,
        wrong=sorted({name for names in compared.wrong.values() for name in names}),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30B-A3B", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of the trainer, and of the engines")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--mode", default="Colocated", choices=["Colocated", "Separated"])
    parser.add_argument("--sharding", default="Full", choices=["Full", "Hybrid"])
    parser.add_argument("--syncs", type=int, default=10)
    given = parser.parse_args()
    if given.ranks % given.engines or given.ranks % given.nodes or given.engines % given.nodes:
        parser.error("--ranks must be a multiple of --engines and of --nodes, --engines a multiple of --nodes")
    work = Path(tempfile.mkdtemp(prefix="weight-sharded-"))
    write_model(work, given.shape, given.dtype)
    tokenizer(SHAPES[given.shape][1]["vocab_size"]).save_pretrained(work)
    write_prompts(work / "prompts.jsonl")
    made = config(given, work)
    groups = made.placement.groups
    with nodes(given.nodes, sum(len(group.slots) for group in groups), [group.ray_resource for group in groups]):
        found = measure(given, made)
    return 1 if found["more"]["wrong"] else 0


if __name__ == "__main__":
    from hack.bench import weight_sharded  # by its name, so that the actors' processes import it too

    sys.exit(weight_sharded.main())
