"""What is wrong with spec.rollout.engineArgs, said before an engine starts. No vLLM."""

import difflib
import re
from typing import Any

from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec

# Arguments that the worker sets itself: another value would break the run, so it is refused.
RESERVED = {
    "model": "spec.model.path", "dtype": "spec.model.dtype", "trust_remote_code": "spec.model.trustRemoteCode",
    "tensor_parallel_size": "spec.rollout.tensorParallelSize", "weight_transfer_config": "spec.weightSync.backend",
    "distributed_executor_backend": "spec.rollout.tensorParallelSize", "logprobs_mode": "nothing: the loss needs processed_logprobs",
    **dict.fromkeys(("enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras", "lora_target_modules"), "spec.model.lora"),
    "data_parallel_size": "spec.rollout.engines", "pipeline_parallel_size": "spec.rollout.tensorParallelSize",
}


def needed_context(config: RunConfig) -> int:
    return _longest(config)[0]


def _longest(config: RunConfig) -> tuple[int, str]:
    """Tokens of the longest sample that may be asked for, evaluation included, and the fields that make it."""
    prompt, most = config.data.max_prompt_tokens, config.rollout.max_tokens
    found = [(prompt + most, f"spec.data.maxPromptTokens ({prompt}) + spec.rollout.maxTokens ({most})")]
    for e in config.evaluation:
        prompt, own = e.data.max_prompt_tokens, e.max_tokens or most
        found.append((prompt + own, f"evaluation[{e.name}]: data.maxPromptTokens ({prompt}) + maxTokens ({own})"))
    return max(found, key=lambda one: one[0])


def check_engine_args(config: RunConfig) -> None:
    """What can be said without vLLM and without the model. Raises BadSpec."""
    args, (need, fields) = config.rollout.engine_args, _longest(config)
    for name in args:
        if name in RESERVED:
            raise BadSpec(f"spec.rollout.engineArgs.{name}: the worker sets it itself; use {RESERVED[name]}")
    given = args.get("max_model_len")
    if given is not None and given < need:
        raise BadSpec(f"spec.rollout.engineArgs.max_model_len is {given}, but {fields} is {need}: raise it, or lower one of the two")


def check_context(config: RunConfig, context: int | None) -> None:
    """The model must have positions for a whole sample. Raises BadSpec."""
    need, fields = _longest(config)
    if context is not None and context < need and not config.rollout.engine_args.get("hf_overrides"):
        raise BadSpec(f"{fields} is {need}, but the model at spec.model.path has a context of {context}: lower one of the two")


def check_known(args: dict[str, Any], known: set[str], version: str) -> None:
    """Raises BadSpec for an argument that vLLM does not have."""
    for name in args:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, sorted(known), 3))
            raise BadSpec(f"spec.rollout.engineArgs.{name}: vLLM {version} has no such argument{f'; close to it: {close}' if close else ''}")


def refused(config: RunConfig, reason: str, version: str) -> BadSpec:
    """What vLLM's own check of model and arguments says, with the field. `reason` is its message, which may list every class that it knows."""
    if found := re.search(r"Model architectures (\[.*?\]) (?:are not supported|failed)", reason):
        return BadSpec(
            f"spec.model.path: {config.model.path}: vLLM {version} does not know its model class {found[1]}: use a model that it knows, or for "
            "debugging spec.rollout.engine: hf"
        )
    return BadSpec(f"spec.model or spec.rollout.engineArgs: vLLM {version} refuses them: {reason[:600]}")


def check_attention(config: RunConfig, model: Any) -> None:
    """`model`: vLLM's ModelConfig. Raises BadSpec for multi-head latent attention: what vLLM derives from its weights as it loads them, no weight sync renews."""
    if model.use_mla:
        raise BadSpec(
            f"spec.model.path: {config.model.path}: vLLM computes its latent attention (kv_lora_rank) with matrices that it derives from the weights "
            "once, so a weight sync would leave old ones in use: use a model without it"
        )
