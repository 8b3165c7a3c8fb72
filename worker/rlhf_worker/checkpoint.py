"""Checkpoints: `<path>/step-<n>/` holds torch DCP's shards of model and optimizer, every rank's RNG, and run.json.

A directory gets its name only when it is whole; `latest` names the newest for people. Save and load are collectives.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from rlhf_worker.errors import BadData

NAME = re.compile(r"step-(\d+)")
RUN, RNG, LATEST = "run.json", "rng.pt", "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything of a run besides tensors. `version`: optimizer updates since the base model."""

    step: int
    version: int
    model: dict[str, Any]
    sampler: dict[str, Any]


def whole(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    found = [(int(match[1]), p) for p in (root.iterdir() if root.is_dir() else ()) if (match := NAME.fullmatch(p.name)) and (p / RUN).is_file()]
    return [path for _, path in sorted(found)]


def newest(root: Path) -> Path | None:
    paths = whole(root)
    return paths[-1] if paths else None


def read_run(path: Path, model: dict[str, Any]) -> RunState:
    """Raises BadData for a checkpoint of another model, or one that cannot be read."""
    try:
        state = RunState(**json.loads((path / RUN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadData(f"checkpoint {path}: {RUN} cannot be read ({error}): delete that directory to resume from the one before it") from error
    differ = [name for name in model if state.model.get(name) != model[name]]
    if differ:
        told = ", ".join(f"{name} {state.model.get(name)!r} there, {model[name]!r} here" for name in differ)
        raise BadData(f"checkpoint {path} is of another model ({told}): set spec.checkpoint.path to an empty directory, or spec.model to that model")
    return state


def save(root: Path, state: RunState, module: nn.Module, optimizer: Optimizer, keep: int) -> Path:
    """Collective over all ranks; returns the checkpoint's path when every rank's part is in place."""
    target, work = root / f"step-{state.step}", root / f".step-{state.step}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    save_tensors(_tensors(module, optimizer), checkpoint_id=work)
    rngs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rngs, torch.get_rng_state())
    if dist.get_rank() == 0:
        torch.save(rngs, work / RNG)
        _write(work / RUN, json.dumps(asdict(state)))
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        _write(root / LATEST, target.name)
        _prune(root, keep)
    dist.barrier()
    return target


def load(path: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Collective. Model, optimizer and, with the same number of ranks, RNG. Raises BadData."""
    tensors = _tensors(module, optimizer)
    try:
        load_tensors(tensors, checkpoint_id=path)
        rngs = torch.load(path / RNG, weights_only=True)
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise BadData(f"checkpoint {path} cannot be loaded ({error}): delete that directory to resume from the one before it") from error
    set_state_dict(module, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    if len(rngs) == dist.get_world_size():
        torch.set_rng_state(rngs[dist.get_rank()])


def _tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model, optim = get_state_dict(module, optimizer)
    return {"model": model, "optimizer": optim}


def _write(path: Path, text: str) -> None:
    """Atomic, and on the disk when it returns."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _prune(root: Path, keep: int) -> None:
    for path in whole(root)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
