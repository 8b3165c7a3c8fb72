"""The samples of a step: kept whole, read back as they were, printed, and scored anew."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from rlhf_api.job import RewardSpec
from rlhf_worker.__main__ import main
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import ScoredSample
from rlhf_worker.feed import replay
from rlhf_worker.feed.telemetry import Telemetry
from rlhf_worker.storage import Store
from tests.api.specs import a_job
from tests.worker.configs import run_config
from tests.worker.samples import a_sample

LENGTH = {"name": "length", "type": "python", "code": "def reward(completion, bonus, **row): return len(completion) + "
    "bonus"}


def step(count: int = 4) -> list[ScoredSample]:
    """Sample i: i + 1 characters and a bonus of 10 in its row; `length` is right for all but the last, which has 0."""
    samples = [a_sample(i, text="x" * (i + 1), tokens=i + 1, bonus=10) for i in range(count)]
    values = [float(len(s.text) + 10) for s in samples[:-1]] + [0.0]
    return [
        ScoredSample(sample=s, reward=2 * v, parts={"length": v, "other": 1.0})
        for s, v in zip(samples, values, strict=True)
    ]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    scored = step()
    odd = replace(
        scored[0].sample, mask=np.array([False]), versions=np.array([7], np.int32), episode_reward=0.5,
        finish_reason="length",
        prompt=replace(scored[0].sample.prompt, uid="3:9"),
    )
    scored[0] = replace(scored[0], sample=odd)
    replay.write(Store(str(tmp_path)), 5, scored, [np.full(1, 0.25), *[0.25] * 3])
    found = replay.read(tmp_path)
    for f, s in zip(found, scored, strict=True):
        assert replace(f, sample=s.sample) == s
        for name in ("token_ids", "logprobs", "mask", "versions"):
            read, written = getattr(f.sample, name), getattr(s.sample, name)
            assert read.dtype == written.dtype and read.tolist() == written.tolist()
        assert (f.sample.text, f.sample.finish_reason, f.sample.episode_reward) == (
            s.sample.text, s.sample.finish_reason, s.sample.episode_reward
        )  # fmt: skip
    assert [f.sample.prompt.fields for f in found] == [{"bonus": 10}] * 4
    assert (found[0].sample.prompt.epoch, found[0].sample.prompt.row) == (3, 9)
    table = pq.read_table(tmp_path / "rollouts" / "step-5.parquet")
    assert table.column("advantages").to_pylist() == [[0.0], *([0.25] * count for count in (2, 3, 4))]
    assert set(table.column("step").to_pylist()) == {5}


def test_a_sample_keeps_its_source_and_rewards_and_files_of_before_are_read(tmp_path: Path) -> None:
    scored = step()
    first, second = (item.sample.prompt for item in scored[:2])
    prompts = [replace(first, uid="math:3:9", source="math", rewards=("length",)), second]
    scored[:2] = [replace(s, sample=replace(s.sample, prompt=p)) for s, p in zip(scored[:2], prompts, strict=True)]
    replay.write(Store(str(tmp_path)), 5, scored)
    first, second, *_ = (item.sample.prompt for item in replay.read(tmp_path))
    assert (first.source, first.rewards, first.epoch, first.row) == ("math", ("length",), 3, 9)
    assert (second.source, second.rewards) == ("", None)
    file = tmp_path / "rollouts" / "step-5.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["source", "rewards"]), file)
    assert [item.sample.prompt.rewards for item in replay.read(tmp_path)] == [None] * 4


def test_only_the_steps_asked_for_are_kept_and_a_step_run_again_replaces_its_file(tmp_path: Path) -> None:
    config = run_config(checkpoint={"path": str(tmp_path)}, telemetry={"rolloutsEverySteps": 3, "tensorboard": False})
    telemetry = Telemetry(config, 1)
    for number in range(8):
        if config.telemetry.keeps_rollouts(number) and number:
            telemetry.record(number, step(), None)
    telemetry.record(6, step(2), None)
    assert not run_config(telemetry={"rolloutsEverySteps": 0}).telemetry.keeps_rollouts(10)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step-3.parquet", "step-6.parquet"]
    assert len(replay.read(tmp_path)) == 2
    assert len(replay.read(tmp_path / "rollouts", 3)) == 4
    assert pq.read_table(tmp_path / "rollouts" / "step-6.parquet").column("advantages").to_pylist() == [None, None]


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rollouts").write_text("in the way")
    telemetry = Telemetry(
        run_config(checkpoint={"path": str(tmp_path)}, telemetry={"rolloutsEverySteps": 1, "tensorboard": False}), 1,
    )
    for number in (1, 2):
        telemetry.record(number, step(), None)
    assert telemetry.failures.counts["rolloutsEverySteps"] == 2
    assert capfd.readouterr().err.count("warning: spec.telemetry.rolloutsEverySteps: ") == 1


@pytest.mark.parametrize(
    ("path", "number", "message"),
    [
        ("none", None, r"none: no step-N\.parquet: give a checkpoint\.path"),
        (".", 4, r"no samples of step 4, only of 3, 5"),
        ("rollouts/broken.parquet", None, r"broken\.parquet: no samples of a step"),
        ("other.parquet", None, r"other\.parquet: no samples of a step"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, path: str, number: int | None, message: str) -> None:
    import pyarrow as pa

    for there in (3, 5):
        replay.write(Store(str(tmp_path)), there, step())
    (tmp_path / "rollouts" / "broken.parquet").write_text("no parquet")
    pq.write_table(pa.table({"uid": ["0:1"]}), tmp_path / "other.parquet")
    with pytest.raises(BadData, match=message):
        replay.read(tmp_path / path, number)


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = main(["replay", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_command_prints_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay.write(Store(str(tmp_path)), 1, step())
    code, out = command(capsys, tmp_path, "--sort", "reward", "--limit", 2)
    assert code == 0
    assert out.splitlines() == [
        "4 samples, reward 18.000 (0.000 to 26.000)",
        "--- sample 2, prompt 0:2: reward 26.000 (length 13.000, other 1.000), 3 tokens, stop",
        "prompt 2",
        ">>> xxx",
        "--- sample 1, prompt 0:1: reward 24.000 (length 12.000, other 1.000), 2 tokens, stop",
        "prompt 1",
        ">>> xx",
    ]
    assert "--- sample 0" in command(capsys, tmp_path, "--limit", 1)[1]


def test_the_command_scores_anew_and_tells_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay.write(Store(str(tmp_path)), 1, step())
    job = tmp_path / "job.yaml"
    rewards = [LENGTH, {**LENGTH, "name": "new"}, {"name": "big", "type": "model", "model": {"path": "some/model"}}]
    job.write_text(yaml.safe_dump(a_job(rewards=rewards)))
    code, out = command(capsys, tmp_path / "rollouts" / "step-1.parquet", "--job", job)
    assert code == 0
    assert out.splitlines() == [
        "length: stored 9.000, now 12.500; 1 of 4 samples differ",
        "  sample 3: 0.000 -> 14.000",
        "new: not stored; now 12.500",
        "big: of type model, not scored here",
    ]


def test_a_wrong_job_or_step_ends_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay.write(Store(str(tmp_path)), 1, step())
    (tmp_path / "job.yaml").write_text("kind: Pod")
    assert main(["replay", str(tmp_path), "--job", str(tmp_path / "job.yaml")]) == 64
    assert "holds 0 RLHFJobs" in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--step", "9"]) == 65
    with pytest.raises(BadSpec, match="all are of type model"):
        list(
            replay.compare(
                step(), [RewardSpec.model_validate({"name": "m", "type": "model", "model": {"path": "m/m"}})], 1,
            )
        )
