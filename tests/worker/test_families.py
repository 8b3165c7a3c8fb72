"""Every text family that vLLM serves and transformers has: a batch, as the trainer has it, is each sequence alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hack.tiny_model import CHARACTERS, SPECIAL, write
from rlhf_api.job import TrainerSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import TrainSequence, pack
from rlhf_worker.trainer.context import check_rope, packable
from rlhf_worker.trainer.head import SCALES
from rlhf_worker.trainer.model import PolicyModule, attentions, policy_pass, wrap_layers
from rlhf_worker.trainer.selftest import choose
from tests.worker.families import config_of, served, tiny
from tests.worker.ranks import over_ranks
from tests.worker.rewards import write_reward
from tests.worker.samples import listed
from tests.worker.test_model import CPU, alone, sequence
from tests.worker.test_trainer import trainer

TRAINER = TrainerSpec(steps=1)
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LENGTHS = (11, 24, 24, 5)
DOCS = (Path(__file__).parents[2] / "docs/roles.md").read_text()


def documented(verb: str) -> set[str]:
    lists = re.findall(rf"^- {verb}, because[^:]*:((?:\s+`[\w-]+`[,.])+)", DOCS, re.MULTILINE)
    return {name for part in lists for name in re.findall(r"`([\w-]+)`", part)}


def ready(kind: str, **changes: Any) -> tuple[PolicyModule, str]:
    module = PolicyModule(tiny(kind, **changes), 0.7)
    try:
        assert len(module.layers)
        padded = choose(module, attentions(module, TRAINER), "float32", CPU, lambda apart: apart, kind).padded
    except BadSpec as error:
        return module, f"refused: {error}"
    return module, "padded" if padded else "packed"


def each_alone(module: PolicyModule, items: list[TrainSequence]) -> torch.Tensor:
    """By transformers' own forward pass and plainest attention."""
    attention = module.attention
    module.attend("eager")
    rows = [alone(module.lm, item, module.temperature) for item in items]
    module.attend(attention)
    return torch.cat(rows)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # products as small as these take longer on several


@pytest.mark.parametrize("kind", served())
def test_a_batch_is_each_sequence_alone(kind: str) -> None:
    module, outcome = ready(kind)
    assert outcome.split(":")[0] == (
        "padded" if kind in documented("Padded") else "refused" if kind in documented("Refused") else "packed"
    )
    if not outcome.startswith("refused"):
        items = [sequence(length) for length in LENGTHS]
        (batch,) = pack(items, 1000)
        with torch.no_grad():
            torch.testing.assert_close(
                policy_pass(module, batch, CPU)[0], each_alone(module, items), atol=1e-4, rtol=1e-4
            )


def test_the_docs_name_families_that_there_are() -> None:
    assert documented("Padded") and documented("Refused")
    assert documented("Padded") | documented("Refused") <= set(served())


# Shared keys and values, sinks and windows, soft caps, a recurrent state, experts, layers with dropout of their own.
@pytest.mark.parametrize(
    "kind", ["gemma3n_text", "gemma4_text", "gpt_oss", "gemma2", "qwen3_next", "jamba", "opt", "falcon", "llama4_text"]
)
def test_checkpointed_layers_have_the_gradients_of_each_sequence_alone(kind: str) -> None:
    dropout = {"opt": {"dropout": 0.5}, "falcon": {"hidden_dropout": 0.5}}.get(kind, {})
    module, _ = ready(kind, **dropout)
    items = [sequence(length) for length in (11, 14)]
    torch.autograd.backward(each_alone(module, items).sum())
    wanted = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    wrap_layers(module, TRAINER, attention=False)
    (batch,) = pack(items, 1000)
    torch.autograd.backward(policy_pass(module, batch, CPU)[0].sum())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-3, rtol=1e-3, msg=name)


