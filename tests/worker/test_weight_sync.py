"""Both ends of a weight sync, real: two FSDP ranks, vLLM engines on the CPU, gloo between them; what is lost, half done
or changed.
"""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from transformers import AutoModelForCausalLM

from rlhf_api.run import RunConfig
from rlhf_worker import crew as crews
from rlhf_worker.calls import call, call_all
from rlhf_worker.crew import Crew
from rlhf_worker.engines import fleet as fleets
from rlhf_worker.engines.engine import GROUPS
from rlhf_worker.engines.fleet import Fleet
from rlhf_worker.errors import ActorLost, SyncMismatch
from rlhf_worker.experience import Prompt
from rlhf_worker.local import local_ray
from rlhf_worker.placement import Patience, reserve
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.roll import Roll
from rlhf_worker.rollout.episode import Request
from rlhf_worker.stop import Stop
from rlhf_worker.watcher import AGENTS, STOPPED, children, state, workers_of
from rlhf_worker.weights.sync import WeightSync
from tests.worker.configs import run_config
from tests.worker.moe import write_moe
from tests.worker.poked import PokedEngine, flip_one_element, freeze
from tests.worker.processes import below, named, title
from tests.worker.waiting import kill, until

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(900)]
ENGINES, RANKS = 3, 2
DEADLINE = 20.0
# parameters of vLLM's model: 2 layers of 5 besides what follows attention, 2 and 6 for that, embedding, norm, head
PLANNED = 21
FUSED = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return run_config(
        model={"path": str(path), "dtype": "float32"},
        data={"jsonl": {"path": str(path / "prompts.jsonl")}, "maxPromptTokens": 16},
        rollout={"engines": ENGINES, "maxTokens": 16}, trainer={"steps": 4, "gpus": RANKS},
        placement={"mode": "Separated"},
        weightSync={"backend": "gloo", "deadlineSeconds": DEADLINE}, checkpoint={"path": str(path / "checkpoints")},
        rewards=[{"name": "r", "type": "python", "function": "tests.worker.reward_functions:length"}],
    )


def write_model(path: Path) -> None:
    """A dense layer and one of experts, a head of its own, and biases, which vLLM fuses and keeps apart from the packed
    weights.
    """
    write_moe(path, "qwen2_moe", num_experts=3)  # uneven over two ranks
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if name.endswith("bias") else None
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def stop() -> Stop:
    return Stop()


@pytest.fixture(scope="module")
def roll(stop: Stop) -> Iterator[Roll]:
    made = Roll(stop)
    yield made
    made.close()


@pytest.fixture(scope="module")
def crew(config: RunConfig, roll: Roll) -> Iterator[Crew]:
    """One for all tests, in the order in which they lose engines."""
    with pytest.MonkeyPatch.context() as patch, local_ray(config, verbose=False):
        patch.setattr(crews, "RemoteEngine", ray.remote(concurrency_groups=GROUPS)(PokedEngine))
        patch.setattr(fleets, "AFTER_FAILED_SYNC_SECONDS", DEADLINE)
        stage = reserve(config.placement, Patience(60, lambda: True), name="weight-sync")
        roll.watch()
        made = crews.start(config, stage, ConsoleReporter(config), roll)[0]
        made.fleet.close()  # which would start anew what the tests lose
        yield made
        roll.close()


def weights(crew: Crew) -> WeightSync:
    assert isinstance(crew.fleet, Fleet)
    return crew.fleet.weights


def generated(crew: Crew, index: int) -> list[int]:
    request = Request(
        prompt=Prompt(uid="0:0", epoch=0, row=0, token_ids=[3, 4, 5], text="", fields={}), seed=7, temperature=1.0,
        max_tokens=16,
    )
    made = call(crew.fleet.serving[index], "generate", [request], 60.0, deadline_seconds=120, what="generation")
    return list(made[0].token_ids)


class Slow:
    """An actor that stands for those whose modules take long to import."""

    def __init__(self) -> None:
        time.sleep(1000)


def test_an_actor_that_is_stopped_before_it_can_be_asked_is_ended(crew: Crew) -> None:
    """A rank that was stopped while it imported torch was found by the deadline of the start, 270 s."""
    slow = ray.remote(num_cpus=0)(Slow).remote()
    until(lambda: bool(named(os.getpid(), "ray::Slow")), 120)
    os.kill(named(os.getpid(), "ray::Slow")[0], signal.SIGSTOP)
    with pytest.raises(ActorDiedError):
        ray.get(slow.__ray_ready__.remote(), timeout=120)


def test_a_watcher_knows_workers_from_the_agents_of_its_raylet(crew: Crew) -> None:
    (raylet,) = [pid for pid in below(os.getpid()) if "raylet/raylet" in title(pid).partition("\0")[0]]
    assert {name for pid in children(raylet) if (name := title(pid)).endswith("Agent")} == set(AGENTS)
    at_work = {title(pid).partition(".")[0] for pid in workers_of(raylet)}
    assert {"ray::Feed", "ray::Policy", "ray::PokedEngine"} <= at_work


