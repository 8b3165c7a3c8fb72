"""The packed forward pass against transformers' own, one sequence at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Qwen3NextConfig

from rlhf_api.job import ModelSpec, PolicySpec, TrainerSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import TrainSequence, empty_batch, pack
from rlhf_worker.pretrained import identity, load_config, load_tokenizer
from rlhf_worker.trainer.model import (
    PolicyModule,
    load_critic,
    load_policy,
    load_reward,
    policy_pass,
    scores_of,
    values_of,
    wrap_layers,
)
from tests.worker.rewards import write_reward
from tests.worker.samples import a_sequence

CPU = torch.device("cpu")


def spec_of(path: Path) -> ModelSpec:
    return ModelSpec(path=str(path), dtype="float32")


def module(path: Path, temperature: float = 1.0, **trainer: Any) -> PolicyModule:
    spec = TrainerSpec.model_validate({"steps": 1, **trainer})
    loaded = load_policy(spec_of(path), temperature, spec)
    wrap_layers(loaded, spec, attention=False)
    return loaded


def sequence(length: int, prompt: int = 3, index: int = 0) -> TrainSequence:
    ids = torch.randint(3, 70, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return a_sequence(ids, prompt, index)


def alone(lm: torch.nn.Module, item: TrainSequence, temperature: float) -> Tensor:
    ids = torch.tensor(item.token_ids)
    logits = lm(ids[None]).logits[0] / temperature
    made: Tensor = logits.log_softmax(-1)[item.prompt_length - 1 : -1].gather(1, ids[item.prompt_length :, None])[:, 0]
    return made


def entropies(lm: torch.nn.Module, item: TrainSequence, temperature: float) -> Tensor:
    logits = lm(torch.tensor(item.token_ids)[None]).logits[0, item.prompt_length - 1 : -1] / temperature
    made: Tensor = torch.distributions.Categorical(logits=logits).entropy().detach()  # type: ignore[no-untyped-call]
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trainer", [{"gradientCheckpointing": False}, {}, {"batching": "padded"}], ids=str)
def test_logprobs_and_gradients_equal_those_of_each_sequence_alone(
    tiny: Path, temperature: float, trainer: dict[str, Any],
) -> None:
    sequences = [sequence(length) for length in (9, 9, 7, 12, 4)]
    ours = module(tiny, temperature, **trainer)
    theirs = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager", dtype=torch.float32)
    (batch,) = pack(sequences, 1000)
    made, entropy = policy_pass(ours, batch, CPU)
    wanted = torch.cat([alone(theirs, item, temperature) for item in sequences])
    torch.testing.assert_close(made, wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        entropy, torch.cat([entropies(theirs, item, temperature) for item in sequences]), atol=1e-5, rtol=1e-5
    )
    torch.autograd.backward([made.sum(), wanted.sum()])
    for (name, p), (_, q) in zip(ours.lm.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_an_empty_batch_reaches_every_parameter_with_a_zero_gradient(tiny: Path) -> None:
    ours = module(tiny)
    torch.autograd.backward(policy_pass(ours, empty_batch(), CPU).sum())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_values_begin_at_zero_and_belong_to_the_token_before_each_target(tiny: Path, batching: str) -> None:
    trainer = TrainerSpec.model_validate({"steps": 1, "batching": batching})
    critic = load_critic(spec_of(tiny), trainer, "spec.critic.model.path")
    items = [sequence(length) for length in (9, 7, 12)]
    (batch,) = pack(items, 1000)
    assert not values_of(critic, batch, CPU).any()
    torch.nn.init.normal_(critic.head.weight)
    base = AutoModel.from_pretrained(tiny, attn_implementation="eager", dtype=torch.float32)
    hidden = [base(torch.tensor(s.token_ids)[None]).last_hidden_state[0, s.prompt_length - 1 : -1] for s in items]
    torch.testing.assert_close(
        values_of(critic, batch, CPU), critic.head(torch.cat(hidden))[:, 0], atol=1e-5, rtol=1e-5,
    )


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_scores_are_those_of_the_plain_call(tiny: Path, tmp_path: Path, batching: str) -> None:
    plain = write_reward(tiny, tmp_path)
    items = [sequence(length) for length in (9, 7, 12, 9)]
    reward = load_reward(
        spec_of(tmp_path), TrainerSpec.model_validate({"steps": 1, "batching": batching}), "spec.rewards[r].model.path",
    )
    (batch,) = pack(items, 1000)
    wanted = torch.stack([plain(torch.tensor(s.token_ids)[None]).logits[0, 0] for s in items])
    torch.testing.assert_close(scores_of(reward, batch, CPU), wanted, atol=1e-6, rtol=1e-5)


def test_a_model_without_a_score_head_is_no_reward_model(tiny: Path, tmp_path: Path) -> None:
    trainer = TrainerSpec(steps=1)
    with pytest.raises(BadSpec, match=r"rewards\[r\]\.model\.path: .*: the checkpoint lacks 1 weights of "
        r"LlamaForSequenceClassification, such as score.weight"):
        load_reward(spec_of(tiny), trainer, "spec.rewards[r].model.path")
    write_reward(tiny, tmp_path, labels=2)
    with pytest.raises(BadSpec, match=r"one label \(num_labels: 1 in its config\)"):
        load_reward(spec_of(tmp_path), trainer, "spec.rewards[r].model.path")


def test_what_cannot_be_spread_over_ranks_is_refused_before_it_is_loaded(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"spec\.trainer\.contextParallel is 3, but .* has 4 attention heads: use a "
        r"divisor of that"):
        module(tiny, gpus=3, contextParallel=3)
    Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(
        BadSpec, match=r"has layers of linear_attention, which cannot be spread over ranks: set it to 1",
    ):
        module(tmp_path, gpus=2, contextParallel=2)


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
    spec = PolicySpec(path=str(tiny))
    config = load_config(spec)
    assert identity(spec, config) == identity(spec, config)
    other = load_config(spec)
    other.hidden_size = 128
    assert identity(spec, config) != identity(spec, other)
