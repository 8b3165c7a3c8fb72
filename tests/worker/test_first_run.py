"""`make try`: what it runs, and that it reads the lines that a run prints."""

from pathlib import Path

import pytest

from hack import first_run
from rlhf_api.progress import Progress
from rlhf_worker import progress
from rlhf_worker.__main__ import main
from rlhf_worker.progress import step_fields
from tests.worker.test_progress import STEP


def test_the_rewards_are_those_of_a_run_s_own_lines() -> None:
    told = [
        progress.line(Progress(**step_fields(number, 30, STEP | {"reward/mean": reward}, 0)), STEP) + "\n"
        for number, reward in ((1, 0.02), (2, 0.5), (3, -0.25))
    ]
    noise = ["Starting: preflight\n", "saved step 2 to here\n"]
    assert first_run.followed([noise[0], *told, noise[1]]) == {1: 0.02, 2: 0.5, 3: -0.25}


def test_its_command_is_one_that_the_worker_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the model, which is not there."""
    asked: list[tuple[Path, dict[str, str]]] = []
    monkeypatch.setattr("rlhf_worker.local.local", lambda manifest, volumes, *rest: asked.append((manifest, volumes)))
    monkeypatch.setattr("sys.argv", ["rlhf_worker", *first_run.command()[3:]])
    assert main() == 0
    assert asked == [(first_run.SAMPLE, {"/var/lib/rlhf": str(first_run.HOME.absolute())})]
    assert first_run.SAMPLE.exists() and str(first_run.HOME).startswith("runs/"), "which git does not see"