def test_all_engines_hold_every_parameter(crew: Crew) -> None:
    """Rows of two ranks, passed on from engine to engine: checksums of each parameter, and the same tokens from each
    engine.
    """
    proof = weights(crew)(prove=True).proof
    assert proof is not None and proof.probe is not None
    assert proof.equal == ENGINES * PLANNED and proof.probe < 1e-4
    assert len({tuple(generated(crew, index)) for index in range(ENGINES)}) == 1


def test_one_flipped_element_is_seen(crew: Crew) -> None:
    name = call(crew.fleet.serving[1], "poke", flip_one_element, deadline_seconds=DEADLINE, what="poke")
    with pytest.raises(SyncMismatch, match=r"engine 1 rank 0 differs from the trainer at version 0 in 1 parameters: "
        rf"\['{name}'\]"):
        weights(crew).prove(0)
    assert weights(crew)(prove=True).proof is not None


def test_what_the_plan_leaves_to_load_weights_arrives_all_the_same(crew: Crew) -> None:
    weights(crew)._connect(frozenset({FUSED, "model.norm.weight"}))
    proof = weights(crew)(prove=True).proof
    assert proof is not None and proof.probe is not None
    assert proof.equal == ENGINES * (PLANNED - 3) and proof.probe < 1e-4  # the fused bias goes with its layer
    weights(crew)._connect(frozenset())


def test_an_engine_that_holds_a_part_serves_nothing_until_a_whole_sync(crew: Crew) -> None:
    call_all(crew.fleet.serving, "pause", deadline_seconds=DEADLINE, what="pause")
    with pytest.raises(RuntimeError, match="holds a part of a sync, after version 0: it serves nothing"):
        generated(crew, 0)
    weights(crew)(prove=False)
    assert len(generated(crew, 0)) == 16


def test_engines_that_slept_get_a_whole_sync_before_they_serve(crew: Crew) -> None:
    """vLLM's CPU workers only pretend to sleep; its scheduler is as still as on a GPU until all is awake."""
    sleepers = list(crew.fleet.serving)
    crew.fleet.sleep()
    assert call_all(sleepers, "sleeps", deadline_seconds=DEADLINE, what="sleep") == [True] * ENGINES
    with pytest.raises(RuntimeError, match="it serves nothing"):
        call(sleepers[0], "generate", [], 60.0, deadline_seconds=DEADLINE, what="generation")
    proof = crew.fleet.sync(prove=True).proof
    assert proof is not None and proof.equal == ENGINES * PLANNED
    assert call_all(sleepers, "sleeps", deadline_seconds=DEADLINE, what="sleep") == [False] * ENGINES
    assert crew.fleet.serving == sleepers and len(generated(crew, 0)) == 16


def test_an_engine_that_hangs_is_left_out_after_the_deadline(crew: Crew) -> None:
    frozen = call(crew.fleet.serving[2], "poke", freeze, deadline_seconds=DEADLINE, what="freeze")
    try:
        until(lambda: state(frozen) == STOPPED, DEADLINE)
        synced = crew.fleet.sync(prove=True)
    finally:
        with suppress(ProcessLookupError):  # the node's watcher ends what stays stopped
            os.kill(frozen, signal.SIGKILL)
    assert synced.proof is not None and synced.proof.equal == (ENGINES - 1) * PLANNED
    assert len(crew.fleet.serving) == ENGINES - 1


def test_an_engine_that_dies_is_left_out(crew: Crew) -> None:
    kill(crew.fleet.serving[0])
    synced = crew.fleet.sync(prove=True)
    assert synced.proof is not None and synced.proof.equal == PLANNED
    assert len(crew.fleet.serving) == 1 and len(generated(crew, 0)) == 16


def test_without_any_engine_the_sync_fails(crew: Crew) -> None:
    kill(crew.fleet.serving[0])
    # of the engine, or of a trainer rank's link to it: whichever is told first
    with pytest.raises(ray.exceptions.RayError):
        weights(crew)(prove=False)
    with pytest.raises(ray.exceptions.RayError):
        generated(crew, 0)


def waits(stop: Stop) -> bool:
    """As every wait of the driver does between its slices."""
    stop.interrupt()
    return False


def test_a_stopped_rank_ends_the_run_by_its_name(crew: Crew, roll: Roll, stop: Stop) -> None:
    """Its peer waits for it in a collective, and hears first of a broken connection; the driver may wait for something
    else.
    """
    stop.check()
    pid = named(os.getpid(), "ray::Policy")[-1]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises((ray.exceptions.RayError, RuntimeError)) as caught:
        call_all(crew.policy, "probe", [3, 4, 5, 6], deadline_seconds=DEADLINE, what="probe")
    words = (rf"trainer rank \d \(pod {re.escape(socket.gethostname())}, process {pid}\) was stopped by a signal "
        r"\(state T\)")
    assert re.match(words, str(roll.explained(caught.value)))
    with pytest.raises(ActorLost, match=words):
        until(lambda: waits(stop), DEADLINE)
