"""A Ray of its own for a benchmark's actors, each with the GPUs and the environment that the measurement wants, not Ray's choice."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_IGNORE_UNHANDLED_ERRORS": "1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
    # Multicast can put GPUs that a virtual machine shares with others out of service.
    "NCCL_NVLS_ENABLE": "0",
}


@contextmanager
def local_ray() -> Iterator[None]:
    """Raises what ray.init raises."""
    paths = [str(ROOT), str(ROOT / "api"), str(ROOT / "worker"), os.environ.get("PYTHONPATH", "")]
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
    """Options of an actor that sees these GPUs, in this order ("" for none)."""
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
