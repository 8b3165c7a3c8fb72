"""A whole start of a run in which much is wrong: `rlhf_worker local` tells all of it, once, and ends by the hardest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.tiny_model import write
from rlhf_worker import preflight, run
from rlhf_worker.local import local
from tests.worker.broken import cut, edit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


ENVIRONMENT = {"code": "import no_such_package\nclass Environment: ...", "workers": 1}
SLOW = ("torch", "transformers", "vllm", "datasets")  # which a driver that has nothing to train needs not import
DRIVER = f"""
import sys
from rlhf_worker import preflight
from rlhf_worker.__main__ import main
preflight.WRONG_SECONDS = preflight.DEADLINE_SECONDS = 400.0  # no machine is too busy to tell all
code = main(["local", sys.argv[1]])
print("imported:", sorted(set({SLOW}) & set(sys.modules)))
sys.exit(code)
"""


def job(tmp_path: Path, **changes: dict[str, Any]) -> Path:
    """The manifest of a run that would be well but for its data and for `changes`."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    write(model)
    data.write_text('{"prompt": "1 + 1 ="}\n{"prompt": 7}\n')
    spec: dict[str, Any] = {
        "image": "rlhf-worker:dev",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"jsonl": {"path": str(data)}, "maxPromptTokens": 16, "chatTemplate": False},
        "rewards": [{"name": "r", "type": "python", "code": "def reward(**row): return 1.0", "workers": 1}],
        "rollout": {"maxTokens": 8},
        "trainer": {"steps": 1},
        "checkpoint": {"path": str(tmp_path / "run")},
    }
    spec |= {name: {**spec.get(name, {}), **value} for name, value in changes.items()}
    whole = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": "wrong"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(whole))))
    return tmp_path / "job.yaml"


@pytest.mark.vllm
def test_the_driver_tells_all_before_a_model_is_loaded_and_imports_nothing_slow_for_it(tmp_path: Path) -> None:
    """By its own command, with engines of vLLM. None of the faults hides another, and none is found by loading."""
    path = job(
        tmp_path,
        rollout={"environment": ENVIRONMENT, "engineArgs": {"max_model_len": 4, "enforce_eagre": True}},
    )
    done = subprocess.run([sys.executable, "-c", DRIVER, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 64, done.stderr[-3000:]
    told = done.stderr.rpartition(" things are wrong:")[2]
    for words in (
        "BadSpec: spec.rollout.engineArgs.max_model_len is 4, but ",
        "BadSpec: spec.rollout.engineArgs.enforce_eagre: vLLM ",
        "close to it: enforce_eager",
        "BadSpec: rollout.environment.code cannot be loaded: ",
        "No module named 'no_such_package'",
        f"BadData: data.jsonl: {tmp_path / 'data.jsonl'}, line 2: ",
    ):
        assert words in told, told
    assert "Starting: preflight" in done.stdout and "loading models" not in done.stdout
    assert "imported: []" in done.stdout


def test_all_that_is_wrong_is_told_in_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    path = job(
        tmp_path, rollout={"engine": "hf", "engineArgs": {"max_model_len": "4096"}, "environment": ENVIRONMENT},
        checkpoint={"path": str(tmp_path / "file" / "run")},
    )
    cut("model.safetensors", 1000)(tmp_path / "model")
    edit("generation_config.json", temperature=0.6, top_p=0.9)(tmp_path / "model")  # which is no fault
    monkeypatch.setattr(preflight, "WRONG_SECONDS", 400.0)  # no machine is too busy to tell all
    monkeypatch.setattr(preflight, "DEADLINE_SECONDS", 400.0)
    assert run.guarded(lambda: local(path, {})) == 64
    told = capsys.readouterr().err.rpartition("BadSpec: 5")[2]
    for words in (
        " things are wrong:",
        "BadSpec: spec.rollout.engineArgs.max_model_len is '4096': it must be a number",
        "model.safetensors: its weights cannot be loaded: SafetensorError",
        "BadSpec: rollout.environment.code cannot be loaded: ",
        f"BadData: data.jsonl: {tmp_path / 'data.jsonl'}, line 2: ",
        f"PreflightFailed: spec.checkpoint.path ({tmp_path}/file/run) cannot be written",
    ):
        assert words in told, told
