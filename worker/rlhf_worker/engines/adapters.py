"""The policy's LoRA adapters in one engine: the newest, and those before it that requests under way still use."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec, EngineFailed
from rlhf_worker.pretrained import adapted, load_config

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


def adapter_args(config: RunConfig) -> dict[str, Any]:
    """vLLM's arguments. Slots: a request runs over `staleness` syncs at most, so that many versions are in use while
    the next one comes, and one at least.

    vLLM's adapters of other modules would be zeros that cost time; and those of the head fail, on CPU, where prompt log
    probabilities are asked for. Raises BadSpec. """
    lora, slots = config.model.lora, max(1, config.rollout.staleness) + 1
    if lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks
    from vllm.model_executor.models import ModelRegistry, supports_lora

    # transformers' all have it
    own = ModelRegistry.models if config.rollout.engine_args.get("model_impl") != "transformers" else {}
    for name in load_config(config.model).architectures or ():
        if name in own and not supports_lora(own[name].load_model_cls()):
            raise BadSpec(f"spec.model.lora: vLLM serves {name}, the class of {config.model.path}, without adapters: "
                "remove spec.model.lora, or use another model")
    rank = min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank)
    return {
        "enable_lora": True, "max_lora_rank": rank, "max_loras": slots, "max_cpu_loras": slots,
        "lora_target_modules": adapted(config.model),
    }


def version_of(request: "LoRARequest") -> int:
    return int(request.lora_int_id) - 1  # vLLM's numbers begin at 1


class Adapters:
    def __init__(self, llm: "AsyncLLM") -> None:
        self.llm = llm
        self.current: LoRARequest | None = None  # None: nothing was loaded yet
        self._users: Counter[int] = Counter()  # requests under way, by the adapter's number

    async def load(self, version: int, files: dict[str, bytes]) -> None:
        """PEFT's files, by name; later requests use them. What has the version already keeps it. Raises EngineFailed.
        """
        from vllm.lora.request import LoRARequest

        from rlhf_worker.lora import write
        from rlhf_worker.weights.mapped import SHARED_MEMORY

        if self.current is not None and version_of(self.current) == version:
            return
        # An engine lies on one node, and its workers see this actor's shared memory.
        with tempfile.TemporaryDirectory(prefix="rlhf-adapter-", dir=SHARED_MEMORY) as directory:
            write(Path(directory), files)
            request = LoRARequest(lora_name=f"policy-{version}", lora_int_id=version + 1, lora_path=directory)
            if not await self.llm.add_lora(request):
                raise EngineFailed(f"vLLM did not take the adapter of version {version}")
        self.current = request
        for number in await self.llm.list_loras():
            if number != request.lora_int_id and not self._users[number]:
                await self.llm.remove_lora(number)

    @contextmanager
    def lent(self) -> Iterator["LoRARequest | None"]:
        """The newest, which stays while it is used."""
        adapter = self.current
        number = adapter.lora_int_id if adapter else 0
        self._users[number] += 1
        try:
            yield adapter
        finally:
            self._users[number] -= 1
