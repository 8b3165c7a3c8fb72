"""A manager of the KV cache that is asked at the borders of blocks hands out what one does that is asked at each token.
"""

import random
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from rlhf_worker.engines.slots import ask_at_borders

pytestmark = pytest.mark.vllm
SIZE = 4  # tokens a block
FULL = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
SLIDING = SlidingWindowSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8)


def managed(*specs: Any, blocks: int = 40) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, max_model_len=64, scheduler_block_size=SIZE, hash_block_size=SIZE)


class Core:
    """As much of vLLM's scheduler as its manager sees. late: the steps that a token is on its way, as with asynchronous
    scheduling, whose scheduler tells of it itself when it comes.
    """

    def __init__(self, manager: KVCacheManager, late: int) -> None:
        self.manager, self.late = manager, late
        self.running: dict[str, Request] = {}
        self.asked = 0
        self.told: list[Any] = []  # each answer

    def begin(self, name: str, prompt: list[int]) -> None:
        request = Request(name, prompt, SamplingParams(max_tokens=64), None,
            block_hasher=get_request_block_hasher(SIZE, sha256))
        found, count, *_ = self.manager.get_computed_blocks(request)
        blocks = self.manager.allocate_slots(request, len(prompt) - count, count, found)
        self.told.append(blocks and blocks.get_block_ids())
        if blocks is None:
            return
        request.status, request.num_computed_tokens = RequestStatus.RUNNING, len(prompt)
        self.running[name] = request
        self.sampled(request, 1)

    def step(self, name: str, token: int) -> None:
        request = self.running[name]
        blocks = self.manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        self.told.append(blocks and blocks.get_block_ids())
        if blocks is None:
            self.end(name)
        else:
            request.num_computed_tokens += 1
            self.sampled(request, token)

    def sampled(self, request: Request, token: int) -> None:
        if not self.late:
            request.append_output_token_ids(token)
            return
        request.num_output_placeholders += 1
        if request.num_output_placeholders > self.late:
            request.append_output_token_ids(token)
            request.num_output_placeholders -= 1
            self.manager.cache_blocks(request, request.num_computed_tokens - request.num_output_placeholders)

    def end(self, name: str) -> None:
        self.manager.free(self.running.pop(name))

    def cached(self) -> Any:
        return sorted(map(repr, self.manager.block_pool.cached_block_hash_to_block._cache))


def story(core: Core, seed: int) -> Core:
    chance = random.Random(seed)
    for count in range(400):
        names = sorted(core.running)
        if names and chance.random() < 0.95:
            core.step(chance.choice(names), chance.randrange(3))
        elif names and chance.random() < 0.5:
            core.end(chance.choice(names))
        else:
            shared = [7] * chance.randrange(1, 12)
            core.begin(f"{count}", shared + [chance.randrange(3) for _ in range(chance.randrange(1, 6))])
        core.told.append(core.cached())
    return core


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_blocks_in_the_same_order_and_the_same_prefixes(late: int, seed: int) -> None:
    init_none_hash(sha256)
    every, border = managed(FULL), managed(FULL)
    calls = 0
    whole = border.coordinator.allocate_new_blocks

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(*args)

    border.coordinator.allocate_new_blocks = counted
    ask_at_borders(border)
    one, other = story(Core(every, late), seed), story(Core(border, late), seed)
    assert one.told == other.told
    assert calls < 0.75 * sum(isinstance(answer, tuple) for answer in one.told)  # of four tokens two are asked for


@pytest.mark.parametrize("specs", [(SLIDING,), (FULL, SLIDING)])
def test_a_model_whose_blocks_are_freed_on_the_way_is_asked_for_each_token(specs: tuple[Any, ...]) -> None:
    manager = managed(*specs)
    ask_at_borders(manager)
    assert "allocate_slots" not in vars(manager) and "cache_blocks" not in vars(manager)
