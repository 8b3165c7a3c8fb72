"""TRL's row of `shootout.py`, in TRL's own environment: GRPOTrainer, vLLM in its process, one GPU.

usage: python hack/bench/shootout_trl.py --model DIR --prompts-file FILE --out FILE [--steps 6] [--prompts 128]
  [--samples 8] [--tokens 512] [--rows 16] [--utilisation 0.45] [--sleep] [--generate vllm|transformers] [--device cuda]

Writes JSON: {"versions", "seconds": [a step each], "tokens": [completion tokens a step]}. Nothing of this project is
imported. """

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # TRL reaches into the engine, which must be in its process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")


def distinct(completions: list[str], **_: Any) -> list[float]:
    """Something that differs within a group: the reward of `step.py`."""
    return [len(set(text.split())) / 100 for text in completions]


def versions() -> dict[str, str]:
    found = {}
    for name in ("trl", "vllm", "torch", "transformers", "accelerate", "datasets"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def grpo_config(given: argparse.Namespace, out: str) -> Any:
    """One update a step of prompts x samples completions, in micro-batches of `rows`; float32 weights under bfloat16
    autocast, nothing recomputed, no reference model, the last step's learning rate as the first's.
    """
    from trl import GRPOConfig

    completions, cuda = given.prompts * given.samples, given.device == "cuda"
    return GRPOConfig(
        output_dir=out, max_steps=given.steps, per_device_train_batch_size=given.rows,
        gradient_accumulation_steps=completions // given.rows, num_generations=given.samples,
        max_completion_length=given.tokens, temperature=1.0, learning_rate=1e-6, lr_scheduler_type="constant",
        beta=0.0, loss_type="grpo", num_iterations=1, bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"}, shuffle_dataset=False, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, max_grad_norm=1.0, use_vllm=given.generate == "vllm",
        vllm_mode="colocate", vllm_gpu_memory_utilization=given.utilisation, vllm_enable_sleep_mode=given.sleep,
        vllm_max_model_length=given.context, optim="adamw_torch_fused" if cuda else "adamw_torch",
    )  # fmt: skip


def run(given: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        """A step is from the end of the one before, so that generation and weight sync are in it."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.tokens: list[float] = []
            self.since = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.since = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "completions/mean_length" in logs:
                self.tokens.append(logs["completions/mean_length"] * given.prompts * given.samples)

    rows = [json.loads(line)["prompt"] for line in given.prompts_file.read_text().splitlines()]
    clock, tokenizer = Clock(), AutoTokenizer.from_pretrained(given.model)
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=str(given.model), reward_funcs=distinct, args=grpo_config(given, out),
            train_dataset=Dataset.from_dict({"prompt": rows}), processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return {"versions": versions(), "seconds": clock.seconds, "tokens": clock.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts-file", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--context", type=int, default=640, help="tokens of prompt and completion")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a micro-batch")
    parser.add_argument("--utilisation", type=float, default=0.45, help="of the GPU's memory, for vLLM")
    parser.add_argument("--sleep", action="store_true", help="vLLM lends its memory to the training")
    parser.add_argument("--generate", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args()
    given.out.write_text(json.dumps(run(given)))


if __name__ == "__main__":
    main()
