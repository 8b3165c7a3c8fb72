"""What the weight benchmarks share: the shapes of the models that they move, a Ray of their own, and the clock."""

import os
import socket
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from math import prod
from pathlib import Path
from typing import Any

import ray
import torch

ROOT = Path(__file__).resolve().parents[2]
QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 4096, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "head_dim": 64, "num_key_value_heads": 3, "max_position_embeddings": 2048, "pad_token_id": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6B": ("Qwen3", QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    }),
    "1.7B": ("Qwen3", QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    }),
    "4B": ("Qwen3", QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    }),
    "8B": ("Qwen3", QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    }),
    "30B-A3B": ("Qwen3Moe", QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    }),
    "tiny-moe": ("Qwen3Moe", QWEN3 | {
        "vocab_size": 256, "head_dim": 32, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "norm_topk_prob": True, "tie_word_embeddings": False,
    }),
    "tiny": ("Llama", SMOLLM2 | {  # a smoke test of the benchmark itself
        "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "tie_word_embeddings": True,
    }),
    "135M": ("Llama", SMOLLM2 | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "tie_word_embeddings": True,
    }),
}
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    # Multicast can put GPUs that a virtual machine shares with others out of service.
    "NCCL_NVLS_ENABLE": "0",
}


def model_config(shape: str, dtype: str) -> Any:
    """A transformers configuration; `shape` is a key of SHAPES."""
    import transformers

    family, values = SHAPES[shape]
    return getattr(transformers, f"{family}Config")(**values, architectures=[f"{family}ForCausalLM"], dtype=dtype)


def parameters(shape: str) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes, in order; tied parameters once. Takes no memory."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{SHAPES[shape][0]}ForCausalLM")(model_config(shape, "bfloat16"))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def elements(shape: str) -> int:
    return sum(map(prod, parameters(shape).values()))


def write_model(directory: Path, shape: str, dtype: str) -> None:
    """All that an engine with dummy weights and no tokenizer reads."""
    model_config(shape, dtype).save_pretrained(directory)


def site() -> Path:
    """A directory for PYTHONPATH by which vLLM finds the worker's plugin where only its sources are, not its installed
    metadata.
    """
    plugins = tomllib.loads(
        (ROOT / "worker" / "pyproject.toml").read_text()
    )["project"]["entry-points"]["vllm.general_plugins"]
    info = Path(tempfile.mkdtemp(prefix="bench-site-")) / "rlhf_worker-0.dist-info"
    if not {entry.name for entry in entry_points(group="vllm.general_plugins")} >= set(plugins):
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rlhf-worker\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\n" + "".join(f"{name} = {value}\n" for name, value in plugins.items())
        )
    return info.parent


@contextmanager
def local_ray() -> Iterator[None]:
    """Raises what ray.init raises."""
    paths = [str(ROOT), str(ROOT / "api"), str(ROOT / "worker"), str(site()), os.environ.get("PYTHONPATH", "")]
    os.environ.update(ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local", num_cpus=8, num_gpus=0, include_dashboard=False, object_store_memory=256 << 20,
        _temp_dir=tempfile.mkdtemp(prefix="bench-ray-"), log_to_driver=True,
    )
    try:
        yield
    finally:
        ray.shutdown()


def on(gpus: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Options of an actor that sees these GPUs, in this order ("" for none): the measurement's choice, not Ray's."""
    return {"num_cpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": gpus} | (environment or {})}}


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Sample:
    """Seconds: from idle to idle by the clock; by the GPU's own events (on a CPU the same); by the clock until all was
    enqueued.
    """

    wall: float
    event: float
    host: float


def timed(work: Callable[[], object], device: str = "cuda") -> Sample:
    if device == "cpu":
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        return Sample(seconds, seconds, seconds)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    start.record()
    work()
    end.record()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return Sample(time.perf_counter() - began, start.elapsed_time(end) / 1e3, host)
