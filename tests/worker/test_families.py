"""Every text family that vLLM serves and transformers has: a batch, as the trainer lays it out, is each sequence alone."""

import re
from pathlib import Path

import pytest
import torch

from rlhf_api.job import TrainerSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import TrainSequence, pack
from rlhf_worker.trainer.model import PolicyModule, attentions, policy_pass, wrap_layers
from rlhf_worker.trainer.selftest import choose
from tests.worker.families import served, tiny
from tests.worker.test_model import CPU, sequence

TRAINER = TrainerSpec(steps=1)
LENGTHS = (11, 24, 24, 5)
DOCS = (Path(__file__).parents[2] / "docs/roles.md").read_text()


def documented(verb: str) -> set[str]:
    lists = re.findall(rf"^- {verb}, because[^:]*:((?:\s+`[\w-]+`[,.])+)", DOCS, re.MULTILINE)
    return {name for part in lists for name in re.findall(r"`([\w-]+)`", part)}


def ready(kind: str, **changes: object) -> tuple[PolicyModule, str]:
    module = PolicyModule(tiny(kind, **changes), 0.7)
    try:
        assert len(module.layers)
        padded = choose(module, attentions(module, TRAINER), "float32", CPU, lambda apart: apart, kind).padded
    except BadSpec:
        return module, "refused"
    return module, "padded" if padded else "packed"


def alone(module: PolicyModule, items: list[TrainSequence]) -> torch.Tensor:
    attention = module.attention
    module.attend("eager")
    rows = [module.alone(torch.tensor(item.token_ids))[item.prompt_length - 1 :] for item in items]
    module.attend(attention)
    return torch.cat(rows)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # products as small as these take longer on several


@pytest.mark.parametrize("kind", served())
def test_a_batch_is_each_sequence_alone(kind: str) -> None:
    module, outcome = ready(kind)
    assert outcome == ("padded" if kind in documented("Padded") else "refused" if kind in documented("Refused") else "packed")
    if outcome != "refused":
        items = [sequence(length) for length in LENGTHS]
        (batch,) = pack(items, 1000)
        with torch.no_grad():
            torch.testing.assert_close(policy_pass(module, batch, CPU)[0], alone(module, items), atol=1e-4, rtol=1e-4)


def test_the_docs_name_families_that_there_are() -> None:
    assert documented("Padded") and documented("Refused")
    assert documented("Padded") | documented("Refused") <= set(served())


# Shared keys and values, sinks and windows, soft caps, a recurrent state, experts, layers with dropout of their own.
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "gpt_oss", "gemma2", "qwen3_next", "jamba", "opt", "falcon", "llama4_text"])
def test_checkpointed_layers_have_the_gradients_of_each_sequence_alone(kind: str) -> None:
    dropout = {"opt": {"dropout": 0.5}, "falcon": {"hidden_dropout": 0.5}}.get(kind, {})
    module, _ = ready(kind, **dropout)
    items = [sequence(length) for length in (11, 14)]
    torch.autograd.backward(alone(module, items).sum())
    wanted = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    wrap_layers(module, TRAINER)
    (batch,) = pack(items, 1000)
    torch.autograd.backward(policy_pass(module, batch, CPU)[0].sum())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-3, rtol=1e-3, msg=name)
