"""Adapters from two FSDP ranks into a vLLM engine of two ranks on the CPU: what it computes with, what requests under
way keep, what the proof sees, and what a sleep and a death leave.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray
import torch

from hack.tiny_model import write
from rlhf_worker import crew as crews
from rlhf_worker.calls import call, gather
from rlhf_worker.crew import Crew
from rlhf_worker.engines import fleet as fleets
from rlhf_worker.engines.engine import GROUPS
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.engines.ledger import Health
from rlhf_worker.errors import SyncMismatch
from rlhf_worker.experience import Sample
from rlhf_worker.local import local_ray
from rlhf_worker.placement import Patience, reserve
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.roll import Roll
from rlhf_worker.rollout.episode import Request
from rlhf_worker.stop import Stop
from rlhf_worker.weights.sync import Synced, WeightSync
from tests.worker.configs import run_config
from tests.worker.poked import PokedEngine
from tests.worker.samples import a_prompt, sequences
from tests.worker.waiting import kill, until

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]
RANKS = 2  # of the trainer, and of the engine
TENSORS = 2 * 7 * 2  # layers, linear layers of each, A and B
CALM, LOUD = 1e-4, 0.05  # differences of log probabilities: of rounding, and of another version


class AdapterEngine(PokedEngine):
    async def loaded(self) -> list[int]:
        return sorted(await self._running().list_loras())

    async def begin(self, request: Request) -> None:
        """Returns with the request under way and the engine paused: it cannot be finished."""
        assert self.adapters is not None
        self.begun = asyncio.create_task(self.generate([request], 60.0))
        while not self.adapters._users.total():  # noqa: ASYNC110  # the next turns of the loop bring it
            await asyncio.sleep(0)
        await self.pause()

    async def end(self) -> list[Sample]:
        made: list[Sample] = await self.begun
        return made

    async def sleeping(self) -> bool:
        return bool(await self._running().is_sleeping())


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    config = run_config(
        model={"path": str(path), "dtype": "float32", "lora": {"rank": 4}},
        data={"jsonl": {"path": str(path / "prompts.jsonl")}, "maxPromptTokens": 64},
        rollout={"maxTokens": 300, "staleness": 1, "tensorParallelSize": RANKS},
        trainer={"steps": 4, "gpus": RANKS, "learningRate": 0.05}, placement={"mode": "Separated"},
        weightSync={"deadlineSeconds": 30}, checkpoint={"path": str(path / "checkpoints")},
        rewards=[{"name": "r", "type": "python", "function": "tests.worker.reward_functions:length"}],
    )
    with pytest.MonkeyPatch.context() as patch, local_ray(config, verbose=False):
        patch.setattr(crews, "RemoteEngine", ray.remote(concurrency_groups=GROUPS)(AdapterEngine))
        made = crews.start(
            config, reserve(config.placement, Patience(60, lambda: True), name="lora"), ConsoleReporter(config),
            Roll(Stop()),
        )[0]
        made.fleet.close()
        yield made


def weights(crew: Crew) -> WeightSync:
    assert isinstance(crew.fleet, Fleet)
    return crew.fleet.weights


def ask(crew: Crew, method: str, *args: Any) -> Any:
    return call(crew.fleet.serving[0], method, *args, deadline_seconds=60, what=method)


def train(crew: Crew) -> None:
    """One update of one micro-batch on each rank."""
    given = [[sequences([(3, 9)] * 4, seed=rank)] for rank in range(RANKS)]
    calls = [rank.train.remote("policy", own, [[[0, 1, 2, 3]]]) for rank, own in zip(crew.policy, given, strict=True)]
    gather(calls, 60, "training")


def proven(synced: Synced) -> None:
    """Every tensor on each rank of the engine, by content; the model below them by what it computes."""
    proof = synced.proof
    assert proof is not None and proof.probe is not None and proof.probe < CALM
    assert (proof.equal, proof.indirect) == (RANKS * TENSORS, 0)


def difference(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


TOKENS = list(range(3, 40))


def test_the_engine_computes_with_each_version_that_is_sent(crew: Crew) -> None:
    seen = []
    for version in range(3):
        synced = weights(crew)(prove=True)
        assert synced.version == version and synced.backend == "adapter"
        proven(synced)
        seen.append(ask(crew, "probe", TOKENS))
        assert ask(crew, "loaded") == [version + 1]
        train(crew)
    assert difference(seen[0], seen[1]) > LOUD and difference(seen[1], seen[2]) > LOUD


def test_a_request_under_way_keeps_its_adapter_and_says_so(crew: Crew) -> None:
    before = weights(crew)(prove=False).version
    request = Request(prompt=a_prompt(), seed=7, temperature=1.0, max_tokens=300)
    wanted: list[Sample] = ask(crew, "generate", [request], 60.0)
    ask(crew, "begin", request)
    train(crew)
    after = weights(crew)(prove=True).version
    assert ask(crew, "loaded") == [before + 1, after + 1]
    (sample,) = ask(crew, "end")
    (later,) = ask(crew, "generate", [request], 60.0)
    assert (set(sample.versions.tolist()), set(later.versions.tolist())) == ({before}, {after})
    assert sample.token_ids.tolist() == wanted[0].token_ids.tolist() != later.token_ids.tolist()
    assert torch.allclose(torch.tensor(sample.logprobs.tolist()), torch.tensor(wanted[0].logprobs.tolist()), atol=CALM)


def forget(worker: Any) -> None:
    """The adapter's B in the memory that the engine computes with."""
    for module in worker.model_runner.lora_manager._adapter_manager.modules.values():
        for stacked in module.lora_b_stacked:
            stacked.zero_()


