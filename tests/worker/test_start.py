"""A whole start of a run in which much is wrong: `rlhf_worker local` tells all of it, once, and ends by the hardest."""

import json
from pathlib import Path

import pytest
import yaml

from hack.tiny_model import write
from rlhf_worker import preflight, run
from rlhf_worker.local import local
from tests.worker.broken import cut, edit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_all_that_is_wrong_is_told_in_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    write(model)
    cut("model.safetensors", 1000)(model)
    edit("generation_config.json", temperature=0.6, top_p=0.9)(model)  # which is no fault
    data.write_text('{"prompt": "1 + 1 ="}\n{"prompt": 7}\n')
    (tmp_path / "file").touch()
    spec = {
        "image": "rlhf-worker:dev",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"jsonl": {"path": str(data)}, "maxPromptTokens": 16, "chatTemplate": False},
        "rewards": [{"name": "r", "type": "python", "code": "def reward(**row): return 1.0", "workers": 1}],
        "rollout": {"engine": "hf", "maxTokens": 8, "engineArgs": {"max_model_len": "4096"}},
        "trainer": {"steps": 1},
        "checkpoint": {"path": str(tmp_path / "file" / "run")},
    }
    job = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": "wrong"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(job))))
    monkeypatch.setattr(preflight, "WRONG_SECONDS", 400.0)  # no machine is too busy to tell all
    monkeypatch.setattr(preflight, "DEADLINE_SECONDS", 400.0)
    assert run.guarded(lambda: local(tmp_path / "job.yaml", {})) == 64
    told = capsys.readouterr().err.rpartition("BadSpec: 4")[2]
    for words in (
        " things are wrong:",
        "BadSpec: spec.rollout.engineArgs.max_model_len is '4096': it must be a number",
        "model.safetensors: its weights cannot be loaded: SafetensorError",
        f"BadData: data.jsonl: {data}, line 2: ",
        f"PreflightFailed: spec.checkpoint.path ({tmp_path}/file/run) cannot be written",
    ):
        assert words in told, told
