"""Checkpoints on gloo ranks: bit-exact, in the background, whole or not there, pruned, checked file by file, and of
this model only.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from hack.tiny_model import write
from rlhf_api.job import BestSpec, TrainerSpec
from rlhf_worker.algorithm.schedule import learning_rate
from rlhf_worker.errors import BadData, BadSpec, Fenced
from rlhf_worker.experience import mini_batches
from rlhf_worker.storage import Store
from rlhf_worker.trainer import checkpoint
from rlhf_worker.trainer.checkpoint import Restored, RunState, Saver, SummingFiles, whole
from rlhf_worker.trainer.fence import Writer
from rlhf_worker.trainer.rank import Trainer
from tests.worker import checkpoints
from tests.worker.buckets import Bucket
from tests.worker.configs import run_config
from tests.worker.ranks import over_ranks
from tests.worker.samples import dealt, sequences

pytestmark = pytest.mark.usefixtures("group")
MODEL = {"path": "/m", "hidden_size": 8}


@pytest.fixture(params=["directory", "file", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    Bucket.empty()
    return {
        "directory": str(tmp_path / "run"), "file": f"file://{tmp_path}/run", "bucket": "bucket://models/run",
    }[request.param]


Made = tuple[nn.Module, AdamW]


def made(seed: int, width: int = 8) -> Made:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module, AdamW(module.parameters(), lr=0.01)


def train(held: Made, steps: int, batch: int = 4) -> None:
    module, optimizer = held
    for _ in range(steps):
        module(torch.randn(batch, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(step: int) -> RunState:
    return RunState(
        step=step, version=step, model=MODEL, sampler={"epoch": 0, "position": step}, loop={"kl": 0.1 * step},
    )


def saver(
    root: str | Path, keep: int = 2, expected: tuple[str, ...] = ("policy",), driver: str = "a", leads: bool = True,
    best: BestSpec | None = None,
) -> Saver:
    its = Saver(str(root), keep, expected, driver, leads=leads, seconds=60.0, best=best)
    its.fence("", 0)
    return its


def named(step: int, driver: str = "a", job: str = "", attempt: int = 0) -> str:
    return f"step-{step}.{Writer(job, attempt, driver).mark}"


def saved(root: str | Path, *steps: int, keep: int = 2) -> Made:
    held, its = made(0), saver(root, keep)
    for step in steps:
        its.begin(state(step), {"policy": held})
    outcomes = its.finished(wait=True)
    assert [o.error for o in outcomes] == [None] * len(steps)
    return held


def weights(held: Made) -> list[torch.Tensor]:
    return [p.full_tensor().clone() for p in held[0].parameters()]  # type: ignore[attr-defined]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_two_n_steps_equal_n_and_a_resume_and_n_bit_for_bit(root: str) -> None:
    """Policy and critic, also where the loop goes on while the files are still being written."""
    roles = {"policy": made(0), "critic": made(7)}
    for held in roles.values():
        train(held, 3)
    its = saver(root, expected=("policy", "critic"))
    its.begin(state(3), roles)
    for held in roles.values():
        train(held, 3)
    assert its.finished(wait=True) == [checkpoint.Outcome(step=3, path=f"{root}/{named(3)}", error=None)]
    resumed = {"policy": made(1), "critic": made(2)}
    restored = saver(root, expected=("policy", "critic")).restore(MODEL, resumed)
    assert restored == Restored(state(3), [], f"{root}/{named(3)}")
    for held in resumed.values():
        train(held, 3)
    assert all(same(weights(roles[name]), weights(resumed[name])) for name in roles)


def test_only_the_newest_are_kept_and_a_half_written_one_does_not_count(root: str) -> None:
    saved(root, 2, 9, 10)
    store = Store(root)
    store.write("step-11/policy/__0_0.distcp", b"died before run.json")
    assert whole(store) == [named(9), named(10)]
    assert store.read("latest") == named(10).encode()
    saved(root, 12)
    assert [name for name in store.names() if name.startswith("step")] == [named(10), named(12)]
    assert saver(f"{root}/nothing").restore(MODEL, {"policy": made(0)}) == Restored(None, [])


def scores(root: str | Path, values: dict[int, float | None], best: BestSpec | None, driver: str = "a") -> Saver:
    """A save of each step with the score that the loop remembers of it; only the newest is kept, besides the best."""
    its = saver(root, 1, driver=driver, best=best)
    for step, value in values.items():
        memory = {} if value is None else {"score": {"eval/a/mean_reward": value}}
        its.begin(replace(state(step), loop=memory), {"policy": made(step)})
        assert its.finished(wait=True)[0].error is None
    return its


@pytest.mark.parametrize(("mode", "kept"), [("max", [4, 12]), ("min", [2, 12]), (None, [12])])
def test_the_best_is_kept_beside_the_newest_and_read_back(root: str, mode: Any, kept: list[int]) -> None:
    best = BestSpec(metric="eval/a/mean_reward", mode=mode) if mode else None
    its = scores(root, {2: 0.1, 4: 0.8, 6: None, 8: 0.8, 10: 0.3, 12: None}, best)
    assert whole(Store(root)) == [named(step) for step in kept]
    module, _ = held = made(99)
    assert its.load_best(module) == (named(kept[0]) if mode else "")
    assert same(weights(held), weights(made(kept[0] if mode else 99)))
    resumed = saver(root, 1, best=best).restore(MODEL, {"policy": made(1)})
    assert resumed.state is not None and resumed.state.step == 12


def test_another_metric_a_damaged_and_a_void_checkpoint_are_not_the_best(root: str) -> None:
    best = BestSpec(metric="eval/a/mean_reward")
    early = scores(root, {2: 0.1, 3: 0.2}, None, "a")
    early.keep = 9
    late = saver(root, 9, driver="b", best=best)
    late.restore(MODEL, {"policy": made(0)})
    Store(root).write(f"{named(4)}/run.json", Store(root).read(f"{named(3)}/run.json").replace(b"0.2", b"0.9"))
    assert Saver(root, 9, ("policy",), "c", leads=True, seconds=60, best=BestSpec(metric="reward/mean"))._ranked() == []
    assert late._ranked() == [named(3)]
    spoil(Store(root), f"{named(3)}/policy/__0_0.distcp", "flipped")
    assert late.load_best(made(0)[0]) == ""


def spoil(store: Store, name: str, how: str) -> None:
    data = store.read(name)
    store.remove(name)
    if how != "gone":
        store.write(name, data[:-9] if how == "cut" else data[:40] + bytes([data[40] ^ 1]) + data[41:])


@pytest.mark.parametrize(
    ("file", "how", "told"),
    [
        ("policy/__0_0.distcp", "flipped", "the checksum of step-9.attempt-0-[0-9a-f]+/policy/__0_0.distcp differs"),
        ("policy/__0_0.distcp", "cut", r"step-9.attempt-0-[0-9a-f]+/policy/__0_0.distcp has \d+ bytes of \d+"),
        ("policy/.metadata", "gone", "policy/.metadata"),
        ("policy/rng.pt", "cut", r"policy/rng.pt has \d+ bytes"),
        ("run.json", "flipped", "run.json is not as it was written"),
        ("run.json", "cut", "run.json is not as it was written"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(root: str, file: str, how: str, told: str) -> None:
    saved(root, 7, 9)
    spoil(Store(root), f"{named(9)}/{file}", how)
    found = saver(root).restore(MODEL, {"policy": made(1)})
    assert found.state == state(7)
    (words,) = found.passed_over
    assert re.search(told, words), words
    assert f"{root}/{named(9)} is damaged" in words


class Flaky:
    """A call that fails `times` times, and then does what it is for."""

    def __init__(self, call: Any, error: Exception, times: int) -> None:
        self.call, self.error, self.left, self.tries = call, error, times, 0

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise self.error
        return self.call(*args, **more)


PASSING = [
    OSError(errno.EIO, "Input/output error"), ConnectionResetError("reset"), TimeoutError(),
    OSError(errno.ESTALE, "Stale file handle"),
]  # fmt: skip


def flaky(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, times: int) -> Flaky:
    call = Flaky(getattr(owner, name), error, times)
    monkeypatch.setattr(owner, name, lambda *args, **more: call(*args, **more))
    monkeypatch.setattr(checkpoint, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    return call


WHERE = [(Store, "measure"), (Store, "read"), (Store, "names"), (checkpoint, "load_tensors")]


@pytest.mark.parametrize(("owner", "name"), WHERE)
@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_storage_that_fails_for_a_while_is_read_again_and_no_checkpoint_is_passed_over(
    root: str, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:
    saved(root, 7, 9)
    its = saver(root)
    its.fence("", 0)
    call = flaky(monkeypatch, owner, name, error, times=2)
    assert its.restore(MODEL, {"policy": made(1)}) == Restored(state(9), [], f"{root}/{named(9)}")
    assert call.tries > 2


@pytest.mark.parametrize(("owner", "name"), WHERE)
def test_storage_that_fails_for_long_ends_the_start_and_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """No BadData, which is for good, and no older step: the next start finds the newest."""
    saved(tmp_path, 7, 9)
    its = saver(tmp_path)
    its.fence("", 0)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        flaky(patch, owner, name, PASSING[0], times=99)
        its.restore(MODEL, {"policy": made(1)})
    assert saver(tmp_path).restore(MODEL, {"policy": made(1)}).state == state(9)


def test_when_all_are_damaged_the_run_stops_and_does_not_start_anew(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    spoil(Store(str(tmp_path)), f"{named(7)}/run.json", "cut")
    with pytest.raises(BadData, match=r"step-7\S+ is damaged .* no whole one is left: set spec\.checkpoint\.path"):
        saver(tmp_path).restore(MODEL, {"policy": made(1)})


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(BadData, match=r"step-1\S+ is of another model \(path '/m' there, '/other' here\): set "
        r"spec\.checkpoint\.path"):
        saver(tmp_path).restore(MODEL | {"path": "/other"}, {"policy": made(1)})


def test_a_checkpoint_without_a_role_of_this_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(BadData, match=r"step-1\S+ does not fit critic"):
        saver(tmp_path).restore(MODEL, {"policy": made(1), "critic": made(2)})


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(BadData, match=r"step-1\S+ does not fit policy \(.*Size mismatch"):
        saver(tmp_path).restore(MODEL, {"policy": made(1, width=16)})


def test_a_full_disk_costs_the_save_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = saved(tmp_path, 1)
    its, write = saver(tmp_path), checkpoint._Summed.write

    def full(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint._Summed, "write", full)
    monkeypatch.setattr(Store, "room", lambda self: (1 << 20, 1 << 40))
    its.begin(state(2), {"policy": held})
    train(held, 1)
    (outcome,) = its.finished(wait=True)
    assert outcome.step == 2 and outcome.error is not None
    no_room = f"spec.checkpoint.path ({tmp_path}) is full (0.0 GiB free of 1024.0)"
    assert f"{no_room}: free space, lower spec.checkpoint.keep" in outcome.error
    assert whole(Store(str(tmp_path))) == [named(1)] and not list(tmp_path.glob(".step-*"))
    monkeypatch.setattr(checkpoint._Summed, "write", write)
    its.begin(state(3), {"policy": held})
    assert [o.error for o in its.finished(wait=True)] == [None]
    assert whole(Store(str(tmp_path))) == [named(1), named(3)]


def test_an_upload_that_breaks_leaves_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    Bucket.empty()
    held = saved("bucket://models/run", 1)
    monkeypatch.setattr(Bucket, "broken", True)
    its = saver("bucket://models/run")
    its.begin(state(2), {"policy": held})
    (outcome,) = its.finished(wait=True)
    assert outcome.error is not None and "connection reset" in outcome.error and "is remote" in outcome.error
    assert whole(Store("bucket://models/run")) == [named(1)]


def test_a_part_of_an_earlier_driver_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """The critic has ranks of its own, and its part of a try that died still lies there."""
    Store(str(tmp_path)).write(
        f".{named(1)}.partial/critic/part.json", json.dumps({"driver": "before", "files": {}}).encode(),
    )
    its = saver(tmp_path, expected=("policy", "critic"))
    its.seconds = 0.5
    its.begin(state(1), {"policy": made(0)})
    (outcome,) = its.finished(wait=True)
    assert outcome.error is not None and "critic/part.json did not come in 0.5 s" in outcome.error


def test_a_part_that_cannot_be_written_ends_the_save_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("policy", "critic")
    ours, theirs = saver(tmp_path, expected=both), saver(tmp_path, expected=both, leads=False)
    monkeypatch.setattr(checkpoint._Summed, "write", lambda self, data: 1 / 0)
    theirs.begin(state(1), {"critic": made(1)})
    assert [o.error is None for o in theirs.finished(wait=True)] == [False]
    monkeypatch.undo()
    ours.begin(state(1), {"policy": made(0)})
    (outcome,) = ours.finished(wait=True)
    assert outcome.error is not None and "ZeroDivisionError" in outcome.error
    assert whole(Store(str(tmp_path))) == []


def test_roles_of_two_rank_groups_make_one_checkpoint(tmp_path: Path) -> None:
    policy, critic = made(0), made(1)
    both = ("policy", "critic")
    ours, theirs = saver(tmp_path, expected=both), saver(tmp_path, expected=both, leads=False)
    ours.begin(state(1), {"policy": policy})
    theirs.begin(state(1), {"critic": critic})
    assert [o.error for o in (*ours.finished(wait=True), *theirs.finished(wait=True))] == [None, None]
    together = {"policy": made(2), "critic": made(3)}  # another placement: both on the same ranks now
    assert saver(tmp_path, expected=both).restore(MODEL, together).state == state(1)
    assert same(weights(critic), weights(together["critic"])) and same(weights(policy), weights(together["policy"]))


@pytest.mark.parametrize(
    ("path", "told"), [("nosuch://bucket/run", "Protocol not known: nosuch"), ("oss://bucket/run", "ossfs")]
)
def test_a_filesystem_without_a_driver_is_a_wrong_spec(path: str, told: str) -> None:
    with pytest.raises(BadSpec, match=rf"spec\.checkpoint\.path: {path}: .*{told}.*put fsspec's driver for it into "
        r"spec\.image"):
        Store(path)


def test_a_directory_is_published_whole_or_not_at_all(root: str) -> None:
    store = Store(root)
    for text in (b"one", b"two"):
        with store.publishing("export", "config.json", "a", lambda: None) as folder:
            (folder / "config.json").write_bytes(text)
            (folder / "model.safetensors").write_bytes(text)
    with pytest.raises(OSError, match="full"), store.publishing("export", "config.json", "a", lambda: None) as folder:
        (folder / "config.json").write_bytes(b"three")
        raise OSError("full")
    assert {
        name: store.read(f"export/{name}") for name in store.names("export")
    } == {"config.json": b"two", "model.safetensors": b"two"}


def rank_of_two(rank: int, world: int, tmp_path: Path, act: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Its weights, and what it draws."""
    held = made(0)
    its = saver(tmp_path / "run")
    if act == "save":
        train(held, 2)
        torch.manual_seed(100 + rank)
        its.begin(state(2), {"policy": held})
    else:
        assert its.restore(MODEL, {"policy": held}).state == state(2)
    drawn = torch.rand(3)
    assert all(o.error is None for o in its.finished(wait=True))
    dist.barrier()
    its.close()
    return weights(held), drawn


