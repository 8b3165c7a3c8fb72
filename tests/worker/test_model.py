"""The packed forward pass against transformers' own, one sequence at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hack.tiny_model import write
from rlhf_api.job import ModelSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import TrainSequence, empty_batch, pack
from rlhf_worker.model import PolicyModule, load_policy, logprobs_of
from rlhf_worker.pretrained import identity, load_config, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


def module(path: Path, temperature: float = 1.0, checkpointing: bool = False) -> PolicyModule:
    return load_policy(ModelSpec(path=str(path), dtype="float32"), temperature, gradient_checkpointing=checkpointing)


def sequence(length: int, prompt: int = 3) -> TrainSequence:
    ids = torch.randint(3, 70, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return TrainSequence(token_ids=ids, prompt_length=prompt, index=0, mask=[True] * (length - prompt), columns={})


def alone(lm: torch.nn.Module, item: TrainSequence, temperature: float) -> Tensor:
    ids = torch.tensor(item.token_ids)
    logits = lm(ids[None]).logits[0] / temperature
    made: Tensor = logits.log_softmax(-1)[item.prompt_length - 1 : -1].gather(1, ids[item.prompt_length :, None])[:, 0]
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_logprobs_and_gradients_equal_those_of_each_sequence_alone(tiny: Path, temperature: float, checkpointing: bool) -> None:
    sequences = [sequence(length) for length in (9, 9, 7, 12, 4)]
    ours = module(tiny, temperature, checkpointing)
    theirs = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager", dtype=torch.float32)
    (batch,) = pack(sequences, 1000)
    made = logprobs_of(ours, batch, CPU)
    wanted = torch.cat([alone(theirs, item, temperature) for item in sequences])
    torch.testing.assert_close(made, wanted, atol=2e-6, rtol=1e-5)
    torch.autograd.backward([made.sum(), wanted.sum()])
    for (name, p), (_, q) in zip(ours.lm.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_an_empty_batch_reaches_every_parameter_with_a_zero_gradient(tiny: Path) -> None:
    ours = module(tiny)
    torch.autograd.backward(logprobs_of(ours, empty_batch(), CPU).sum())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_tiny_model_is_small_and_its_tokenizer_exact(tiny: Path) -> None:
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 1_000_000
    tokenizer = load_tokenizer(ModelSpec(path=str(tiny)))
    assert tokenizer.decode(tokenizer("2 + 3 = five").input_ids) == "2 + 3 = five"


def test_a_missing_path_names_field_and_fix(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"spec\.model\.path: /nowhere/model: no such directory; mount the volume"):
        load_config(ModelSpec(path="/nowhere/model"))
    with pytest.raises(BadSpec, match=r"the directory has no config\.json"):
        load_config(ModelSpec(path=str(tmp_path)))


def test_a_broken_config_is_the_specs_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadSpec, match=r"spec\.model\.path"):
        load_config(ModelSpec(path=str(tmp_path)))


def test_identity_tells_models_apart(tiny: Path) -> None:
    spec = ModelSpec(path=str(tiny))
    config = load_config(spec)
    assert identity(spec, config) == identity(spec, config)
    other = load_config(spec)
    other.hidden_size = 128
    assert identity(spec, config) != identity(spec, other)
