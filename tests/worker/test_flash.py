"""Which FlashAttention serves the trainer. The kernels are a GPU's; what chooses between them runs anywhere."""

import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl
from transformers import LlamaConfig, MambaConfig, OPTConfig, PreTrainedConfig, Qwen3Config

from rlhf_worker.trainer import flash
from rlhf_worker.trainer.flash import FOURTH, Heads, choose

HEADS, OTHERS = Heads(4, 2, 64, windows=False), Heads(8, 8, 96, windows=True)
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of the generation, on which both kernels compute the same; nothing was tried yet."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(flash, "_serves", {})
    monkeypatch.setattr(flash, "_passes", lambda *_: [torch.arange(1.0, 5.0)] * 4)
    yield
    flash._restore()


def as_fourth(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """What the fourth makes is what `change` makes of the second's."""
    plain = [torch.arange(1.0, 5.0)] * 4

    def passes(heads: Heads, reach: int, _: torch.device) -> list[Tensor]:
        return plain if current_flash_attention_impl() is None else change(heads, reach, plain)

    monkeypatch.setattr(flash, "_passes", passes)


def kernels(monkeypatch: pytest.MonkeyPatch, forward: Any, backward: Any) -> None:
    """vLLM's module, which its CPU build has not."""
    names = ("vllm", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.cute", "vllm.vllm_flash_attn.cute.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].__dict__.update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


def test_the_fourth_serves_where_it_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    choose(HEADS, GPU)
    choose(OTHERS, GPU)
    assert current_flash_attention_impl() == FOURTH
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", [1.1, -1.0, 0.0, math.nan, math.inf])
def test_a_result_that_differs_leaves_the_second_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    as_fourth(monkeypatch, lambda _, __, plain: [*plain[:3], plain[3] * wrong])
    choose(HEADS, GPU)
    assert current_flash_attention_impl() is None
    assert "FlashAttention 2, for the fourth differs by" in (words := capsys.readouterr().err)
    assert "Heads(query=4, key=2, size=64" in words


def test_rounding_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    as_fourth(monkeypatch, lambda _, __, plain: [each * 1.005 for each in plain])
    choose(HEADS, GPU)
    assert current_flash_attention_impl() == FOURTH


def test_a_kernel_that_fails_leaves_the_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> list[Tensor]:
        raise AssertionError("head_dim 40 is not supported")

    as_fourth(monkeypatch, fails)
    choose(HEADS, GPU)
    assert current_flash_attention_impl() is None
    assert "the fourth fails (AssertionError: head_dim 40 is not supported)" in capsys.readouterr().err


def test_one_model_of_a_process_that_it_cannot_serve_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Implementations are of a process: the policy's may be right and the reward model's wrong."""
    as_fourth(monkeypatch, lambda heads, _, plain: plain if heads == HEADS else [math.pi * each for each in plain])
    choose(HEADS, GPU)
    assert current_flash_attention_impl() == FOURTH
    choose(OTHERS, GPU)
    assert current_flash_attention_impl() is None
    for heads in (HEADS, OTHERS, Heads(2, 2, 64, windows=False)):
        choose(heads, GPU)
        assert current_flash_attention_impl() is None


def test_windows_are_tried_where_a_layer_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    as_fourth(monkeypatch, lambda _, reach, plain: plain if reach == -1 else [each * 2 for each in plain])
    choose(HEADS, GPU)
    assert current_flash_attention_impl() == FOURTH
    choose(OTHERS, GPU)
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (12, 0)])
def test_other_gpus_keep_the_second_untried(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(flash, "_passes", lambda *_: pytest.fail("tried"))
    choose(HEADS, GPU)
    choose(HEADS, torch.device("cpu"))
    choose(None, GPU)
    assert current_flash_attention_impl() is None


def test_torch_is_given_two_of_what_vllm_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 takes a pair, and vLLM 0.32 returns four."""
    told: dict[str, Any] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
        told.update(options)
        return q + 1, torch.zeros(q.shape[1], len(q)), None, None

    kernels(monkeypatch, forward, lambda q, k, v, *_, **__: (q, k, v))
    from torch.nn.attention import _fa4

    choose(HEADS, GPU)
    q, borders = torch.ones(6, 4, 64), torch.tensor([0, 6], dtype=torch.int32)
    out, lse = _fa4._fa4_run_forward(q, q, q, borders, borders, 6, 6, 0.5, True, -1, 0, None)
    assert torch.equal(out, q + 1) and lse.shape == (4, 6)
    assert (told["causal"], told["softmax_scale"], told["window_size_left"]) == (True, 0.5, None)
    slopes = _fa4._fa4_run_backward(out, q, q, q, out, lse, borders, borders, 0.5, True, -1, 0)
    assert [torch.equal(each, q) for each in slopes] == [True] * 3


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (Qwen3Config(num_attention_heads=16, num_key_value_heads=8, head_dim=128), Heads(16, 8, 128, windows=False)),
        (LlamaConfig(hidden_size=96, num_attention_heads=6), Heads(6, 6, 16, windows=False)),
        (OPTConfig(hidden_size=64, num_attention_heads=4), Heads(4, 4, 16, windows=False)),
        (MambaConfig(), None),
    ],
    ids=["qwen3", "llama", "opt", "mamba"],
)
def test_heads_by_a_model_s_configuration(config: PreTrainedConfig, heads: Heads | None) -> None:
    assert Heads.of(config) == heads
