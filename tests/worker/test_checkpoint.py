"""Checkpoints on one gloo rank: bit-exact, atomic, pruned, and of this model only."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from rlhf_worker import checkpoint
from rlhf_worker.checkpoint import RunState
from rlhf_worker.errors import BadData

MODEL = {"path": "/m", "hidden_size": 8}


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(seed: int) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module, AdamW(module.parameters(), lr=0.01)


def train(module: nn.Module, optimizer: AdamW, steps: int) -> None:
    for _ in range(steps):
        module(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(step: int) -> RunState:
    return RunState(step=step, version=step, model=MODEL, sampler={"epoch": 0, "position": step})


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().clone() for p in module.parameters()]  # type: ignore[attr-defined]


def test_two_n_steps_equal_n_and_a_resume_and_n_bit_for_bit(tmp_path: Path) -> None:
    module, optimizer = made(0)
    train(module, optimizer, 3)
    path = checkpoint.save(tmp_path / "run", state(3), module, optimizer, keep=2)
    train(module, optimizer, 3)
    resumed, its_optimizer = made(1)
    checkpoint.load(path, resumed, its_optimizer)
    assert checkpoint.read_run(path, MODEL) == state(3)
    train(resumed, its_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(module), weights(resumed), strict=True))


def test_the_newest_whole_one_counts_and_old_ones_go(tmp_path: Path) -> None:
    module, optimizer = made(0)
    for step in (2, 10, 9):
        checkpoint.save(tmp_path, state(step), module, optimizer, keep=2)
    assert [p.name for p in checkpoint.whole(tmp_path)] == ["step-9", "step-10"]
    (tmp_path / "step-11").mkdir()  # died before run.json
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-10"
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), *made(0), keep=1)
    with pytest.raises(BadData, match=r"step-1 is of another model \(path '/m' there, '/other' here\): set spec\.checkpoint\.path"):
        checkpoint.read_run(path, MODEL | {"path": "/other"})


def test_an_unreadable_checkpoint_is_bad_data(tmp_path: Path) -> None:
    module, optimizer = made(0)
    path = checkpoint.save(tmp_path, state(1), module, optimizer, keep=1)
    (path / checkpoint.RUN).write_text("{")
    with pytest.raises(BadData, match=r"run\.json cannot be read"):
        checkpoint.read_run(path, MODEL)
    next(path.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(BadData, match="cannot be loaded"):
        checkpoint.load(path, module, optimizer)


def test_latest_names_the_newest_for_people(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), *made(0), keep=1)
    assert (tmp_path / "latest").read_text() == "step-7"
    assert json.loads((path / "run.json").read_text())["sampler"] == {"epoch": 0, "position": 7}
