"""`make try`: what it runs, and that it reads the lines that a run prints."""

from pathlib import Path

import pytest

from hack import first_run, samples
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
    sample = samples.found(first_run.JOB)
    monkeypatch.setattr("sys.argv", ["rlhf_worker", *first_run.command(sample)[3:]])
    assert main() == 0
    assert asked == [(sample, {"/var/lib/rlhf": str(first_run.HOME.absolute())})]
    assert str(first_run.HOME).startswith("runs/"), "which git does not see"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tiny-pppo", r"no such sample \(did you mean tiny-ppo\?\): one of smollm2-colocated"),
        ("nothing", "no such sample: one of"),
        ("qwen3-8b-8gpu", "needs GPUs: kubectl rlhf run -f manifests/samples/qwen3-8b-8gpu.yaml"),
        ("../default", "no such sample"),
    ],
)
def test_a_sample_that_is_not_there_is_told(name: str, told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        samples.found(name)


def test_it_says_how_to_go_on_and_names_every_other_sample() -> None:
    words = first_run.last_words("tiny-colocated")
    assert "report runs/try/checkpoints/tiny-colocated " in words and "make try JOB=tiny-tools " in words
    assert len({line.index("#") for line in words.splitlines() if "#" in line}) == 1, "in one column"
    assert all(name in words for name in samples.names())
