"""Run configs for tests."""

from typing import Any

from rlhf_api.job import ObjectMeta, RLHFJob, RLHFJobSpec
from rlhf_api.run import RunConfig, resolve


def run_config(steps: int = 4, **changes: Any) -> RunConfig:
    """A tiny colocated run, on a CPU; `changes` replace whole sections of the spec."""
    return resolved(steps, **changes).on("cpu")


def resolved(steps: int = 4, **changes: Any) -> RunConfig:
    """As the operator writes it, with what follows from the device open."""
    spec: dict[str, Any] = {
        "image": "rlhf-worker:dev", "model": {"path": "/models/tiny", "dtype": "float32"},
        "data": {"jsonl": {"path": "/data.jsonl"}, "maxPromptTokens": 16},
        "rewards": [{"name": "r", "type": "python", "function": "a:b"}], "trainer": {"steps": steps},
        "rollout": {"maxTokens": 16},
    }
    metadata = ObjectMeta(name="tiny", uid="u-1")
    return resolve(RLHFJob(metadata=metadata, spec=RLHFJobSpec.model_validate(spec | changes)))
