"""What a step of vLLM's engine costs beside the model: in the core `Scheduler.schedule`, `update_from_output` and the
message, in the engine's process reading it and `OutputProcessor.process_outputs`.

usage: python hack/bench/engine_step.py [--sequences 512] [--tokens 128] [--columns 0]

Core and front end in one process, a process a way, with a tiny model whose own time is not counted. A row
(`row.py`) for each way: milliseconds of the processor a step, kilobytes and outputs a step. """

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.row import printed

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}
# What it is called, whether it asks for log probabilities, and the scheduler.
WAYS = (
    ("vLLM, none", False, None), ("vLLM, log probabilities", True, None),
    ("ours, log probabilities", True, "rlhf_worker.engines.scheduler.MergingScheduler"),
)  # fmt: skip


class Clock:
    """Seconds of the processor by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.thread_time() - began

        return timed


class Wire:
    """Stands between core and front end as their sockets do."""

    def __init__(self, clock: Clock, step: Callable[[], Any]) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.step, self.steps, self.bytes, self.outputs = step, 0, 0, 0
        self.encode = clock.around("encode", MsgpackEncoder().encode)
        self.decode = clock.around("decode", MsgpackDecoder(EngineCoreOutputs).decode)

    def get_output(self) -> Any:
        frames = [bytes(frame) for frame in self.encode(self.step())]
        self.steps += 1
        self.bytes += sum(map(len, frames))
        found = self.decode(frames)
        self.outputs += len(found.outputs)
        return found


def measure(given: argparse.Namespace, model: Path, logprobs: bool, scheduler: str | None) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=str(model), dtype="float32", enforce_eager=True, enable_chunked_prefill=False, max_logprobs=64,
        max_model_len=16 + given.tokens, max_num_seqs=given.sequences, kv_cache_memory_bytes=1 << 30,
        scheduler_cls=scheduler, async_scheduling=False, disable_log_stats=True, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    engine, clock = llm.llm_engine, Clock()
    core = engine.engine_core.engine_core
    core.scheduler.schedule = clock.around("schedule", core.scheduler.schedule)
    core.scheduler.update_from_output = clock.around("update_from_output", core.scheduler.update_from_output)
    engine.output_processor.process_outputs = clock.around("process_outputs", engine.output_processor.process_outputs)
    wire = Wire(clock, engine.engine_core.get_output)
    engine.engine_core.get_output = wire.get_output
    params = SamplingParams(
        max_tokens=given.tokens, ignore_eos=True, detokenize=False, flat_logprobs=True,
        logprobs=given.columns if logprobs else None,
    )  # fmt: skip
    llm.generate([TokensPrompt(prompt_token_ids=[5, 6, 7])] * given.sequences, params, use_tqdm=False)
    milliseconds = {part: round(1e3 * seconds / wire.steps, 3) for part, seconds in clock.seconds.items()}
    core_ms = sum(milliseconds[part] for part in ("schedule", "update_from_output", "encode"))
    return {
        **milliseconds, "core": round(core_ms, 2),
        "front end": round(milliseconds["decode"] + milliseconds["process_outputs"], 2),
        "kilobytes": round(wire.bytes / wire.steps / 1e3, 1), "outputs": round(wire.outputs / wire.steps, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--columns", type=int, default=0, help="likeliest tokens a token, as with topK")
    given = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from hack.tiny_model import write

    model = Path(tempfile.mkdtemp(prefix="engine-step-"))
    write(model)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for way, *options in WAYS:
            found = pool.submit(measure, given, model, *options).result()
            asked = {name: getattr(given, name) for name in ("sequences", "tokens", "columns")}
            printed("engine_step", {"way": way, **asked}, lower=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
