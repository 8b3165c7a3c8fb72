"""How much of a GPU the trainer uses: GRPO updates on packed sequences, by the product's own trainer, one GPU.

usage: python hack/bench/training.py [--shape 4B] [--vocabulary V] [--tokens 8192]
  [--micro-batches 4 | --sequences 1024] [--length 1024] [--lora RANK] [--updates 6] [--compile auto|on|off]
  [--gradient-checkpointing] [--profile] [--model DIR]

With --micro-batches each update has so many micro-batches of sequences of --length tokens, a quarter of each the
prompt. With --sequences it has so many of 32 tokens of prompt and 1 to --longest of completion, other ones in each
update, in micro-batches as a run packs them. Says of each update as it ends how long it took, and what may have held it
up; then prints a row (`row.py`): the median after two updates, and the slowest of those over it.

Utilisation is model FLOPs over time over the GPU's dense bfloat16 peak, both by `rlhf_worker.trainer.flops`; null where
no peak is known. """

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hack.bench.local_run import config
from hack.bench.row import printed
from hack.bench.weight_base import SHAPES, free_ports, model_config
from rlhf_worker.pace import DONE

WARM = 2  # updates
PROMPT = 32  # tokens, of sequences of varying length
GROUP = 8  # samples of a prompt
COMPILE = {"auto": None, "on": True, "off": False}
LOGPROB = -11.9  # of a token under random weights


def write_checkpoint(directory: Path, given: argparse.Namespace) -> None:
    """Random weights, made on the device, in bfloat16."""
    import transformers

    shape = model_config(given.shape, "bfloat16")
    shape.vocab_size = given.vocabulary or shape.vocab_size
    with torch.device(given.device):
        model = getattr(transformers, f"{SHAPES[given.shape][0]}ForCausalLM")(shape).to(torch.bfloat16)
    model.save_pretrained(directory)


def run_config(model: Path, given: argparse.Namespace) -> Any:
    trainer = {
        "steps": 100, "tokensPerMicroBatch": given.tokens, "gradientCheckpointing": given.gradient_checkpointing,
        "compile": COMPILE[given.compile],
    }
    adapters = {"lora": {"rank": given.lora, "alpha": 2 * given.lora}} if given.lora else {}
    prompt = PROMPT if given.sequences else given.length // 4
    return config(
        "training", model={"path": str(model), "dtype": given.dtype} | adapters, trainer=trainer,
        data={"jsonl": {"path": "none"}, "maxPromptTokens": prompt},
        rollout={"maxTokens": given.longest if given.sequences else given.length - prompt},
        checkpoint={"path": str(model / "checkpoints")},
    )


def lengths(given: argparse.Namespace, number: int) -> list[tuple[int, int]]:
    """Tokens of prompt and completion of each sequence of an update."""
    if not given.sequences:
        prompt = given.length // 4
        return [(prompt, given.length - prompt)] * (given.micro_batches * given.tokens // given.length)
    draw = random.Random(number)
    return [(PROMPT, draw.randint(1, given.longest)) for _ in range(given.sequences)]


def batches(run: Any, sizes: Sequence[tuple[int, int]], number: int) -> list[Any]:
    """The micro-batches of one update."""
    from rlhf_worker.algorithm.shape import shape
    from rlhf_worker.experience import TrainSequence, dealt, taken

    draw = random.Random(number)
    sequences = [
        TrainSequence(
            token_ids=np.array(draw.choices(range(1000), k=prompt + tokens), np.int32), prompt_length=prompt, index=i,
            mask=np.ones(tokens, np.bool_), columns={"rollout_logprobs": LOGPROB},
        )
        for i, (prompt, tokens) in enumerate(sizes)
    ]  # fmt: skip
    rewards, groups = [float(i % 2) for i in range(len(sizes))], [i // GROUP for i in range(len(sizes))]
    longest = max(tokens for _, tokens in sizes)
    shaped = shape(run.algorithm, 0.0, sequences, rewards, groups, updates=[range(len(sizes))], max_tokens=longest)
    (dealing,) = dealt([sum(size) for size in sizes], 1, run.trainer, padded=False)
    return taken(shaped.updates[0], dealing, run.trainer)


def held_up() -> tuple[int, int]:
    """Graphs compiled so far, and times that the allocator had to give memory back and ask anew."""
    from torch._dynamo.utils import counters

    retries = torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0
    return int(counters["stats"]["unique_graphs"]), int(retries)


def update(trainer: Any, work: list[Any], number: int) -> tuple[float, dict[str, float]]:
    """Seconds of one update and its metrics; said as it ends."""
    before, began = held_up(), time.perf_counter()
    metrics = trainer.train("policy", [work])  # which ends with numbers on the host
    seconds = time.perf_counter() - began
    graphs, retries = (after - first for after, first in zip(held_up(), before, strict=True))
    sizes = [len(batch.token_ids) for batch in work]
    print(f"update {number}: {seconds:.2f} s, {len(sizes)} micro-batches of {min(sizes)} to {max(sizes)} tokens, "
        f"{graphs} graphs compiled, {retries} allocations tried again", file=sys.stderr, flush=True)
    return seconds, metrics


def profiled(trainer: Any, work: list[Any]) -> None:
    """The kernels of one more update, by their time."""
    with torch.profiler.profile() as profile:
        trainer.train("policy", [work])
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80), file=sys.stderr)


