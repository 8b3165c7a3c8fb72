"""What the real vLLM refuses before it loads anything, told with the field."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hack.tiny_model import write
from rlhf_worker.engines.engine import Engine
from rlhf_worker.errors import BadSpec
from tests.worker.configs import run_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def started(monkeypatch: pytest.MonkeyPatch, path: Path, **rollout: Any) -> None:
    monkeypatch.setattr(Engine, "_environment", lambda *_: None)  # which is of a Ray worker
    config = run_config(model={"path": str(path), "dtype": "float32"}, rollout={"maxTokens": 16, **rollout})
    asyncio.run(Engine(config, 0, "cpu", [0], [], 1).start("shm"))


def test_a_model_class_that_vllm_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NopeForCausalLM"]}))
    with pytest.raises(BadSpec, match=r"spec\.model\.path: .*: vLLM \S+ does not know its model class \['NopeForCausalLM'\]: use a model"):
        started(monkeypatch, tmp_path)


def test_an_argument_that_vllm_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    with pytest.raises(BadSpec, match=r"spec\.rollout\.engineArgs: vLLM \S+ refuses them: "):
        started(monkeypatch, tmp_path, engineArgs={"max_num_seqs": 0})
