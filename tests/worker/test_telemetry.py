"""TensorBoard and phase times."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_worker.telemetry import PhaseTimer, Telemetry


def logged(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_scalars_are_on_disk_after_each_step(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path / "tensorboard")
    for step in range(3):
        telemetry.log(step, {"reward": step / 4, "seconds/rollout": 1.0})
        assert logged(tmp_path / "tensorboard", "reward")[-1] == (step, step / 4)
    telemetry.close()


def test_a_resumed_run_replaces_the_steps_it_runs_again(tmp_path: Path) -> None:
    first = Telemetry(tmp_path)
    for step in range(4):
        first.log(step, {"reward": 0.0})
    first.close()
    resumed = Telemetry(tmp_path, first_step=2)
    resumed.log(2, {"reward": 1.0})
    resumed.close()
    assert logged(tmp_path, "reward") == [(0, 0.0), (1, 0.0), (2, 1.0)]


def test_values_that_are_no_numbers_are_kept_for_the_eye(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path)
    telemetry.log(0, {"loss": math.nan})
    telemetry.close()
    assert math.isnan(logged(tmp_path, "loss")[0][1])


def test_phases_add_up_also_when_they_raise() -> None:
    timer = PhaseTimer()
    with timer.phase("rollout"), timer.phase("wake"):
        pass
    once = timer.seconds["rollout"]
    with pytest.raises(RuntimeError), timer.phase("rollout"):
        raise RuntimeError
    assert timer.seconds.keys() == {"rollout", "wake"}
    assert timer.seconds["rollout"] > once >= timer.seconds["wake"] >= 0