def test_two_ranks_save_and_one_or_two_load(tmp_path: Path) -> None:
    """Every rank's own stream of random numbers comes back when their number is the same."""
    (before, drawn0), (_, drawn1) = over_ranks(2, rank_of_two, tmp_path, "save")
    (after, again0), (_, again1) = over_ranks(2, rank_of_two, tmp_path, "load")
    assert same(before, after) and torch.equal(
        drawn0, again0,
    ) and torch.equal(drawn1, again1) and not torch.equal(drawn0, drawn1)
    alone = made(5)
    assert saver(tmp_path / "run").restore(MODEL, {"policy": alone}).state == state(2)
    assert same(weights(alone), before)


def _life(rank: int, world: int, model: str, root: str, last: int, node: int) -> list[torch.Tensor]:
    """Policy and critic of the real trainer, from the newest checkpoint to step `last`; every step is saved while the
    next one changes what is saved. node: its ranks hold a copy; 0: all do.
    """
    given = {
        "steps": 4, "learningRate": 0.01, "gradientCheckpointing": False, "epochs": 2, "updatesPerStep": 2,
        "warmupSteps": 3, "learningRateSchedule": "cosine", "learningRateFloor": 0.1, "weightDecay": 0.1,
        "adamBeta2": 0.99, "gpus": world, "sharding": "Hybrid" if node else "Full",
    }  # fmt: skip
    config = run_config(
        model={"path": model, "dtype": "float32"}, algorithm={"name": "ppo", "entropyCoefficient": 0.01},
        checkpoint={"path": root, "keep": 9}, trainer=given, placement={"gpusPerNode": node or 8},
    )  # fmt: skip
    trainer = Trainer(config, list(config.roles), rank, world, "cpu", 1)
    trainer.load()
    found = trainer.restore().state
    for step in range(found.step if found else 0, last):
        items = sequences([(3, 5), (2, 9), (4, 4), (3, 7)], step, 70)
        items = [item.with_columns(values=0.0, returns=item.columns["advantages"]) for item in items]
        parts = mini_batches(4, 2, 2, f"0/{step}")
        updates = [dealt([items[i] for i in part], world, config.trainer)[rank] for part in parts]
        for role in ("critic", "policy"):
            trainer.train(role, updates)
        trainer.save(step + 1, {}, {})
    assert all(outcome.error is None for outcome in trainer.saved(wait=True))
    modules = [trainer.roles[role].module for role in ("policy", "critic")]
    for module in modules:
        module.reshard()
    return [p.detach().full_tensor().clone() for module in modules for p in module.parameters()]