def test_what_differs_padded_too_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model would be whose head does to its logits what the trainer has not heard of."""
    monkeypatch.delitem(SCALES, "logit_scale")
    _, outcome = ready("cohere")
    differs = r"differ from each sequence alone by \d[^,]*, "
    assert re.match(rf"refused: cohere: packed .* {differs}padded \(sdpa\) .* {differs}.*wrong numbers", outcome)


def test_a_self_test_leaves_nothing_behind() -> None:
    module = PolicyModule(tiny("gemma3_text"), 1.0).eval()
    before, noise = (
        {name: tensor.clone() for name, tensor in module.state_dict(keep_vars=True).items()},
        torch.get_rng_state(),
    )
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    choose(module, attentions(module, TRAINER), "float32", CPU, lambda apart: apart, "gemma3_text")
    assert torch.equal(torch.get_rng_state(), noise) and not any(part.training for part in module.modules())
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, module.get_buffer(name)) for name, tensor in buffers.items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(("rope", "longest", "refused"), [
    ({"rope_type": "default"}, 1000, False),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64, False),
    ({"rope_type": "dynamic", "factor": 2.0}, 64, False), ({"rope_type": "dynamic", "factor": 2.0}, 65, True),
    ({"rope_type": "longrope", "original_max_position_embeddings": 16, **FACTORS}, 17, True),
])  # fmt: skip
def test_positions_that_turn_by_the_longest_of_a_batch_are_refused(
    rope: dict[str, Any], longest: int, refused: bool
) -> None:
    config = config_of("llama", rope_parameters={"rope_theta": 1e4, **rope})
    if refused:
        with pytest.raises(
            BadSpec, match=rf"spec\.model\.path: .*rope_type {rope['rope_type']} .* which add up to {longest}"
        ):
            check_rope(config, longest, "spec.model.path")
    else:
        check_rope(config, longest, "spec.model.path")


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("qwen3", True),
        ("gemma3_text", True),
        ("lfm2", True),
        ("mamba", True),
        ("llama4_text", False),
        ("deepseek_v32", False),
    ],
)
def test_attentions_that_differ_in_long_sequences_only_are_not_tried_packed(kind: str, allowed: bool) -> None:
    assert packable(config_of(kind)) is allowed


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    write(path)
    tiny("qwen3_next", vocab_size=len(SPECIAL) + len(CHARACTERS)).save_pretrained(path)
    return path


def _loaded(
    rank: int, world: int, path: Path, root: Path, changes: dict[str, Any]
) -> tuple[dict[str, tuple[bool, str]], dict[int, list[float]]]:
    ran = trainer(
        path, root, rank=rank, world=world, dtype=changes.pop("dtype", "float32"), options={"gpus": world}, **changes
    )
    batchings = ran.load()
    items = [sequence(length, index=index) for index, length in enumerate((11, 24, 7, 16))]
    own = pack([item for item in items if item.index % world == rank], 1000)
    return {name: (batching.padded, batching.words) for name, batching in batchings.items()}, listed(
        ran.logprobs("policy", own)
    )


def test_every_role_of_every_rank_is_tried_as_it_will_run(hybrid: Path, tiny: Path, tmp_path: Path) -> None:
    """A hybrid policy, its reference, a critic, a reward model of another kind, which stay packed; on two ranks."""
    write_reward(tiny, tmp_path / "reward")
    changes = {
        "algorithm": {"name": "ppo", "kl": {"coefficient": 0.1}},
        "critic": {"model": {"path": str(tiny), "dtype": "float32"}},
        "rewards": [{"name": "r", "type": "model", "model": {"path": str(tmp_path / "reward"), "dtype": "float32"}}],
    }  # fmt: skip
    (one, whole), *_ = over_ranks(1, _loaded, hybrid, tmp_path, changes)
    ranks = over_ranks(2, _loaded, hybrid, tmp_path, changes)
    assert {name: padded for name, (padded, _) in one.items()} == {
        "policy": True,
        "critic": False,
        "reference": True,
        "reward:r": False,
    }
    assert re.search(
        r"spec\.model\.path: .* \(qwen3_next\): packed batches .* alone by \d[^,]*, padded \(sdpa\) batches .* by \d",
        one["policy"][1],
    )
    assert ranks[0][0] == ranks[1][0] and {name: padded for name, (padded, _) in ranks[0][0].items()} == {
        name: padded for name, (padded, _) in one.items()
    }
    for index, row in (ranks[0][1] | ranks[1][1]).items():
        assert row == pytest.approx(whole[index], abs=1e-4)