def report(
    given: argparse.Namespace, micro_batches: list[int], seconds: list[float], made: list[dict[str, float]], *,
    kept: bool,
) -> None:  # fmt: skip
    """The row. made: the metrics of each update; kept: whether layers that are computed anew find their attention."""
    median, took = statistics.median(seconds[WARM:]), sum(seconds[WARM:])
    flops, tokens = ([each[f"{DONE}{name}"] for each in made] for name in ("flops", "tokens"))
    speeds = [each / second for each, second in zip(flops[WARM:], seconds[WARM:], strict=True)]
    utilisation = statistics.median(speeds) / made[-1][f"{DONE}peak"]
    names = ("shape", "vocabulary", "tokens", "micro_batches", "sequences", "length", "longest", "lora", "compile",
        "dtype", "gradient_checkpointing")  # fmt: skip
    known = {"utilisation": utilisation} if math.isfinite(utilisation) else {}
    printed(
        "training", {name: getattr(given, name) for name in names},
        lower={"median": median} | ({"peak_memory_gib": max(each[f"{DONE}memory"] for each in made) / 2**30}
            if given.device == "cuda" else {}),
        higher={"tokens_per_second": sum(tokens[WARM:]) / took, "tflops": statistics.median(speeds) / 1e12, **known},
        micro_batches=micro_batches, seconds=seconds, worst_over_median=max(seconds[WARM:]) / median,
        loss=made[-1]["loss"], grad_norm=made[-1]["grad_norm"],
        attention=torch.nn.attention.current_flash_attention_impl() or "FlashAttention 2", attention_kept=kept,
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4B", choices=list(SHAPES))
    parser.add_argument("--vocabulary", type=int, help="in place of the shape's")
    parser.add_argument("--tokens", type=int, default=8192, help="of one packed micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--sequences", type=int, help="of varying length, of an update")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence, in tokens, where all are alike")
    parser.add_argument("--longest", type=int, default=512, help="completion of these, in tokens")
    parser.add_argument("--lora", type=int, help="train adapters of this rank in place of the weights")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--compile", default="auto", choices=list(COMPILE))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one more update, and its kernels")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", type=Path, help="the checkpoint, made where it is not there")
    given = parser.parse_args()
    if given.updates <= WARM:
        parser.error(f"--updates must be more than {WARM}: the first ones warm up")
    if given.tokens < given.length and not given.sequences:
        parser.error(f"--length {given.length} must be at most --tokens {given.tokens}")
    return given


def main() -> int:
    given = arguments()
    from rlhf_worker.trainer.rank import Trainer

    model = given.model or Path(tempfile.mkdtemp(prefix="training-"))
    if not (model / "config.json").exists():
        write_checkpoint(model, given)
        torch.cuda.empty_cache()
    run = run_config(model, given)
    trainer = Trainer(run, ["policy"], 0, 1, given.device, os.cpu_count() or 1)
    trainer.join(("127.0.0.1", free_ports(1)[0]))
    trainer.load()
    packed = [batches(run, lengths(given, number), number) for number in range(given.updates)]
    found = [update(trainer, work, number) for number, work in enumerate(packed, 1)]
    if given.profile:
        profiled(trainer, packed[-1])
    seconds, made = [took for took, _ in found], [metrics for _, metrics in found]
    report(given, [len(each) for each in packed], seconds, made, kept=trainer.attention)
    trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
