"""Whole runs of several sources: 2N steps are N, a resume and N, bit for bit; each has its share and rewards."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.progress import Speed
from rlhf_api.run import RunConfig
from rlhf_worker.feed import replay
from rlhf_worker.local import local_ray
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.run import drive
from rlhf_worker.stop import Stop
from rlhf_worker.weights.sync import Synced
from tests.worker.configs import run_config
from tests.worker.samples import drawn

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
LETTER = {
    "name": "letter", "type": "python",
    "code": "def reward(completion, **row): return completion.count('e') + row['bonus']",
}  # fmt: skip
BROKEN = {
    "name": "broken", "type": "python",
    "code": "def reward(prompt, **row):\n    assert prompt.startswith('b'), prompt\n    return 1.0",
}  # fmt: skip


class Recorder(ConsoleReporter):
    """Keeps the metrics of each step."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.steps: dict[int, dict[str, float]] = {}

    def stepped(
        self, step: int, values: Mapping[str, float], speed: Speed, *, eta_seconds: int, synced: Synced | None,
    ) -> None:
        super().stepped(step, values, speed, eta_seconds=eta_seconds, synced=synced)
        self.steps[step] = dict(values)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(run_config(rollout={"engine": "hf"}), verbose=False):
        yield


def run(tiny: Path, directory: Path, sources: list[dict[str, Any]], steps: int) -> Recorder:
    config = run_config(
        model={"path": str(tiny), "dtype": "float32"},
        data={"sources": sources, "maxPromptTokens": 8, "overlongPrompts": "drop"}, rewards=[LETTER, BROKEN],
        rollout={"engine": "hf", "promptsPerStep": 3, "samplesPerPrompt": 4, "maxTokens": 8, "seed": 0},
        trainer={"steps": steps, "learningRate": 5e-3, "gradientCheckpointing": False},
        checkpoint={"path": str(directory), "everySteps": 2}, telemetry={"tensorboard": False, "rolloutsEverySteps": 1},
    )  # fmt: skip
    reporter = Recorder(config)
    assert drive(config, reporter, Stop()).steps == steps
    return reporter


def test_two_n_steps_are_n_a_resume_and_n(tiny: Path, tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = []
    for name, weight in {"a": 2.0, "b": 1.0}.items():
        rows = [{"prompt": f"{name} {i}" + " too long" * (i % 3 == 1), "bonus": i} for i in range(4)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        sources.append({"name": name, "weight": weight, "jsonl": {"path": str(path)}})
    sources[0]["rewards"] = ["letter"]

    whole = run(tiny, tmp_path / "whole", sources, 4)
    run(tiny, tmp_path / "parts", sources, 2)
    second = run(tiny, tmp_path / "parts", sources, 4)
    assert list(second.steps) == [3, 4]
    for step in range(1, 5):
        each = [replay.read(tmp_path / directory, step) for directory in ("whole", "parts")]
        told, again = ([(drawn(item.sample), item.reward, item.parts) for item in items] for items in each)
        assert told == again
        assert [item.sample.prompt.source for item in each[0]].count("a") == 8
    exported = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert exported[0] == exported[1]
    last = whole.steps[4]
    assert second.steps[4]["data/dropped_prompts"] == last["data/dropped_prompts"] > 0
    assert second.progress.dropped_prompts == last["data/dropped_prompts"]
    assert (last["source/a/sample_share"], last["source/b/broken"]) == (2 / 3, 1.0)
    assert "source/a/broken" not in last and last["reward/broken"] == 1.0