def test_the_real_trainer_goes_on_where_it_was(tmp_path: Path) -> None:
    """2N steps == N + resume + N, bit for bit, with epochs of mini-batches and a schedule; with another number of
    ranks, or of copies, within float tolerance.
    """
    write(tmp_path / "model")

    def life(root: str, last: int, world: int = 1, node: int = 0) -> list[torch.Tensor]:
        arguments = str(tmp_path / "model"), str(tmp_path / root), last, node
        made: list[torch.Tensor] = over_ranks(world, _life, *arguments)[0]
        return made

    def size(root: str, step: int) -> int:
        return sum(file.stat().st_size for file in checkpoints.checkpoint(tmp_path / root, step).rglob("*.distcp"))

    through, half = life("through", 4), life("resumed", 2)
    assert not same(through, half)
    for root in ("resharded", "copied"):
        shutil.copytree(tmp_path / "resumed", tmp_path / root)
    assert same(life("resumed", 4), through)
    life("copied", 3, world=4, node=2)
    assert size("copied", 3) < 1.2 * size("through", 3), "a copy alone is saved"
    copied = life("copied", 4, world=2, node=1)
    assert same(copied, life("copied", 4)), "and read by one rank"
    for made in (life("resharded", 4, world=2), copied):
        for a, b in zip(made, through, strict=True):
            torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


