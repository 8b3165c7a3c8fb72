"""The checks before the first step: the pure ones in tables, the collective ones on gloo ranks, the driver's part with Ray actors."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from hack.tiny_model import write
from rlhf_api.job import LoRASpec, ModelSpec, PolicySpec
from rlhf_worker import preflight
from rlhf_worker.errors import BadSpec, DeadlineExceeded, PreflightFailed
from rlhf_worker.storage import Store
from rlhf_worker.trainer import checks
from rlhf_worker.trainer.checks import CHECKS, GIB, check_memory, check_shared_memory, host_memory, needed_bytes, parameters
from tests.worker.configs import run_config
from tests.worker.ranks import over_ranks
from tests.worker.waiting import until

BILLION = 10**9


@pytest.mark.parametrize(
    ("counts", "world", "offload", "expected"),
    [
        ({"policy": BILLION}, 1, False, 16 * BILLION),
        ({"policy": BILLION, "reference": BILLION}, 4, False, 5 * BILLION),
        ({"policy": BILLION, "critic": BILLION, "reference": BILLION}, 1, True, 16 * BILLION),
        ({"reward:r": BILLION}, 2, False, 2 * BILLION),
    ],
)
def test_what_roles_need_at_least(counts: dict[str, int], world: int, offload: bool, expected: int) -> None:
    assert needed_bytes(run_config(trainer={"steps": 1, "offload": offload}), counts, world) == expected


def test_a_policy_with_adapters_needs_what_a_frozen_role_needs() -> None:
    config = run_config(model={"path": "/m", "lora": {}}, algorithm={"name": "ppo"})
    assert needed_bytes(config, {"policy": BILLION, "critic": BILLION}, 2) == 10 * BILLION


def test_memory_that_is_there_is_enough() -> None:
    check_memory(30 * GIB, 50 * GIB, 80 * GIB, 140 * GIB, "GPU x")


def test_memory_that_something_else_holds_may_come_back() -> None:
    with pytest.raises(PreflightFailed, match=r"GPU x has 60\.0 GiB free of 140\.0, but the trainer's roles need at least 30\.0 GiB and the engine takes 50\.0 GiB: something else"):
        check_memory(30 * GIB, 50 * GIB, 60 * GIB, 140 * GIB, "GPU x")


def test_what_can_never_fit_is_a_wrong_spec() -> None:
    with pytest.raises(BadSpec, match=r"has 140\.0 GiB, but .* need at least 100\.0 GiB.*raise spec\.trainer\.gpus, set spec\.trainer\.offload, or lower spec\.placement\.fractions\.rollout"):
        check_memory(100 * GIB, 50 * GIB, 140 * GIB, 140 * GIB, "GPU x")


@pytest.mark.parametrize(("size", "device", "world", "enough"), [(64 << 20, "cuda", 1, True), (64 << 20, "cuda", 8, False), (2 << 30, "cuda", 8, True), (64 << 20, "cpu", 2, True)])
def test_shared_memory(size: int, device: str, world: int, enough: bool) -> None:
    if enough:
        check_shared_memory(size, device, world)
        return
    with pytest.raises(PreflightFailed, match=r"/dev/shm has 64 MiB, 256 MiB are needed: mount an emptyDir"):
        check_shared_memory(size, device, world)


def test_the_hosts_memory() -> None:
    assert host_memory("MemTotal:  2048 kB\nMemFree:  1 kB\nMemAvailable:  1024 kB\nBuffers: 7 kB\n") == (1 << 20, 2 << 20)


def test_parameters_are_counted_without_loading_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write(tmp_path)
    count = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert parameters(ModelSpec(path=str(tmp_path), dtype="float32")) == count
    assert parameters(PolicySpec(path=str(tmp_path), lora=LoRASpec(target_modules=("q_proj",)))) == count


def rank_of_two(rank: int, world: int, tmp_path: Path, model: Path, case: str) -> str:
    """What it was told."""
    root = tmp_path / ("run" if case != "apart" else f"run-{rank}")
    if case == "blocked":
        (tmp_path / "file").touch()
        root = tmp_path / "file" / "run"
    config = run_config(model={"path": str(model), "dtype": "float32"})
    held: Any = SimpleNamespace(config=config, rank=rank, world=world, device=torch.device("cpu"), names=["policy"], store=Store(str(root)))
    checks.REDUCE_SECONDS = 1.0
    told = ""
    try:
        for name, check in CHECKS.items() if not (case == "hang" and rank == 1) else ():
            last = name
            check(held)
    except PreflightFailed as error:
        told = f"{last}: {error}"
    (tmp_path / f"{case}-{rank}").touch()
    until(lambda: all((tmp_path / f"{case}-{r}").exists() for r in range(world)), 120)  # a rank that is gone would end the other's wait
    return told


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("well", ""),
        ("apart", "CheckpointPath: spec.checkpoint.path ({root}/run-1) is another directory in each trainer pod: mount a volume that they share"),
        ("blocked", "CheckpointPath: spec.checkpoint.path ({root}/file/run) cannot be written: [Errno 20] Not a directory"),
        ("hang", "Reduce: an all-reduce over 2 trainer ranks did not end in 1 s"),
    ],
)
def test_ranks_together(tmp_path: Path, case: str, told: str) -> None:
    write(tmp_path / "model")
    found = over_ranks(2, rank_of_two, tmp_path, tmp_path / "model", case)
    expected = told.format(root=tmp_path)
    assert found == ["", ""] if not told else any(text.startswith(expected) for text in found), found


class Rank:
    def __init__(self, ailing: str) -> None:
        self.ailing = ailing

    def preflight(self, check: str) -> None:
        if check == self.ailing == "Reduce":
            raise PreflightFailed("the network is down")
        if check == self.ailing:
            time.sleep(600)

    def try_rewards(self) -> None:
        if self.ailing == "Rewards":
            raise BadSpec("rewards[r]: no such function")


RankActor: Any = ray.remote(num_cpus=0)(Rank)


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def update(self, synced: Any = None, **fields: Any) -> None:
        self.fields |= fields


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=f"/tmp/rp-{os.getpid()}", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("ailing", "kind", "message"),
    [
        ("", None, ""),
        ("Reduce", PreflightFailed, "PreflightFailed: the network is down"),
        ("Rewards", BadSpec, "BadSpec: rewards[r]: no such function"),
        ("SharedGPU", DeadlineExceeded, "DeadlineExceeded: preflight check SharedGPU: 1 of 2 not done after"),
    ],
)
def test_the_check_that_fails_is_told_by_its_name(cluster: None, monkeypatch: pytest.MonkeyPatch, ailing: str, kind: type[Exception] | None, message: str) -> None:
    monkeypatch.setattr(preflight, "DEADLINE_SECONDS", 5.0 if kind is DeadlineExceeded else 60.0)
    told, ranks, feed = Told(), [RankActor.remote(""), RankActor.remote(ailing)], RankActor.remote(ailing)
    ray.get([actor.__ray_ready__.remote() for actor in (*ranks, feed)])  # their processes' start is not preflight's time
    if kind is None:
        preflight.preflight([ranks], feed, told)  # type: ignore[arg-type]
        assert told.fields["preflight"].failed is None and told.fields["preflight"].message.startswith("Devices ")
        return
    with pytest.raises(kind):
        preflight.preflight([ranks], feed, told)  # type: ignore[arg-type]
    assert told.fields["preflight"].failed == ailing and message in told.fields["preflight"].message