def flip(worker: Any, rank: int) -> None:
    """The lowest bit of one element of the newest A, in one layer of one rank: nothing that log probabilities show."""
    manager = worker.model_runner.lora_manager._adapter_manager
    newest = manager.lora_index_to_id.index(max(number for number in manager.lora_index_to_id if number))
    if worker.rank == rank:
        manager.modules["model.layers.1.mlp.gate_up_proj"].lora_a_stacked[1].view(torch.int32)[newest, 0, 2, 5] ^= 1


def test_another_version_is_seen_however_near(crew: Crew) -> None:
    version = weights(crew)(prove=True).version
    ask(crew, "poke", partial(flip, rank=1))
    both = (r"\['model.layers.1.mlp.gate_proj.lora_A.weight', 'model.layers.1.mlp.gate_proj.lora_B.weight', "
        r"'model.layers.1.mlp.up_proj")
    with pytest.raises(SyncMismatch, match=f"engine 0 rank 1 differs from the trainer at version {version} in 4 "
        f"parameters: {both}"):
        weights(crew).prove(version)
    assert weights(crew)._probe(version) < CALM
    train(crew)  # the next version, which has not been sent
    with pytest.raises(SyncMismatch, match=f"engine 0 rank 0 differs from the trainer at version {version + 1} in "
        f"{TENSORS} parameters"):
        weights(crew).prove(version + 1)
    proven(weights(crew)(prove=True))


def test_a_wrong_adapter_is_seen_and_the_next_version_mends_it(crew: Crew) -> None:
    version = weights(crew)(prove=True).version
    ask(crew, "poke", forget)
    with pytest.raises(SyncMismatch, match=f"engine 0 rank 0 differs from the trainer at version {version} in "
        f"{TENSORS} parameters: .*lora_A"):
        weights(crew).prove(version)
    train(crew)
    proven(weights(crew)(prove=True))


def like_a_gpu(worker: Any) -> None:
    """A CPU worker does not sleep. This one does to the model and the slots, which vLLM allocates in one pool, what
    level 2 does: it forgets them.
    """

    def sleep(level: int) -> None:
        model = worker.model_runner.model
        slots = [
            slot for module in model.modules() for name in ("lora_a_stacked", "lora_b_stacked")
            for slot in vars(module).get(name, ())
        ]
        for tensor in [*model.parameters(), *slots] if level > 1 else ():
            tensor.data.zero_()

    worker.sleep = sleep


def test_a_sleep_leaves_the_model_and_the_adapter(crew: Crew) -> None:
    ask(crew, "poke", like_a_gpu)
    before = ask(crew, "probe", TOKENS)
    ask(crew, "sleep")
    assert ask(crew, "sleeping")
    proven(weights(crew)(prove=True))
    assert not ask(crew, "sleeping")
    assert difference(before, ask(crew, "probe", TOKENS)) < CALM


def test_a_dead_engine_comes_back_with_the_newest_adapter(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "PROBE_SECONDS", 0.2)
    assert isinstance(crew.fleet, Fleet)
    train(crew)
    parts = crew.fleet.actors, crew.fleet.weights, crew.fleet._spawn
    fleet = Fleet(*parts, lambda _: None, least=1, slots=8, start_seconds=300.0, sleep_seconds=60.0)
    try:
        version = fleet.sync(prove=False).version
        kill(fleet.actors[0])
        until(lambda: fleet.health() == [Health.RESTARTING], 60)
        until(lambda: fleet.health() == [Health.STALE], 180)
        assert fleet.actors[0] not in fleet.serving
        synced = fleet.sync(prove=True)
        proven(synced)
        assert synced.version == version and fleet.health() == [Health.HEALTHY] and fleet.serving == fleet.actors
        assert call(fleet.actors[0], "loaded", deadline_seconds=60, what="loaded") == [version + 1]
        request = Request(prompt=a_prompt(), seed=7, temperature=1.0, max_tokens=8)
        (sample,) = call(fleet.actors[0], "generate", [request], 60.0, deadline_seconds=60, what="generate")
        assert set(sample.versions.tolist()) == {version}
    finally:
        fleet.close()
