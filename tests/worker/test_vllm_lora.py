"""Adapters from two FSDP ranks into a vLLM engine on the CPU: what it computes with, what requests under way keep, and what the proof sees."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from hack.tiny_model import write
from rlhf_worker import crew as crews
from rlhf_worker.calls import call, gather
from rlhf_worker.crew import Crew
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.errors import SyncMismatch
from rlhf_worker.experience import Sample, pack
from rlhf_worker.local import local_ray
from rlhf_worker.placement import reserve
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.rollout.episode import Request
from rlhf_worker.weights.sync import WeightSync
from tests.worker.configs import run_config
from tests.worker.poked import PokedEngine
from tests.worker.samples import a_prompt, sequences

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]
RANKS = 2
LAYERS = 2
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
        return await self.begun


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    config = run_config(
        model={"path": str(path), "dtype": "float32", "lora": {"rank": 4}}, data={"jsonl": {"path": str(path / "prompts.jsonl")}, "maxPromptTokens": 64},
        rollout={"maxTokens": 300, "staleness": 1, "tensorParallelSize": RANKS}, trainer={"steps": 4, "gpus": RANKS, "learningRate": 0.05}, placement={"mode": "Separated"},
        weightSync={"deadlineSeconds": 30}, checkpoint={"path": str(path / "checkpoints")},
        rewards=[{"name": "r", "type": "python", "function": "tests.worker.reward_functions:length"}],
    )
    with pytest.MonkeyPatch.context() as patch, local_ray(config, verbose=False):
        patch.setattr(crews, "RemoteEngine", ray.remote(AdapterEngine))
        made = crews.start(config, reserve(config.placement, 60, name="lora"), ConsoleReporter(config))[0]
        made.fleet.close()
        yield made


def weights(crew: Crew) -> WeightSync:
    assert isinstance(crew.fleet, Fleet)
    return crew.fleet.weights


def ask(crew: Crew, method: str, *args: Any) -> Any:
    return call(crew.fleet.serving[0], method, *args, deadline_seconds=60, what=method)


def train(crew: Crew) -> None:
    batches = [[[*pack(sequences([(3, 9)] * 4, seed=rank), 1000)]] for rank in range(RANKS)]
    gather([rank.train.remote("policy", batch) for rank, batch in zip(crew.policy, batches, strict=True)], 60, "training")


def difference(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


TOKENS = list(range(3, 40))


def test_the_engine_computes_with_each_version_that_is_sent(crew: Crew) -> None:
    seen = []
    for version in range(3):
        synced = weights(crew)(prove=True)
        assert synced.version == version and synced.backend == "adapter"
        assert synced.proof is not None and synced.proof.probe is not None and synced.proof.probe < CALM
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
    assert (set(sample.versions), set(later.versions)) == ({before}, {after})
    assert sample.token_ids == wanted[0].token_ids != later.token_ids
    assert torch.allclose(torch.tensor(sample.logprobs), torch.tensor(wanted[0].logprobs), atol=CALM)


def forget(worker: Any) -> None:
    """The adapter's B in the memory that the engine computes with."""
    for module in worker.model_runner.lora_manager._adapter_manager.modules.values():
        for stacked in getattr(module, "lora_b_stacked", ()):
            stacked.zero_()


def test_a_wrong_adapter_is_seen_and_the_next_version_mends_it(crew: Crew) -> None:
    version = weights(crew)(prove=True).version
    ask(crew, "poke", forget)
    with pytest.raises(SyncMismatch, match=f"engine 0 rank 0 differs from the trainer at version {version} in {LAYERS * 7} parameters: .*lora_B"):
        weights(crew).prove(version)
    train(crew)
    proof = weights(crew)(prove=True).proof
    assert proof is not None and proof.probe is not None and proof.probe < CALM
