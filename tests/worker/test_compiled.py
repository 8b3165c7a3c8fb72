"""What the trainer compiles is compiled once, whatever batches follow."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hack.tiny_model import LAYERS
from rlhf_api.job import TrainerSpec
from rlhf_worker.experience import TrainSequence, empty_batch, pack
from rlhf_worker.trainer import attention, compiled, head, rank
from rlhf_worker.trainer.model import compiles
from tests.worker import flash
from tests.worker.samples import a_sequence, evenly
from tests.worker.test_trainer import same, trainer, weights

# Tokens of each sequence of a batch. The first has as many as the model's hidden size; then one sequence alone, many,
# few tokens, and one token more than a power of two.
SERIES = [(40, 24), (11,), (33, 17, 9, 9, 5), (4, 2), (128, 1), (64, 64, 64, 37)]


def sequences(lengths: tuple[int, ...]) -> list[TrainSequence]:
    draw, made = random.Random(str(lengths)), []
    for index, length in enumerate(lengths):
        count = length - 1
        columns = {"rollout_logprobs": [-4.0] * count, "advantages": [1.0 - 2 * (index % 2)] * count}
        columns |= evenly(len(lengths), count, max(1, sum(lengths) - len(lengths)))
        tokens = [draw.randrange(3, 70) for _ in range(length)]
        made.append(
            a_sequence(tokens, 1, index, columns=columns)
        )
    return made


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs with their gradients, without the C++ compiler, which takes most of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    head._compiled.cache_clear()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    flash.install()
    monkeypatch.setattr(attention, "fused", lambda *_: True)


def normed(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """What a layer has between its products: roundings to bfloat16 in a row."""
    x = x + residual
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return torch.nn.functional.silu(weight * scaled.bfloat16()) * x


def test_compiled_kernels_round_where_the_uncompiled_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real backend, also in the graph that has a gradient."""
    torch.manual_seed(0)
    given = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16(), torch.randn(64, 96).bfloat16()
    wanted = normed(*given)
    assert torch.equal(compiled.compiled(normed)(*given), wanted)
    assert torch.equal(compiled.compiled(normed)(given[0].clone().requires_grad_(), *given[1:]), wanted)
    monkeypatch.setattr(compiled, "OPTIONS", {})
    torch._dynamo.reset()
    assert not torch.equal(compiled.compiled(normed)(*given), wanted), "this test can fail"


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def graphs_a_batch(made: Any, series: list[tuple[int, ...]]) -> list[int]:
    """How many graphs were made on the way, with each batch, in passes without a gradient and with one."""
    found = []
    for lengths in series:
        before, batches = graphs(), pack(sequences(lengths), 1000)
        made.logprobs("policy", batches)
        made.train("policy", [[*batches, empty_batch(sequences(lengths)[0].columns)]])
        found.append(graphs() - before)
    return found


@pytest.mark.parametrize(("dtype", "checkpointing"), [("bfloat16", True), ("float32", False)])
def test_no_batch_after_the_first_is_compiled(
    tiny: Path, tmp_path: Path, group: None, traced: None, kernel: None, dtype: str, checkpointing: bool
) -> None:  # fmt: skip
    options = {"compile": True, "gradientCheckpointing": checkpointing}
    made = trainer(tiny, tmp_path, dtype=dtype, options=options)
    first, *later = graphs_a_batch(made, SERIES)
    assert 0 < first <= 4, "layers share one graph with a gradient and one without; the head's sums and their slopes"
    assert later == [0] * len(later)


def test_layers_that_are_computed_anew_find_their_attention_where_it_is_kept(
    tiny: Path, tmp_path: Path, group: None, traced: None, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "keeps_attention", lambda *_: True)
    options = {"gradientCheckpointing": True}
    made, plain = (
        trainer(tiny, tmp_path, options=options | {"compile": each}) for each in (True, False)
    )
    batches, calls = pack(sequences(SERIES[0]), 1000), []
    for each in (made, plain):
        each.train("policy", [batches])
        with torch.profiler.profile() as profile:
            each.train("policy", [batches])
        calls.append(sum(event.name == "torch_attn::_varlen_attn" for event in profile.events()))
    assert calls == [LAYERS, 2 * LAYERS], "what is not compiled cannot keep it"
    same(({}, weights(plain)), ({}, weights(made)))


def test_attention_without_a_kernel_is_left_out_of_the_graphs(
    tiny: Path, tmp_path: Path, group: None, traced: None
) -> None:
    """Its code follows the lengths of a batch."""
    made = trainer(tiny, tmp_path, options={"compile": True})
    assert graphs_a_batch(made, SERIES[1:3])[1:] == [0]


def test_adapters_are_compiled_once_too(tiny: Path, tmp_path: Path, group: None, traced: None, kernel: None) -> None:
    made = trainer(tiny, tmp_path, options={"compile": True}, model={"lora": {}})
    assert graphs_a_batch(made, SERIES[:2])[1:] == [0]


def test_many_roles_share_the_limit_of_graphs(tiny: Path, tmp_path: Path, group: None, traced: None) -> None:
    """Beyond it torch would go on uncompiled, slowly and in silence."""
    made = trainer(tiny, tmp_path, options={"compile": True}, algorithm={"name": "ppo", "kl": {"coefficient": 0.1}})
    items = sequences((9, 12))
    made.logprobs("reference", pack(items, 100))
    made.values(pack(items, 100))
    made.logprobs("policy", pack(items, 100))
    before = graphs()
    made.logprobs("reference", pack(sequences((5, 6, 9)), 100))
    made.values(pack(sequences((5, 6, 9)), 100))
    assert graphs() == before
    assert not counters["recompile_limit"]


def test_a_layer_that_cannot_be_compiled_trains_uncompiled(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no compiler here")

    plain = trainer(tiny, tmp_path)
    plain.train("policy", [pack(sequences((9, 12)), 100)])
    torch._dynamo.reset()
    head._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    made = trainer(tiny, tmp_path, options={"compile": True})
    made.train("policy", [pack(sequences((9, 12)), 100)])
    same(({}, weights(plain)), ({}, weights(made)))
    head._compiled.cache_clear()


@pytest.mark.parametrize(
    ("given", "device", "wanted"),
    [(None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_layers_are_compiled_on_gpus_unless_the_spec_says_otherwise(
    given: bool | None, device: str, wanted: bool
) -> None:
    assert compiles(TrainerSpec(steps=1, compile=given), torch.device(device)) is wanted
