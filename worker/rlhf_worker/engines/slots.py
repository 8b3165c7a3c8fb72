"""Slots of vLLM's KV cache are asked for where a request needs a block, not at each of its tokens.

A request that decodes needs a block of the cache every 16 tokens or so, and hands one to the prefix cache as often.
vLLM's scheduler asks its manager at every token of every request; of what its core does between two steps of 512
sequences these questions are a third. Between the borders of a block their answer is known: nothing is new. Loaded in
the core's process; imports vLLM. """

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request


def ask_at_borders(manager: "KVCacheManager") -> None:
    """Changes `manager`, where its model has one kind of layers that attend to all tokens. Any other frees or copies
    blocks inside these calls, and keeps them all.
    """
    coordinator = manager.coordinator
    if type(coordinator) is not UnitaryKVCacheCoordinator:
        return
    (group,) = coordinator.single_type_managers
    size = group.block_size
    if type(group) is not FullAttentionManager or group.dcp_world_size * group.pcp_world_size > 1:
        return
    allocate, cache = manager.allocate_slots, manager.cache_blocks

    def allocate_slots(
        request: "Request", num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **more: Any,
    ) -> "KVCacheBlocks | None":
        # The first token of a block needs it, and the last one fills it.
        inside = 0 < request.num_computed_tokens % size < size - 1
        if inside and num_new_tokens == 1 and not (num_lookahead_tokens or args or more):
            return manager.empty_kv_cache_blocks
        return allocate(request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **more)

    def cache_blocks(request: "Request", num_computed_tokens: int) -> None:
        if num_computed_tokens % size == 0 or num_computed_tokens != request.num_tokens - 1:
            cache(request, num_computed_tokens)

    manager.allocate_slots, manager.cache_blocks = allocate_slots, cache_blocks