def _changed_life(
    rank: int, world: int, model: str, root: str, changes: dict[str, Any],
) -> tuple[int, dict[str, float], list[dict[str, Any]]]:
    """A step of the real trainer from the newest checkpoint, with another spec; its version before, its metrics, and
    its optimizers' settings.
    """
    trainer = {"steps": 9, "gpus": world, "learningRate": 0.01, "gradientCheckpointing": False} | changes
    config = run_config(
        model={"path": model, "dtype": "float32"}, algorithm={"name": "ppo"}, checkpoint={"path": root},
        trainer=trainer,
    )
    made = Trainer(config, list(config.roles), rank, world, "cpu", 1)
    made.load()
    made.restore()
    version, metrics = made.version, {}
    items = sequences([(3, 5), (2, 9), (4, 4), (3, 7)], 1, 70)
    items = [item.with_columns(values=0.0, returns=item.columns["advantages"]) for item in items]
    for role in ("critic", "policy"):
        parts = [items[i :: config.trainer.updates_per_step] for i in range(config.trainer.updates_per_step)]
        metrics = made.train(role, [dealt(part, world, config.trainer)[rank] for part in parts])
    made.save(1, {}, {})
    assert all(outcome.error is None for outcome in made.saved(wait=True))
    optimizers = [made.roles[role].optimizer for role in ("policy", "critic")]
    return version, metrics, [
        {key: value for key, value in group.items() if key != "params"} for one in optimizers if one
        for group in one.param_groups
    ]


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"learningRate": 0.002, "weightDecay": 0.1}),
        (1, {"updatesPerStep": 2, "warmupSteps": 10, "learningRateSchedule": "linear"}),
         (1, {"batching": "padded", "offload": True}),
        (2, {"contextParallel": 2}), (2, {"updatesPerStep": 2, "weightDecay": 0.1}),
    ],
)  # fmt: skip
def test_a_resumed_run_takes_its_numbers_from_the_spec_and_its_moments_from_the_checkpoint(
    tmp_path: Path, world: int, changes: dict[str, Any],
) -> None:
    write(tmp_path / "model")
    ((version, _, _),) = over_ranks(1, _changed_life, str(tmp_path / "model"), str(tmp_path / "run"), {})
    assert version == 0
    for version, metrics, groups in over_ranks(
        world, _changed_life, str(tmp_path / "model"), str(tmp_path / "run"), changes,
    ):
        updates, base = changes.get("updatesPerStep", 1), changes.get("learningRate", 0.01)
        spec = TrainerSpec.model_validate({"steps": 9} | changes)
        rates = [learning_rate(spec, base, updates + update, 9 * updates) for update in range(updates)]
        assert version == 1
        assert metrics["learning_rate"] == pytest.approx(sum(rates) / len(rates))
        assert {group["weight_decay"] for group in groups} == {changes.get("weightDecay", 0.0), 0.0}


