"""Adapters on trainer ranks, without engines: what is trained, the reference, checkpoints, and PEFT's format, read by
PEFT itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from rlhf_api.job import LoRASpec, PolicySpec, TrainerSpec
from rlhf_worker.engines.adapters import adapter_args
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import TrainSequence, pack
from rlhf_worker.lora import merged
from rlhf_worker.pretrained import identity, load_config
from rlhf_worker.trainer.model import load_policy
from rlhf_worker.trainer.rank import Trainer
from tests.worker.checkpoints import checkpoint
from tests.worker.configs import run_config
from tests.worker.ranks import over_ranks
from tests.worker.samples import a_sequence, evenly, listed

RANK_4 = {"rank": 4, "alpha": 8}


def trainer(
    tiny: Path, root: Path, rank: int = 0, world: int = 1, lora: dict[str, Any] | None = RANK_4, dtype: str = "float32",
    **changes: Any,
) -> Trainer:
    model = {"path": str(tiny), "dtype": dtype} | ({} if lora is None else {"lora": lora})
    given = {"steps": 4, "learningRate": 0.05, "gpus": world} | changes.pop("trainer", {})
    config = run_config(model=model, trainer=given, checkpoint={"path": str(root)}, **changes)
    made = Trainer(config, list(config.roles), rank, world, "cpu", 1)
    made.load()
    return made


def sequences() -> list[TrainSequence]:
    generator, lengths = torch.Generator().manual_seed(7), (6, 9, 9, 12)
    return [
        a_sequence(
            torch.randint(3, 70, (n,), generator=generator).tolist(), 3, index,
            columns={
                "rollout_logprobs": [-4.0] * (n - 3), "advantages": [(-1.0) ** index] * (n - 3),
                **evenly(4, n - 3, sum(lengths) - 12),
            },
        )
        for index, n in enumerate(lengths)
    ]  # fmt: skip


def step(made: Trainer) -> dict[str, float]:
    own = [item for item in sequences() if item.index % made.world == made.rank]
    return made.train("policy", [pack(own, 1000)])


def weights(made: Trainer) -> dict[str, Tensor]:
    module = made._use("policy").module
    module.reshard()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def logprobs(made: Trainer, role: str = "policy") -> dict[int, list[float]]:
    return listed(made.logprobs(role, pack(sequences(), 1000)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"offload": True, "gradientCheckpointing": False}], ids=str)
def test_only_adapters_are_trained_and_the_reference_is_the_policy_without_them(
    tiny: Path, tmp_path: Path, group: None, dtype: str, options: dict[str, Any],
) -> None:
    made = trainer(tiny, tmp_path, dtype=dtype, trainer=options, algorithm={"kl": {"coefficient": 0.1}})
    assert list(made.roles) == ["policy"]
    before, first = weights(made), logprobs(made)
    assert first == logprobs(trainer(tiny, tmp_path, lora=None, dtype=dtype))
    for _ in range(2):
        step(made)
    after = weights(made)
    for name, tensor in before.items():
        assert tensor.dtype == (torch.float32 if ".lora_" in name else getattr(torch, dtype)), name
        assert torch.equal(tensor, after[name]) == (".lora_" not in name), name
    assert logprobs(made, "reference") == first != logprobs(made)


def test_the_critic_is_trained_whole(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, algorithm={"name": "ppo", "kl": {"coefficient": 0.1}})
    assert list(made.roles) == ["policy", "critic"]
    assert all(p.requires_grad and ".lora_" not in name for name, p in made.roles["critic"].module.named_parameters())


def _two_and_two(rank: int, world: int, tiny: str, root: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Weights before training; and after four steps, whether in one run or in two with a checkpoint between them."""
    through = trainer(Path(tiny), Path(root) / "through", rank, world)
    before = weights(through)
    for _ in range(2):
        step(through)
    through.save(2, {}, {})
    assert not [outcome.error for outcome in through.saved(wait=True) if outcome.error]
    resumed = trainer(Path(tiny), Path(root) / "through", rank, world)
    assert resumed.restore().state is not None and resumed.version == 2
    for made in (through, resumed):
        for _ in range(2):
            step(made)
    return before, [weights(through), weights(resumed)]


def test_ranks_begin_alike_and_a_resumed_run_takes_the_same_steps_bit_for_bit(
    tiny: Path, tmp_path: Path, group: None,
) -> None:
    found = over_ranks(2, _two_and_two, str(tiny), str(tmp_path / "two"))
    alone, ended = _two_and_two(0, 1, str(tiny), str(tmp_path / "one"))
    for before, after in found:
        assert all(torch.equal(tensor, alone[name]) for name, tensor in before.items())
        assert all(torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())
        for name, tensor in ended[0].items():
            torch.testing.assert_close(after[0][name], tensor, atol=2e-3, rtol=1e-2, msg=name)
    saved = FileSystemReader(checkpoint(tmp_path / "one/through", 2) / "policy").read_metadata().state_dict_metadata
    tensors = [name for name, one in saved.items() if isinstance(one, TensorStorageMetadata)]
    assert tensors and all(".lora_" in name for name in tensors)


