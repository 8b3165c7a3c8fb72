"""A Colocated run over two nodes of one Ray: both ends of the weight sync, real. On a CPU, shared memory within a node
and gloo between them stand for CUDA IPC and NCCL.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from rlhf_api.run import RunConfig
from rlhf_worker import crew as crews
from rlhf_worker.calls import call, call_all, gather
from rlhf_worker.crew import Crew
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.placement import Patience, reserve
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.roll import Roll
from rlhf_worker.stop import Stop
from rlhf_worker.watcher import HOOK
from rlhf_worker.weights.sync import Proof, WeightSync
from tests.worker.configs import run_config
from tests.worker.test_weight_sync import FUSED, PLANNED, write_model
from tests.worker.waiting import kill

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]
NODES = 2
START, DEADLINE = 300.0, 60.0  # seconds


def config(path: Path, sharding: str) -> RunConfig:
    return run_config(
        model={"path": str(path), "dtype": "float32"},
        data={"jsonl": {"path": str(path / "prompts.jsonl")}, "maxPromptTokens": 16},
        rollout={"engines": NODES, "maxTokens": 16}, trainer={"steps": 4, "gpus": NODES, "sharding": sharding},
        placement={"mode": "Colocated", "gpusPerNode": 1}, weightSync={"deadlineSeconds": DEADLINE},
        checkpoint={"path": str(path / "checkpoints")},
        rewards=[{"name": "r", "type": "python", "function": "tests.worker.reward_functions:length"}],
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


@pytest.fixture(scope="module")
def crew(model: Path) -> Iterator[Crew]:
    """One for all tests, in their order."""
    given = {"num_cpus": 2, "num_gpus": 1, "resources": {"rlhf-trainer": 1}, "object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **HOOK}.items():
            patch.setenv(name, value)
        patch.setattr(crews, "_prove_seats", lambda *_: {})  # which tells nodes apart by their hosts, here one
        cluster = Cluster(initialize_head=True, head_node_args={**given, "include_dashboard": False})
        roll = Roll(Stop())
        try:
            for _ in range(NODES - 1):
                cluster.add_node(**given)
            ray.init(address=cluster.address, namespace="tiny", log_to_driver=False)
            full = config(model, "Full")
            stage = reserve(full.placement, Patience(60, lambda: True), name="several-nodes")
            assert len({bundle.node for bundle in stage.bundles.values()}) == NODES
            made = crews.start(full, stage, ConsoleReporter(full), roll)[0]
            made.fleet.close()  # which would start anew what the tests lose
            yield made
        finally:
            roll.close()
            ray.shutdown()
            cluster.shutdown()


def on_each(policy: list[Any], look: Callable[[Any], Any]) -> list[Any]:
    """Of a trainer rank's actor, in its process."""
    return gather([rank.__ray_call__.remote(look) for rank in policy], DEADLINE, "a look")


def synced(weights: WeightSync) -> Proof:
    """New weights, on every rank, and the proof that every engine has them."""

    def change(policy: Any) -> None:
        for tensor in policy.trainer.source.local_tensors():
            tensor.detach().mul_(1.01)

    on_each(list(weights.policy), change)
    proof = weights(prove=True).proof
    assert proof is not None and proof.probe is not None and proof.probe < 1e-4
    return proof


def links(policy: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of the way to the engines: trainer ranks and engines of each."""
    return [(link.leg.senders, link.leg.engines) for link in policy.trainer.sender.engine.links]


def test_what_lies_on_the_other_node_comes_over_a_link(crew: Crew) -> None:
    """Half of each tensor is read in memory, and half is sent."""
    assert isinstance(crew.fleet, Fleet)
    assert crew.fleet.weights.backend == "shm"
    assert synced(crew.fleet.weights).equal == NODES * PLANNED
    assert on_each(crew.policy, links) == [[((0,), (1,))], [((1,), (0,))]]


def test_what_the_plan_leaves_to_load_weights_comes_over_it_too(crew: Crew) -> None:
    assert isinstance(crew.fleet, Fleet)
    crew.fleet.weights._connect(frozenset({FUSED, "model.norm.weight"}))
    assert synced(crew.fleet.weights).equal == NODES * (PLANNED - 3)
    crew.fleet.weights._connect(frozenset())


def test_an_engine_is_fed_from_the_copy_on_its_node_alone(crew: Crew, model: Path) -> None:
    assert isinstance(crew.fleet, Fleet)
    for rank in crew.policy:
        kill(rank)
    hybrid = config(model, "Hybrid")
    policy = crews._roles(hybrid, crew.stage)["policy"]
    gather(crews._join(policy, START), START, "join")
    call_all(policy, "load", deadline_seconds=START, what="load")
    weights = WeightSync(hybrid, policy, crew.fleet.weights.engines, "shm")
    weights._connect(frozenset())  # the engines hold what they got last
    assert synced(weights).equal == NODES * PLANNED
    assert on_each(policy, links) == [[], []]
    kill(weights.engines.pop())
    assert synced(weights).equal == PLANNED
    call(weights.engines[0], "alive", deadline_seconds=DEADLINE, what="the engine that is left")