def _dies_while_it_saves(rank: int, world: int, tmp_path: Path) -> tuple[str | None, float]:
    """The second rank's process ends in the middle of the second save."""
    held, its = made(0), saver(tmp_path / "run")
    its.begin(state(1), {"policy": held})
    assert all(outcome.error is None for outcome in its.finished(wait=True))
    if rank == 1:
        SummingFiles.create_stream = lambda *_: os._exit(1)  # type: ignore[method-assign]
    start = time.monotonic()
    its.begin(state(2), {"policy": held})
    (outcome,) = its.finished(wait=True)
    return outcome.error, time.monotonic() - start


def test_a_rank_that_dies_costs_the_save_at_once_and_no_older_one(tmp_path: Path) -> None:
    """Rank 0 finds out by itself; nothing waits for a collective's deadline."""
    answers = over_ranks(2, _dies_while_it_saves, tmp_path, lost=[1])
    error, seconds = answers[0]
    assert error is not None and seconds < 30
    assert whole(Store(str(tmp_path / "run"))) == [named(1)] and not list((tmp_path / "run").glob(".step-*"))
    assert saver(tmp_path / "run").restore(MODEL, {"policy": made(3)}).state == state(1)


def test_both_groups_restore_what_the_policys_first_rank_chose(tmp_path: Path) -> None:
    """Also when an earlier driver publishes between their looks."""
    both = ("policy", "critic")

    def savers(driver: str, attempt: int) -> tuple[Saver, Saver]:
        pair = saver(tmp_path, 9, both, driver), saver(tmp_path, 9, both, driver, leads=False)
        for one in pair:
            one.fence("job", attempt)
        return pair

    def save(step: int, pair: tuple[Saver, Saver]) -> None:
        for one, role in zip(pair, both, strict=True):
            one.begin(state(step), {role: made(step)})
        assert [o.error for one in pair for o in one.finished(wait=True)] == [None, None]

    first, second = savers("x", 1), savers("y", 2)
    Store(str(tmp_path)).remove("fence")
    for one in first:
        one.fence("job", 1)
    save(1, first)
    second[0].fence("job", 2)
    assert second[0].restore(MODEL, {"policy": made(5)}).state == state(1)
    shutil.copytree(tmp_path / named(1, "x", "job", 1), tmp_path / named(2, "x", "job", 1))
    critic = made(6)
    assert second[1].restore(MODEL, {"critic": critic}).state == state(1)
    assert same(weights(critic), weights(made(1)))
    save(2, second)
    assert saver(tmp_path, expected=both, driver="z").restore(
        MODEL, {"policy": made(5), "critic": made(6)},
    ).state == state(2)


