"""Tensor parallel on CPU through vLLM's Ray executor, so that logical GPUs are held and proven as on GPU.

vLLM has no Ray resource for its CPU platform; here it is the logical GPU.
"""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc


class CPUWorkerProc(RayWorkerProc):
    """A worker whose platform counts Ray's GPUs; it has no device to pick."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        current_platform.ray_device_key = "GPU"
        node, _ = _logical_ids()
        return node, []

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        kwargs["assigned_physical_gpu_ids"] = None
        super().initialize_worker(*args, **kwargs)


def _logical_ids() -> tuple[str, list[int]]:
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), [int(number) for number in context.get_accelerator_ids().get("GPU", [])]


class CPURayExecutor(RayExecutorV2):
    def _init_executor(self) -> None:
        current_platform.ray_device_key = "GPU"
        ray_executor_v2.RayWorkerProc = CPUWorkerProc
        super()._init_executor()
