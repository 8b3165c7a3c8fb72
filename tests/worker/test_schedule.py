"""The learning rate of every update, with torch's schedulers as the oracle."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from rlhf_api.job import TrainerSpec
from rlhf_worker.algorithm.schedule import learning_rate

BASE, TOTAL = 0.5, 20


def rates(schedule: str, warmup: int, floor: float, total: int = TOTAL) -> list[float]:
    spec = TrainerSpec.model_validate(
        {"steps": 1, "learningRateSchedule": schedule, "learningRateFloor": floor, "warmupSteps": warmup}
    )
    return [learning_rate(spec, BASE, update, total) for update in range(TOTAL)]


def by_torch(schedule: str, warmup: int, floor: float) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    length = TOTAL - warmup
    falls: dict[str, LRScheduler] = {
        "constant": ConstantLR(optimizer, 1.0, length), "linear": LinearLR(optimizer, 1.0, floor, length),
        "cosine": CosineAnnealingLR(optimizer, length, eta_min=BASE * floor),
    }  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = BASE  # each scheduler above has set its own first rate
    rises = LinearLR(optimizer, 1 / max(1, warmup), 1.0, max(1, warmup - 1))
    scheduler = SequentialLR(optimizer, [rises, falls[schedule]], [warmup]) if warmup else falls[schedule]
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_torchs(schedule: str, floor: float, warmup: int) -> None:
    assert rates(schedule, warmup, floor) == pytest.approx(by_torch(schedule, warmup, floor))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_as_long_as_the_run_and_updates_beyond_it_stay_in_bounds(schedule: str) -> None:
    assert rates(schedule, 40, 0.0) == pytest.approx([BASE * (update + 1) / 40 for update in range(TOTAL)])
    beyond = rates(schedule, 0, 0.1, total=5)[5:]
    assert beyond == pytest.approx([BASE if schedule == "constant" else BASE * 0.1] * 15)
