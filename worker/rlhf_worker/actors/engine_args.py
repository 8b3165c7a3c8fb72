"""What is wrong with spec.rollout.engineArgs, said before an engine starts. No vLLM."""

import difflib
from typing import Any

from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec

# Arguments that the worker sets itself: another value would break the run, so it is refused.
RESERVED = {
    "model": "spec.model.path", "dtype": "spec.model.dtype", "trust_remote_code": "spec.model.trustRemoteCode",
    "tensor_parallel_size": "spec.rollout.tensorParallelSize", "weight_transfer_config": "spec.weightSync.backend",
    "distributed_executor_backend": "spec.rollout.tensorParallelSize", "logprobs_mode": "nothing: the loss needs processed_logprobs",
    "data_parallel_size": "spec.rollout.engines", "pipeline_parallel_size": "spec.rollout.tensorParallelSize",
}


def needed_context(config: RunConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def check_engine_args(config: RunConfig) -> None:
    """What can be said without vLLM and without the model. Raises BadSpec."""
    args, need = config.rollout.engine_args, needed_context(config)
    for name in args:
        if name in RESERVED:
            raise BadSpec(f"spec.rollout.engineArgs.{name}: the worker sets it itself; use {RESERVED[name]}")
    given = args.get("max_model_len")
    if given is not None and given < need:
        raise BadSpec(
            f"spec.rollout.engineArgs.max_model_len is {given}, but data.maxPromptTokens ({config.data.max_prompt_tokens}) + "
            f"rollout.maxTokens ({config.rollout.max_tokens}) is {need}: raise it, or lower one of the two"
        )


def check_context(config: RunConfig, context: int | None) -> None:
    """The model must have positions for a whole sample. Raises BadSpec."""
    if context is not None and context < needed_context(config) and not config.rollout.engine_args.get("hf_overrides"):
        raise BadSpec(
            f"spec.data.maxPromptTokens ({config.data.max_prompt_tokens}) + spec.rollout.maxTokens ({config.rollout.max_tokens}) is "
            f"{needed_context(config)}, but the model at spec.model.path has a context of {context}: lower one of the two"
        )


def check_known(args: dict[str, Any], known: set[str], version: str) -> None:
    """Raises BadSpec for an argument that vLLM does not have."""
    for name in args:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, sorted(known), 3))
            raise BadSpec(f"spec.rollout.engineArgs.{name}: vLLM {version} has no such argument{f'; close to it: {close}' if close else ''}")
