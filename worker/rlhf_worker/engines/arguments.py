"""What is wrong with spec.rollout.engineArgs, said before an engine starts. No vLLM."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, ValidationError, create_model

from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec, Problems
from rlhf_worker.pretrained import model_field

# Arguments that the worker sets itself: another value would break the run, so it is refused.
RESERVED = {
    "model": "spec.model.path", "dtype": "spec.model.dtype", "trust_remote_code": "spec.model.trustRemoteCode",
    "tensor_parallel_size": "spec.rollout.tensorParallelSize", "weight_transfer_config": "spec.weightSync.backend",
    "distributed_executor_backend": "spec.rollout.tensorParallelSize", "logprobs_mode": "nothing: the loss needs "
        "processed_logprobs",
    **dict.fromkeys(
        ("enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras", "lora_target_modules"), "spec.model.lora",
    ),
    "data_parallel_size": "spec.rollout.engines", "pipeline_parallel_size": "spec.rollout.tensorParallelSize",
    "enable_sleep_mode": "spec.rollout.sleep",
}


def settled(config: RunConfig, device: str) -> RunConfig:
    """With what follows from the device. device: "cuda" or "cpu". Raises BadSpec."""
    if config.rollout.sleep and device == "cpu":
        raise BadSpec("spec.rollout.sleep is true, but engines on CPUs cannot sleep: remove it")
    return config.on(device)


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
    args, (need, fields), problems = config.rollout.engine_args, _longest(config), Problems()
    for name in RESERVED.keys() & args.keys():
        with problems:
            raise BadSpec(f"spec.rollout.engineArgs.{name}: the worker sets it itself; use {RESERVED[name]}")
    # What the worker itself computes with.
    for name, kinds in (("max_model_len", int), ("gpu_memory_utilization", int | float)):
        if (given := args.get(name)) is not None and (isinstance(given, bool) or not isinstance(given, kinds)):
            with problems:
                raise BadSpec(f"spec.rollout.engineArgs.{name} is {given!r:.80}: it must be a number, without quotes")
    given = args.get("max_model_len")
    if isinstance(given, int) and given < need:
        with problems:
            raise BadSpec(
                f"spec.rollout.engineArgs.max_model_len is {given}, but {fields} is {need}: "
                "raise it, or lower one of the two"
            )
    problems.tell()


def check_context(config: RunConfig, context: int | None) -> None:
    """The model must have positions for a whole sample. Raises BadSpec."""
    need, fields = _longest(config)
    if context is not None and context < need and not config.rollout.engine_args.get("hf_overrides"):
        raise BadSpec(f"{fields} is {need}, but the model at spec.model.path has a context of {context}: lower one of "
            "the two")


def check_role_context(config: RunConfig, role: str, context: int | None) -> None:
    """Every other role reads whole samples too: a reward model also those of evaluations. Raises BadSpec."""
    prompt, most = config.data.max_prompt_tokens, config.rollout.max_tokens
    own = prompt + most, f"spec.data.maxPromptTokens ({prompt}) + spec.rollout.maxTokens ({most})"
    need, fields = _longest(config) if role.startswith("reward:") else own
    if role != "policy" and context is not None and context < need:
        where = f"the model at {model_field(role)} has a context of {context}"
        raise BadSpec(f"{fields} is {need}, but {where}: lower one of the two, or use another model there")


def check_known(args: dict[str, Any], known: Mapping[str, Any], version: str) -> None:
    """known: vLLM's arguments by name, with their types. Raises BadSpec for one that it lacks, or of another type."""
    problems = Problems()
    for name, value in args.items():
        with problems:
            if name not in known:
                close = ", ".join(difflib.get_close_matches(name, sorted(known), 3))
                hint = f"; close to it: {close}" if close else ""
                raise BadSpec(f"spec.rollout.engineArgs.{name}: vLLM {version} has no such argument{hint}")
            if why := _misfit(value, known[name]):
                raise BadSpec(f"spec.rollout.engineArgs.{name}: {value!r:.80} is none of vLLM {version}'s: {why}")
    problems.tell()


def _misfit(value: Any, kind: Any) -> str | None:
    """Why a JSON value is not of vLLM's type; None where it is, or where vLLM alone can tell.

    It makes objects of mappings by itself, and null is its own default of some that are no option by their type.
    """
    if value is None or isinstance(value, dict) or isinstance(kind, str):
        return None
    try:
        holder = create_model("Argument", __config__=ConfigDict(arbitrary_types_allowed=True), value=(kind, ...))
        holder.model_validate_json(json.dumps({"value": value}), strict=True)
    except ValidationError as error:
        return "; ".join(dict.fromkeys(one["msg"] for one in error.errors(include_url=False)))
    except PydanticUserError:
        pass  # no type that JSON can be held against
    return None


def refused(config: RunConfig, reason: str, version: str) -> BadSpec:
    """What vLLM's own check of model and arguments says, with the field. `reason` is its message, which may list every
    class that it knows.
    """
    if found := re.search(r"Model architectures (\[.*?\]) (?:are not supported|failed)", reason):
        return BadSpec(
            f"spec.model.path: {config.model.path}: vLLM {version} does not know its model class {found[1]}: "
                "use a model that it knows, or for "
            "debugging spec.rollout.engine: hf"
        )
    return BadSpec(f"spec.model or spec.rollout.engineArgs: vLLM {version} refuses them: {reason[:600]}")


def check_attention(config: RunConfig, model: Any) -> None:
    """`model`: vLLM's ModelConfig. Raises BadSpec for multi-head latent attention: what vLLM derives from its weights
    as it loads them, no weight sync renews.
    """
    if model.use_mla:
        raise BadSpec(
            f"spec.model.path: {config.model.path}: vLLM computes its latent attention (kv_lora_rank) with "
                "matrices that it derives from the weights "
            "once, so a weight sync would leave old ones in use: use a model without it"
        )
