"""Mixture-of-experts models in the trainer: what their checkpoints hold, the forward pass, FSDP over more ranks than
experts, the way out.
"""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import pack
from rlhf_worker.trainer.model import policy_pass
from rlhf_worker.weights.layout import layout_of
from rlhf_worker.weights.plan import Extent, Move, View
from rlhf_worker.weights.recorder import _packed_away, _Parameter, _trouble
from tests.worker.moe import KINDS, write_moe
from tests.worker.ranks import over_ranks
from tests.worker.test_model import CPU, alone, module, sequence
from tests.worker.test_trainer import after, same, sequences, trainer, with_logprobs

RANKS = 3  # torch.chunk gives them 2, 2 and 0 of the experts
# of glm4_moe: a buffer, which steers the routing and is not trained
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module", params=list(KINDS))
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("glm4_moe"), "glm4_moe")


def written(path: Path, kind: str) -> Path:
    write_moe(path, kind)
    lm = AutoModelForCausalLM.from_pretrained(path)
    for name, buffer in lm.named_buffers():
        if name == BIAS:
            buffer.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    lm.save_pretrained(path)
    return path


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(path / "model.safetensors")
    return tensors


def test_the_layout_is_that_of_the_checkpoints_files(each: Path) -> None:
    """Name for name and tensor for tensor."""
    lm = AutoModelForCausalLM.from_pretrained(each)
    parts = {part.name: (name, part) for name, stretches in layout_of(lm).items() for part in stretches}
    files = checkpoint(each)
    assert parts.keys() == files.keys() - {BIAS} and len(parts) > len(list(lm.parameters()))
    for file, (name, part) in parts.items():
        taken = lm.get_parameter(name).detach().flatten()[part.start : part.start + part.shape.numel()].view(part.shape)
        assert torch.equal(taken, files[file]), file


def test_a_checkpoint_in_another_form_is_refused(tiny: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny)
    lm._weight_conversions = [WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", [Transpose(1, 2)])]
    with pytest.raises(BadSpec, match=r"spec\.model\.path: .*: the trainer computes with "
        r"model\.layers\.1\.mlp\.experts\.down_proj in another form"):
        layout_of(lm)


@pytest.mark.parametrize((
    "kernel", "trouble", "packed",
), [("TRITON", None, False), ("CPU", None, True), ("FLASHINFER_TRTLLM", "another form: "
    ".*moe_backend: triton", False)])
def test_experts_are_written_in_place_where_their_kernel_leaves_them_as_they_are(
    kernel: str, trouble: str | None, packed: bool,
) -> None:
    method = object.__new__(UnquantizedFusedMoEMethod)
    layer = SimpleNamespace(quant_method=method)
    torch.nn.Module.__init__(method)
    method.unquantized_backend = UnquantizedMoeBackend[kernel]
    weight, whole = torch.nn.Parameter(torch.zeros(2, 3)), View(0, (6,), (1,))
    found = _Parameter(
        "experts.w2_weight", weight, weight, [cast(Any, layer)],
        [Move("experts.0.down_proj.weight", whole, "experts.w2_weight", whole)],
    )
    assert re.search(trouble, _trouble(found) or "") if trouble else _trouble(found) is None
    assert _packed_away(found) is packed


@pytest.mark.parametrize("trainer", [{}, {"batching": "padded"}], ids=str)
def test_logprobs_and_gradients_equal_those_of_each_sequence_alone_expert_by_expert(
    each: Path, trainer: dict[str, Any],
) -> None:
    items = [sequence(length) for length in (9, 9, 7, 12, 4)]
    ours = module(each, **trainer)
    theirs = AutoModelForCausalLM.from_pretrained(
        each, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32,
    )
    made, wanted = policy_pass(ours, pack(items, 1000)[0], CPU)[0], torch.cat(
        [alone(theirs, item, 1.0) for item in items]
    )
    torch.testing.assert_close(made, wanted, atol=2e-6, rtol=1e-5)
    torch.autograd.backward([made.sum(), wanted.sum()])
    for (name, p), (_, q) in zip(ours.lm.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=2e-4, rtol=1e-4, msg=name)


Answer = tuple[
    tuple[dict[str, float], list[torch.Tensor]], dict[str, tuple[Extent, torch.Tensor]], dict[str, torch.Tensor]
]


def _rank(rank: int, world: int, tiny: str, root: str) -> Answer:
    made = trainer(Path(tiny), Path(root), rank=rank, world=world)
    before = {name: (part.extent, part.local.clone()) for name, part in made.source.held().items()}
    whole = {name: tensor.clone() for name, tensor in made.source}
    return after(made, [pack([item for item in sequences() if item.index % world == rank], 1000)]), before, whole


def test_ranks_change_nothing_and_hold_each_tensor_once(tiny: Path, tmp_path: Path, group: None) -> None:
    """One rank has no expert at all."""
    one = after(trainer(tiny, tmp_path), [pack(sequences(), 1000)])
    several: list[Answer] = over_ranks(RANKS, _rank, str(tiny), str(tmp_path))
    files = checkpoint(tiny)
    for trained, _, whole in several:
        same(one, trained)
        assert whole.keys() == files.keys() - {BIAS} and all(
            torch.equal(tensor, files[name]) for name, tensor in whole.items()
        )
    parameters = dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters())
    assert several[0][1].keys() == parameters.keys()
    for name, parameter in parameters.items():
        shares = sorted((held[name] for _, held, _ in several if held[name][1].numel()), key=lambda share: share[0])
        assert torch.equal(torch.cat([local for _, local in shares]), parameter.detach().flatten()), name
        assert [start for (start, _), _ in shares] == [0, *(stop for (_, stop), _ in shares[:-1])], name
    assert not any(".experts." in name and held[1].numel() for name, held in several[-1][1].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_exactly_one(tiny: Path, tmp_path: Path, group: None, dtype: str) -> None:
    made = trainer(
        tiny, tmp_path, dtype=dtype, algorithm={"kl": {"coefficient": 0.1}}, options={"gradientCheckpointing": True},
    )
    items = with_logprobs(made, with_logprobs(made, sequences(), "old_logprobs", "policy"), "ref_logprobs", "reference")
    metrics = made.train("policy", [pack(items, 1000)])
    assert metrics["kl"] == 0.0 and metrics["policy_kl"] == 0.0 and metrics["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_compiled_layers_train_the_same(tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_moe(tiny := tmp_path / "one-layer", num_hidden_layers=1)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    one, two = trainer(tiny, tmp_path), trainer(
        tiny, tmp_path, options={"compile": True, "gradientCheckpointing": True},
    )
    same(after(one, [pack(sequences(), 1000)]), after(two, [pack(sequences(), 1000)]))
    assert counters["frames"]["ok"] > 0


def test_the_export_is_the_checkpoint_again(each: Path, tmp_path: Path, group: None) -> None:
    files, exported = checkpoint(each), checkpoint(Path(trainer(each, tmp_path).export()))
    assert files.keys() == exported.keys() and all(
        torch.equal(tensor, exported[name]) for name, tensor in files.items()
    )


def test_the_ranks_own_generator_gets_all_weights_and_buffers(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, rollout={"engine": "hf", "maxTokens": 4})
    after(made, [pack(sequences(), 1000)])
    made.refresh()
    assert made.generator is not None
    theirs = made.generator.lm.state_dict()
    ours = {
        name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()
        for name, tensor in made.roles["policy"].module.lm.state_dict().items()
    }
    assert BIAS in ours and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert dist.get_world_size() == 1