def test_a_fenced_driver_publishes_nothing_and_says_so_ever_after(root: str) -> None:
    held = made(0)
    early, late = saver(root, driver="x"), saver(root, driver="y")
    early.fence("job", 1)
    early.begin(state(1), {"policy": held})
    assert [o.error for o in early.finished(wait=True)] == [None]
    early.begin(state(2), {"policy": held})
    early._wait()
    late.fence("job", 2)
    before = late.restore(MODEL, {"policy": made(1)}).state
    early.begin(state(3), {"policy": held})
    for _ in range(2):
        with pytest.raises(Fenced, match="attempt 2 of this job"):
            early.finished(wait=True)
    with pytest.raises(Fenced), early.publishing("export", "config.json"):
        pass
    store = Store(root)
    assert before == state(2) and whole(store) == [named(1, "x", "job", 1), named(2, "x", "job", 1)]
    assert {name.split(".")[0] for name in store.names()} == {"fence", "latest", "step-1", "step-2"}


def test_an_export_is_published_only_by_who_holds_the_path_at_its_end(root: str) -> None:
    early, late = saver(root, driver="x"), saver(root, driver="y")
    early.fence("job", 1)
    with pytest.raises(Fenced), early.publishing("export", "config.json") as folder:
        (folder / "config.json").write_bytes(b"early")
        late.fence("job", 2)
    with late.publishing("export", "config.json") as folder:
        (folder / "config.json").write_bytes(b"late")
    store = Store(root)
    assert store.read("export/config.json") == b"late" and set(store.names()) == {"export", "fence"}


