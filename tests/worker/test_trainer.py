"""One trainer rank on gloo, without Ray: gradients whatever the packing, the reference, and a loss that is not finite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hack.tiny_model import write
from rlhf_worker.errors import Diverged
from rlhf_worker.experience import PackedBatch, TrainSequence, add_column, empty_batch, pack
from rlhf_worker.trainer import Trainer, learning_rate
from tests.worker.configs import run_config
from tests.worker.samples import evenly


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainer(tiny: Path, root: Path, coefficient: float = 0.0) -> Trainer:
    config = run_config(
        model={"path": str(tiny), "dtype": "float32"}, trainer={"steps": 1, "learningRate": 0.01, "gradientCheckpointing": False},
        algorithm={"kl": {"coefficient": coefficient}}, checkpoint={"path": str(root)},
    )
    made = Trainer(config, 0, "cpu", 1)
    made.load()
    return made


def sequences(advantage: float = 1.0) -> list[TrainSequence]:
    torch.manual_seed(7)
    lengths = (6, 9, 9, 12)
    return [
        TrainSequence(
            token_ids=torch.randint(3, 70, (n,)).tolist(), prompt_length=3, index=index, mask=[True] * (n - 3),
            columns={
                "rollout_logprobs": [-4.0] * (n - 3), "advantages": [advantage * (-1) ** n] * (n - 3), **evenly(4, n - 3, sum(lengths) - 12),
            },
        )
        for index, n in enumerate(lengths)
    ]  # fmt: skip


def with_logprobs(made: Trainer, items: list[TrainSequence], column: str, role: str) -> list[TrainSequence]:
    return add_column(items, column, [made.logprobs(role, pack(items, 1000))])


def after(made: Trainer, updates: list[list[PackedBatch]]) -> tuple[dict[str, float], list[torch.Tensor]]:
    metrics = made.train(updates)
    return metrics, [p.full_tensor().clone() for p in made.module.parameters()]  # type: ignore[attr-defined]


def test_packing_and_empty_batches_change_nothing(tiny: Path, tmp_path: Path) -> None:
    one, whole = after(trainer(tiny, tmp_path), [pack(sequences(), 1000)])
    two, parts = after(trainer(tiny, tmp_path), [[*pack(sequences(), 12), empty_batch(sequences()[0].columns)]])
    assert one["ratio"] == pytest.approx(1.0) and one["clip_fraction"] == 0.0
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_later_updates_are_measured_against_the_policy_that_sampled(tiny: Path, tmp_path: Path) -> None:
    made = trainer(tiny, tmp_path)
    items = with_logprobs(made, sequences(), "old_logprobs", "policy")
    first, second = (pack(part, 1000) for part in (items[:2], items[2:]))
    assert made.train([first])["ratio"] == pytest.approx(sum(first[0].columns["token_weights"].tolist()), abs=1e-6)
    assert made.train([second])["ratio"] != pytest.approx(sum(second[0].columns["token_weights"].tolist()), abs=1e-4)


def test_the_reference_is_the_model_before_training(tiny: Path, tmp_path: Path) -> None:
    made = trainer(tiny, tmp_path, coefficient=0.1)
    batches = pack(with_logprobs(made, sequences(), "ref_logprobs", "reference"), 1000)
    assert made.train([batches])["kl"] == pytest.approx(0.0, abs=1e-7)
    assert made.train([batches])["kl"] > 1e-4


def test_log_probabilities_are_told_apart_by_sample(tiny: Path, tmp_path: Path) -> None:
    made = trainer(tiny, tmp_path)
    together = made.logprobs("policy", pack(sequences(), 1000))
    assert together.keys() == {0, 1, 2, 3}
    for item in sequences():
        assert together[item.index] == pytest.approx(made.logprobs("policy", pack([item], 1000))[item.index], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_batch_on_disk(tiny: Path, tmp_path: Path) -> None:
    made = trainer(tiny, tmp_path)
    before = [p.full_tensor().clone() for p in made.module.parameters()]  # type: ignore[attr-defined]
    with pytest.raises(Diverged, match=r"the batch is in .*diverged/version-1-rank-0\.pt"):
        made.train([pack(sequences(float("nan")), 1000)])
    assert (tmp_path / "diverged" / "version-1-rank-0.pt").is_file()
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(before, made.module.parameters(), strict=True))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("update", "rate"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_warm_up_is_linear(update: int, rate: float) -> None:
    assert learning_rate(1.0, 4, update) == rate
    assert learning_rate(1.0, 0, update) == 1.0
