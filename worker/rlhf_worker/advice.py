"""Out of memory: which number of the spec to lower. Pure: from the error's text and the run config to a sentence."""

import re

from rlhf_api.job import PlacementMode
from rlhf_api.run import RunConfig

OUT_OF_MEMORY = re.compile(r"CUDA out of memory|OutOfMemoryError|CUDA error: out of "
    r"memory|CUBLAS_STATUS_ALLOC_FAILED|NCCL.*out of memory|No available memory for the cache blocks"
                           r"|less than desired GPU memory utilization|KV cache is needed, which is larger "
                               r"than|No space left on device.*/dev/shm", re.DOTALL)  # fmt: skip
KILLED = re.compile(r"killed.*(due to|because).*memory|OOM ?kill", re.IGNORECASE | re.DOTALL)
ENGINE = re.compile(
    r"vllm|EngineCore|RemoteEngine|KV cache|cache blocks|GPU memory utilization|\bEngine\.\w+\(", re.IGNORECASE,
)
SEQUENCES = "spec.rollout.engineArgs.max_num_seqs"


def advice(text: str, config: RunConfig) -> str | None:
    """A sentence for people; None when memory is not what the error is about. `text`: the error with its traceback."""
    if KILLED.search(text):
        offload = ", or unset spec.trainer.offload" if config.trainer.offload else ""
        words = "raise spec.pods.trainer.resources.limits.memory, or lower spec.rewards[].workers"
        return f"Out of host memory: {words}{offload}"
    if not OUT_OF_MEMORY.search(text):
        return None
    steps = _engine(text, config) if ENGINE.search(text) else _trainer(config)
    return (f"Out of GPU memory in {'an engine' if ENGINE.search(text) else 'the trainer'}; first things first: "
        f"{'; '.join(steps)}.")


def _trainer(config: RunConfig) -> list[str]:
    trainer, colocated = config.trainer, config.placement.mode is PlacementMode.COLOCATED
    budget = trainer.tokens_per_micro_batch
    steps = [] if trainer.gradient_checkpointing else ["set spec.trainer.gradientCheckpointing"]
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    if budget is None:
        steps.append(f"set spec.trainer.tokensPerMicroBatch to less than the log says that there is room for (the "
            f"longest sample has {longest} tokens)")
    elif budget * trainer.context_parallel > longest:
        steps.append(f"lower spec.trainer.tokensPerMicroBatch ({budget}; the longest sample has {longest} tokens)")
    else:
        steps.append(f"raise spec.trainer.contextParallel ({trainer.context_parallel}) with spec.trainer.gpus, or "
            f"lower spec.rollout.maxTokens ({config.rollout.max_tokens}): one sample of {longest} tokens fills a "
            "micro-batch")
    if colocated:
        steps += [*(["remove spec.rollout.sleep"] if config.rollout.sleep is False else []), _share(config)]
    more = f"raise spec.trainer.gpus ({trainer.gpus})" if trainer.sharding == "Full" else (
        "set spec.trainer.sharding to Full")
    return [*steps, *([] if trainer.offload else ["set spec.trainer.offload"]), more]


def _engine(text: str, config: RunConfig) -> list[str]:
    colocated, given = config.placement.mode is PlacementMode.COLOCATED, config.rollout.engine_args
    if re.search(r"cache blocks|KV cache is needed", text):  # there is memory, and it may not take it
        share = "spec.placement.fractions.rollout" if colocated else "spec.rollout.engineArgs.gpu_memory_utilization"
        prompt = f"data.maxPromptTokens ({config.data.max_prompt_tokens})"
        lengths = f"rollout.maxTokens ({config.rollout.max_tokens})", prompt
        lower = " or ".join(f"spec.{length}" for length in lengths)
        return [f"raise {share}", f"lower {lower}", "raise spec.rollout.tensorParallelSize"]
    if "less than desired GPU memory utilization" in text:
        who = "the trainer, or a process" if colocated else "a process"
        return [f"something else holds the GPU's memory: {who} that is still ending", _share(config)]
    sequences = given.get("max_num_seqs")
    fewer = f"lower {SEQUENCES} ({sequences})" if sequences else f"set {SEQUENCES} to 256 or less"
    return [_share(config), fewer, "raise spec.rollout.tensorParallelSize"]


def _share(config: RunConfig) -> str:
    given = config.rollout.engine_args.get("gpu_memory_utilization")
    if given is not None:
        return f"lower spec.rollout.engineArgs.gpu_memory_utilization ({given})"
    if config.placement.mode is PlacementMode.COLOCATED:
        return (f"lower spec.placement.fractions.rollout ({config.placement.engine_fraction:g}), by which the engine "
            "takes its memory")
    return "set spec.rollout.engineArgs.gpu_memory_utilization below 0.9"
