"""Log probabilities and entropies by chunks against the plain formula, gradients included."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlhf_worker.trainer import compiled, head
from rlhf_worker.trainer.head import Change, Head, change_of, logprobs_of, wide_linear

ROWS, SIZE, VOCABULARY = 23, 16, 50
PLAIN = Change(1.0, None, 1.0)
CHANGES = [PLAIN, Change(0.25, None, 0.7), Change(2.0, 3.0, 0.7)]


def wanted(logits: Tensor, change: Change, targets: Tensor, support: Tensor | None) -> Tensor:
    """(2, N), by torch's own functions, from all logits at once."""
    logits = logits * change.scale
    logits = logits if change.cap is None else change.cap * torch.tanh(logits / change.cap)
    logits = logits / change.temperature
    if support is not None:
        absent = torch.full_like(logits, -1e30)
        there = torch.zeros_like(logits, dtype=torch.bool)
        for row, tokens in enumerate(support.tolist()):
            there[row, [token for token in tokens if token >= 0]] = True
        logits = torch.where(there, logits, absent)
    entropy = torch.distributions.Categorical(logits=logits).entropy()  # type: ignore[no-untyped-call]
    return torch.stack([logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], entropy])


def batch(dtype: torch.dtype, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, hidden states, targets, and the sets that they were drawn from."""
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, VOCABULARY, bias=bias).to(dtype)
    hidden = (3 * torch.randn(ROWS, SIZE)).to(dtype).requires_grad_()
    support = torch.rand(ROWS, VOCABULARY).argsort(1)[:, :6]
    targets = support[:, 0].clone()
    support[::3, 4:] = -1
    return layer, hidden, targets, support


def gradients(made: Tensor, entropy_gradient: bool, *of: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1))
    weights[1] *= entropy_gradient
    return torch.autograd.grad((made * weights).sum(), of)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * VOCABULARY * 7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("drawn_from", ["all", "support"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_values_and_gradients_are_those_of_the_plain_formula(
    change: Change, drawn_from: str, entropy_gradient: bool, fused: bool, small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    head._compiled.cache_clear()
    layer, hidden, targets, support = batch(torch.float32, bias=True)
    sets = None if drawn_from == "all" else support
    found = logprobs_of(
        Head(layer, change, VOCABULARY, fused), hidden, targets, sets, entropy_gradient=entropy_gradient
    )
    right = wanted(layer(hidden), change, targets, sets)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    for made, true in zip(
        gradients(found, entropy_gradient, hidden, *layer.parameters()),
        gradients(right, entropy_gradient, hidden, *layer.parameters()), strict=True,
    ):
        torch.testing.assert_close(made, true, atol=2e-5, rtol=1e-4)
    head._compiled.cache_clear()


def test_a_head_that_is_no_linear_layer_goes_by_autograd(small_chunks: None) -> None:
    layer, hidden, targets, _ = batch(torch.float32)
    other = nn.Sequential(layer, nn.Identity())
    found = logprobs_of(Head(other, CHANGES[1], VOCABULARY, False), hidden, targets, entropy_gradient=True)
    right = wanted(layer(hidden), CHANGES[1], targets, None)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    parts = hidden, layer.weight
    for made, true in zip(gradients(found, True, *parts), gradients(right, True, *parts), strict=True):
        torch.testing.assert_close(made, true, atol=1e-5, rtol=1e-4)


def test_a_head_in_a_lower_type_keeps_its_sums_in_float32(small_chunks: None) -> None:
    """Rounded to bfloat16 they were the larger part of what engine and trainer differ by."""
    layer, hidden, targets, _ = batch(torch.bfloat16, bias=True)
    exact = torch.nn.functional.linear(hidden.double(), layer.weight.double(), layer.bias.double())
    found = wide_linear(hidden, layer.weight, layer.bias)
    assert found.dtype is torch.float32
    assert (found - exact).abs().max() < 1e-5 < 1e-3 < (layer(hidden) - exact).abs().max()
    values = logprobs_of(Head(layer, PLAIN, VOCABULARY, False), hidden, targets, entropy_gradient=True)
    right = wanted(exact, PLAIN, targets, None)
    torch.testing.assert_close(values.double(), right, atol=1e-5, rtol=1e-5)
    parts = hidden, *layer.parameters()
    for made, true in zip(gradients(values, True, *parts), gradients(right, True, *parts), strict=True):
        assert made.dtype is torch.bfloat16
        torch.testing.assert_close(made, true.to(made.dtype), rtol=0.02, atol=0.02 * true.abs().max().item())


def test_a_frozen_head_has_no_gradient() -> None:
    layer, hidden, targets, _ = batch(torch.bfloat16)
    layer.requires_grad_(False)
    torch.autograd.backward(
        logprobs_of(Head(layer, PLAIN, VOCABULARY, False), hidden, targets, entropy_gradient=False).sum()
    )
    assert hidden.grad is not None
    assert layer.weight.grad is None


def test_chunks_are_even_and_cover_all_rows(small_chunks: None) -> None:
    for rows in range(1, 100):
        found = head._chunks(rows, VOCABULARY)
        lengths = [part.stop - part.start for part in found]
        assert [i for part in found for i in range(part.start, part.stop)] == [*range(rows)]
        assert max(lengths) <= 7 and max(lengths) - min(lengths) <= 1


def test_what_models_do_to_their_logits_is_read_from_their_config() -> None:
    given = PreTrainedConfig(logits_scaling=4.0, lm_head_multiplier=0.5, final_logit_softcapping=30.0, logit_scale=None)
    assert change_of(given, 0.9) == Change(0.125, 30.0, 0.9)
    assert change_of(PreTrainedConfig(), 1.0) == PLAIN


def test_sizes_that_are_alike_by_chance_in_the_first_batch_may_differ_later(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor], **__: Any) -> Any:
        made.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    fast = compiled.compiled(lambda x, y: (x * 2).sum() + y.sum())
    for rows, columns in ((8, 8), (8, 9), (13, 8), (5, 40)):
        fast(torch.ones(rows, 3), torch.ones(columns))
    assert len(made) == 1