def export(one: Saver, text: bytes) -> None:
    with one.publishing("export", "config.json") as folder:
        for name in ("config.json", "weights"):
            (folder / name).write_bytes(text)


def found(root: str) -> set[bytes]:
    """What loads an export finds: nothing where config.json is not there."""
    store, names = Store(root), set(Store(root).names("export"))
    return {
        store.read(f"export/{name}") if name in names else b"missing" for name in ("config.json", "weights")
    } if "config.json" in names else set()


def test_no_one_finds_half_an_export_while_another_takes_its_place(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = saver(root), list[set[bytes]]()
    export(one, b"old")
    files: list[tuple[Any, str]] = [
        (Store, "remove"), (Path, "rename"), (type(Store(root).fs), "put_file"), (type(Store(root).fs), "rm_file"),
        (shutil, "rmtree")
    ]
    for owner, name in files:
        monkeypatch.setattr(owner, name, looking(getattr(owner, name, None), lambda: seen.append(found(root))))
    export(one, b"new")
    monkeypatch.undo()
    assert len(seen) > 4 and [now for now in seen if now not in ({b"old"}, set(), {b"new"})] == []
    assert found(root) == {b"new"} and not [name for name in Store(root).names() if name.startswith(".")]


def looking(call: Any, look: Callable[[], None]) -> Any:
    def looked(*given: Any, **more: Any) -> Any:
        look()
        made = call(*given, **more)
        look()
        return made

    return looked


def test_an_export_that_comes_late_gives_the_later_drivers_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Overtaken between its last look and its call, for as long as the other needs to finish the run."""
    root = str(tmp_path / "run")
    early, late = saver(root, driver="x"), saver(root, driver="y")
    early.fence("job", 1)
    replace = Store._replace

    def delayed(*given: Any) -> None:
        monkeypatch.setattr(Store, "_replace", replace)
        late.fence("job", 2)
        export(late, b"late")
        replace(*given)

    monkeypatch.setattr(Store, "_replace", delayed)
    with pytest.raises(Fenced):
        export(early, b"early")
    assert found(root) == {b"late"} and set(Store(root).names()) == {"export", "fence"}


def test_a_driver_that_ended_before_latest_has_it_put_right_by_the_next(root: str) -> None:
    """The last step's checkpoint is there: the next driver has nothing left to save."""
    saved(root, 1, 2)
    store = Store(root)
    store.write("latest", named(1).encode())
    assert saver(root).restore(MODEL, {"policy": made(0)}).path == store.url(named(2))
    assert store.read("latest") == named(2).encode()


def test_a_checkpoint_that_is_half_removed_is_none(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(root, 1, 2)
    remove, seen = Store.remove, list[list[str]]()

    def watched(store: Store, name: str) -> None:
        remove(store, name)
        if name.startswith(named(1)):
            seen.append(whole(store))

    monkeypatch.setattr(Store, "remove", watched)
    saved(root, 3)
    assert seen and named(1) not in seen[0]