@pytest.mark.parametrize(
    "other", [None, {"rank": 8, "alpha": 8}, {"rank": 4, "alpha": 4}, RANK_4 | {"targetModules": ["q_proj"]}], ids=str,
)
def test_a_checkpoint_of_other_adapters_is_refused_by_name(
    tiny: Path, tmp_path: Path, group: None, other: dict[str, Any] | None,
) -> None:
    made = trainer(tiny, tmp_path)
    made.save(1, {}, {})
    made.saved(wait=True)
    with pytest.raises(BadData, match=r"is of another model \(lora \{'rank': 4, 'alpha': 8\.0\} there, .* here\): set "
        r"spec\.checkpoint\.path"):
        trainer(tiny, tmp_path, lora=other).restore()


def whole_logprobs(lm: torch.nn.Module) -> dict[int, list[float]]:
    found = {}
    for item in sequences():
        ids = torch.tensor([item.token_ids])
        found[item.index] = lm(ids).logits[0, 2:-1].log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0].tolist()
    return found


def same(one: dict[int, list[float]], two: dict[int, list[float]]) -> bool:
    return all(one[index] == pytest.approx(two[index], abs=1e-4) for index in one)


def test_peft_reads_what_is_exported(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path)
    step(made)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert not same(whole_logprobs(base), logprobs(made))
    lm = PeftModel.from_pretrained(base, made.export())
    assert lm.peft_config["default"].base_model_name_or_path == str(tiny)
    assert same(whole_logprobs(lm), logprobs(made))
    assert {file.name for file in (tmp_path / "export").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    }


def test_transformers_generates_with_the_adapters_merged(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, rollout={"engine": "hf", "maxTokens": 4})
    step(made)
    assert made.refresh() == 1 and made.generator is not None
    with torch.no_grad():
        assert same(whole_logprobs(made.generator.lm), logprobs(made))
    assert {file.name for file in Path(made.export()).iterdir()} >= {"adapter_config.json"}


def test_merging_keeps_names_biases_and_types() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    given = {
        "x.q.base_layer.weight": torch.eye(2).bfloat16(), "x.q.base_layer.bias": torch.ones(2),
        "x.q.lora_A.default.weight": a, "x.q.lora_B.default.weight": b, "n": a,
    }
    made = merged(given, LoRASpec(rank=1, alpha=2))
    assert made.keys() == {"x.q.weight", "x.q.bias", "n"}
    assert torch.equal(made["x.q.weight"], torch.tensor([[7.0, 12.0], [0.0, 1.0]]).bfloat16())
    assert merged({"x.q.weight": a}, None) == {"x.q.weight": a}


def test_only_named_layers_get_adapters_and_a_name_that_is_none_is_told(tiny: Path) -> None:
    module = load_policy(
        PolicySpec(path=str(tiny), lora=LoRASpec(rank=2, target_modules=("q_proj", "down_proj"))), 1.0,
        TrainerSpec(steps=1),
    )
    assert {name.split(".")[-4] for name, p in module.named_parameters() if p.requires_grad} == {"q_proj", "down_proj"}
    with pytest.raises(BadSpec, match=r"spec\.model\.lora\.targetModules: the decoder of .* has no linear layers qkv; "
        r"it has down_proj, gate_proj, k_proj, o_proj, q_proj"):
        load_policy(
            PolicySpec(path=str(tiny), lora=LoRASpec(target_modules=("q_proj", "qkv"))), 1.0, TrainerSpec(steps=1),
        )


def test_adapters_are_a_part_of_a_models_identity(tiny: Path) -> None:
    config = load_config(PolicySpec(path=str(tiny)))
    seen = [
        identity(PolicySpec(path=str(tiny), lora=lora), config)["lora"]
        for lora in (None, LoRASpec(), LoRASpec(rank=2), LoRASpec(alpha=2))
    ]
    assert len({str(one) for one in seen}) == 4


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("rank", "staleness", "most", "slots"), [(1, 0, 1, 2), (9, 1, 16, 2), (300, 3, 320, 4), (512, 0, 512, 2)],
)
def test_an_engine_has_room_for_the_rank_and_for_the_versions_in_use(
    tiny: Path, rank: int, staleness: int, most: int, slots: int,
) -> None:
    model = {"path": str(tiny), "lora": {"rank": rank, "targetModules": ["o_proj"]}}
    args = adapter_args(run_config(model=model, rollout={"staleness": staleness}, placement={"mode": "Separated"}))
    assert args == {
        "enable_lora": True, "max_lora_rank": most, "max_loras": slots, "max_cpu_loras": slots,
        "lora_target_modules": ["o_proj"],
    }


def test_an_engine_without_adapters_has_no_arguments_for_them() -> None:
    assert adapter_args(run_config()) == {}
