"""Trainer ranks on gloo, without Ray: gradients whatever packing, padding and ranks, the roles, offload, and a loss
that is not finite.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LinearLR, SequentialLR
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from rlhf_worker.algorithm.shape import shape
from rlhf_worker.errors import BadSpec, Diverged, RewardFailed
from rlhf_worker.experience import PackedBatch, TrainSequence, add_column, empty_batch, mini_batches, pack
from rlhf_worker.trainer import flash
from rlhf_worker.trainer.flash import Heads
from rlhf_worker.trainer.rank import Trainer
from rlhf_worker.trainer.roles import decayed
from rlhf_worker.weights import mapped
from rlhf_worker.weights.plan import Extent
from tests.worker.configs import run_config
from tests.worker.ranks import over_ranks
from tests.worker.rewards import write_reward
from tests.worker.samples import a_sequence, by_token, dealt, evenly, listed


def trainer(
    tiny: Path, root: Path, *, rank: int = 0, world: int = 1, dtype: str = "float32",
    options: dict[str, Any] | None = None, **changes: Any,
) -> Trainer:
    # An epsilon far above what the order of a sum changes, which Adam's first update would make as large as the rate.
    given = {"steps": 1, "learningRate": 0.01, "adamEpsilon": 1e-5, "gradientCheckpointing": False} | (options or {})
    config = run_config(
        model={"path": str(tiny), "dtype": dtype} | changes.pop("model", {}), trainer=given,
        checkpoint={"path": str(root)}, **changes,
    )
    made = Trainer(config, list(config.roles), rank, world, "cpu", 1)
    made.load()
    return made


def sequences(advantage: float = 1.0) -> list[TrainSequence]:
    torch.manual_seed(7)
    lengths = (6, 9, 9, 12)
    return [
        a_sequence(
            torch.randint(3, 70, (n,)).tolist(), 3, index,
            columns={
                "rollout_logprobs": [-4.0] * (n - 3), "advantages": [advantage * (-1) ** n] * (n - 3),
                **evenly(4, n - 3, sum(lengths) - 12),
            },
        )
        for index, n in enumerate(lengths)
    ]  # fmt: skip


def with_logprobs(made: Trainer, items: list[TrainSequence], column: str, role: str) -> list[TrainSequence]:
    return add_column(items, column, [made.logprobs(role, pack(items, 1000))])


def weights(made: Trainer, role: str = "policy") -> list[torch.Tensor]:
    module = made.roles[role].module
    module.reshard()
    return [p.detach().full_tensor().clone() for p in module.parameters()]


def after(made: Trainer, updates: list[list[PackedBatch]]) -> tuple[dict[str, float], list[torch.Tensor]]:
    metrics = made.train("policy", updates)
    return metrics, weights(made)


def same(one: tuple[dict[str, float], list[torch.Tensor]], two: tuple[dict[str, float], list[torch.Tensor]]) -> None:
    assert one[0].keys() == two[0].keys()
    for name in one[0].keys() - {"done/micro_batches", "done/peak", "done/memory"}:  # which differ, and no CPU has
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_packing_padding_and_empty_batches_change_nothing(tiny: Path, tmp_path: Path, group: None) -> None:
    algorithm = {"entropyCoefficient": 0.5}
    one = after(trainer(tiny, tmp_path, algorithm=algorithm), [pack(sequences(), 1000)])
    assert one[0]["ratio"] == pytest.approx(1.0) and one[0]["clip_fraction"] == 0.0 and one[0]["entropy"] > 1
    small = trainer(tiny, tmp_path, algorithm=algorithm)
    same(one, after(small, [[*pack(sequences(), 12), empty_batch(sequences()[0].columns)]]))
    padded = trainer(tiny, tmp_path, options={"batching": "padded"}, algorithm=algorithm)
    same(one, after(padded, [[*pack(sequences(), 24, padded=True), empty_batch(sequences()[0].columns)]]))


def test_compiled_layers_train_the_same(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced as for the real backend, which would spend most of a minute in the C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    one, two = trainer(tiny, tmp_path), trainer(
        tiny, tmp_path, options={"compile": True, "gradientCheckpointing": True},
    )
    same(after(one, [pack(sequences(), 1000)]), after(two, [pack(sequences(), 1000)]))
    assert counters["frames"]["ok"] > 0


def _rank(rank: int, world: int, tiny: str, root: str) -> tuple[dict[str, float], list[torch.Tensor]]:
    if rank:  # it must do without the checkpoint's weights: a host has no room for as many copies as it has ranks
        PreTrainedModel.from_pretrained = None
    made = trainer(Path(tiny), Path(root), rank=rank, world=world)
    own = [item for item in sequences() if item.index % world == rank]
    return after(made, [[*pack(own, 1000)]])


def test_ranks_change_nothing_and_only_the_first_reads_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    (one,) = over_ranks(1, _rank, str(tiny), str(tmp_path))
    first, second = over_ranks(2, _rank, str(tiny), str(tmp_path))
    same(one, first)
    same(first, second)


def _copies(
    rank: int, world: int, tiny: str, root: str, node: int, options: dict[str, Any]
) -> tuple[list[int], dict[str, Extent], Any]:
    """Of two updates of three micro-batches: over how many ranks gradients are reduced in the second, each time; what
    this rank holds, and what is made of all.
    """
    if rank:
        PreTrainedModel.from_pretrained = None
    given = {"gpus": world, "sharding": "Hybrid", "tokensPerMicroBatch": 5} | options
    made = trainer(Path(tiny), Path(root), rank=rank, world=world, options=given, placement={"gpusPerNode": node})
    batches = dealt(sequences(), world, made.config.trainer, padded=False)[rank]
    spare = [empty_batch(sequences()[0].columns)] * (3 - len(batches))
    first = after(made, [[*batches, *spare]])
    reduced, groups = dist.all_reduce, []

    def noted(*args: Any, **more: Any) -> Any:
        groups.extend([more["group"].size()] if "group" in more else [])
        return reduced(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        second = after(made, [[*batches, *spare]])
    extents = {name: held.extent for name, held in made.source.held().items()}
    return groups, extents, (first, second)


@pytest.mark.parametrize(("world", "node", "options"), [
    (4, 2, {}), (4, 2, {"contextParallel": 2, "gradientCheckpointing": True}), (2, 1, {}),
], ids=["two nodes of two", "with shared sequences", "a copy a rank"])  # fmt: skip
def test_copies_on_nodes_change_nothing_and_are_reduced_once_an_update(
    tiny: Path, tmp_path: Path, group: None, world: int, node: int, options: dict[str, Any]
) -> None:
    whole = trainer(tiny, tmp_path)
    one = [after(whole, [pack(sequences(), 1000)]) for _ in range(2)]
    units = len(whole.roles["policy"].module.layers) + 1
    ranks = over_ranks(world, _copies, str(tiny), str(tmp_path), node, options)
    for number, (reduced, extents, trained) in enumerate(ranks):
        assert extents == ranks[number % node][1] and (number % node == 0 or extents != ranks[0][1])
        assert reduced == [world // node] * units
        for found, wanted in zip(trained, one, strict=True):
            same(wanted, found)


def _sharing(
    rank: int, world: int, tiny: str, root: str, options: dict[str, Any], algorithm: dict[str, Any]
) -> tuple[dict[int, Any], Any]:
    """What this rank finds of its samples, and what training makes of all."""
    made = trainer(Path(tiny), Path(root), rank=rank, world=world, options=options, algorithm=algorithm)
    items = dealt(sequences(), world, made.config.trainer)[rank]
    found = listed(made.logprobs("policy", items))
    if algorithm["name"] == "ppo":
        torch.nn.init.ones_(made.roles["critic"].module.head.weight)
        found = {index: row + made.values(items)[index].tolist() for index, row in found.items()}
    return found, after(made, [[*items, empty_batch(sequences()[0].columns)]])


@pytest.mark.parametrize(
    ("world", "algorithm", "budget"),
    [(2, {"name": "ppo"}, 100), (4, {"name": "gspo", "entropyCoefficient": 0.5}, 5)],
    ids=["one micro-batch", "two groups with several"],
)
def test_ranks_that_share_every_sequence_change_nothing(
    tiny: Path, tmp_path: Path, group: None, world: int, algorithm: dict[str, Any], budget: int
) -> None:
    found, trained = _sharing(0, 1, str(tiny), str(tmp_path), {}, algorithm)
    options = {"gpus": world, "contextParallel": 2, "tokensPerMicroBatch": budget, "gradientCheckpointing": True}
    ranks = over_ranks(world, _sharing, str(tiny), str(tmp_path), options, algorithm)
    assert {index for own, _ in ranks for index in own} == {*found}
    for own, made in ranks:
        assert [value for index in own for value in own[index]] == pytest.approx(
            [value for index in own for value in found[index]], abs=1e-5
        )
        same(trained, made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(
    tiny: Path, tmp_path: Path, group: None, dtype: str,
) -> None:
    made = trainer(tiny, tmp_path, dtype=dtype, algorithm={"kl": {"coefficient": 0.1}})
    items = with_logprobs(made, with_logprobs(made, sequences(), "old_logprobs", "policy"), "ref_logprobs", "reference")
    assert all(by_token(item, "old_logprobs") == by_token(item, "ref_logprobs") for item in items)
    metrics = made.train("policy", [pack(items, 1000)])
    assert {p.dtype for p in weights(made)} == {torch.float32} and {
        p.dtype for p in weights(made, "reference")
    } == {getattr(torch, dtype)}
    assert metrics["kl"] == 0.0 and metrics["policy_kl"] == 0.0
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)  # the weights' sum rounds, the ratios do not


def test_later_updates_are_measured_against_the_policy_that_sampled(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path)
    items = with_logprobs(made, sequences(), "old_logprobs", "policy")
    first, second = (pack(part, 1000) for part in (items[:2], items[2:]))
    assert made.train("policy", [first])["ratio"] == pytest.approx(
        sum(first[0].columns["token_weights"].tolist()), abs=1e-6,
    )
    assert made.train("policy", [second])["ratio"] != pytest.approx(
        sum(second[0].columns["token_weights"].tolist()), abs=1e-4,
    )


BOOK: dict[str, Any] = {
    "steps": 4, "epochs": 2, "updatesPerStep": 2, "learningRate": 0.01, "learningRateSchedule": "linear",
    "learningRateFloor": 0.1, "warmupSteps": 2, "weightDecay": 0.5, "adamBeta1": 0.8, "adamBeta2": 0.9,
    "adamEpsilon": 1e-3, "maxGradNorm": 0.2, "gradientCheckpointing": True,
}  # fmt: skip
REWARDS, BONUS = [1.0, 0.0, 0.0, 2.0], 0.2


class Book:
    """PPO's epochs (arXiv 1707.06347) of GRPO's loss with an entropy bonus, a sample at a time, by torch alone."""

    def __init__(self, tiny: Path) -> None:
        self.lm = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        named = dict(self.lm.named_parameters())
        decays: dict[float, list[nn.Parameter]] = {0.0: [], 0.5: []}
        for name, parameter in named.items():
            decays[0.5 * ("norm" not in name)].append(parameter)
        groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in decays.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-3)
        falls = LinearLR(self.optimizer, 1.0, 0.1, 14)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01
        self.scheduler = SequentialLR(self.optimizer, [LinearLR(self.optimizer, 0.5, 1.0, 1), falls], [2])

    def read(self, item: TrainSequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities and entropies of the completion's tokens."""
        tokens, at = torch.tensor(item.token_ids), slice(item.prompt_length - 1, item.length - 1)
        logprobs = torch.log_softmax(self.lm(tokens[None]).logits[0, at], -1)
        chosen = logprobs.gather(-1, tokens[item.prompt_length :, None])[:, 0]
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    def step(self, items: list[TrainSequence], advantages: list[float], updates: list[list[int]]) -> None:
        with torch.no_grad():
            old = [self.read(item)[0] for item in items]
        for update in updates:
            losses = [self.loss(items[i], old[i], advantages[i]) for i in update]
            torch.autograd.backward(torch.stack(losses).mean())
            torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 0.2)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def loss(self, item: TrainSequence, old: torch.Tensor, advantage: float) -> torch.Tensor:
        logprobs, entropies = self.read(item)
        ratio = torch.exp(logprobs - old)
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -(gain.mean() + BONUS * entropies.mean())


def test_epochs_of_mini_batches_are_ppos_by_the_book(tiny: Path, tmp_path: Path, group: None) -> None:
    """With warm-up, schedule, betas, epsilon, decay of weights but not of norms, and entropy bonus, over two steps."""
    made = trainer(tiny, tmp_path, options=BOOK, algorithm={"entropyCoefficient": BONUS, "correction": {"tokenCap": 0}})
    book, spec = Book(tiny), made.config.algorithm
    for step in (1, 2):
        items, updates = sequences(), mini_batches(4, 2, 2, f"0/{step}")
        known = with_logprobs(made, items, "old_logprobs", "policy")
        shaped = shape(spec, 0.0, known, REWARDS, [0, 0, 1, 1], updates=updates, max_tokens=16)
        metrics = made.train("policy", [pack(update, 1000) for update in shaped.updates])
        book.step(items, [2**-0.5, -(2**-0.5), -(2**-0.5), 2**-0.5], updates)
        assert 0 < metrics["clip_fraction"] < 1
    module = made.roles["policy"].module
    module.reshard()
    for name, parameter in book.lm.named_parameters():
        found = module.get_parameter(f"lm.{name}").detach().full_tensor()
        torch.testing.assert_close(found, parameter.detach(), atol=1e-5, rtol=1e-4, msg=name)


def test_nothing_of_one_dimension_no_bias_and_no_norm_decays() -> None:
    class HeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    parts = {"embed": nn.Embedding(5, 4), "up": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "q": HeadNorm()}
    module = nn.ModuleDict(parts)
    module.register_parameter("experts_bias", nn.Parameter(torch.zeros(2, 4)))
    module["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [(sorted(names[id(p)] for p in group["params"]), group["weight_decay"]) for group in decayed(module, 0.1)]
    free = ["experts_bias", "norm.bias", "norm.weight", "q.weight", "up.bias"]
    assert groups == [(["embed.weight", "up.weight"], 0.1), (free, 0.0)]
    assert [group["weight_decay"] for group in decayed(nn.Linear(4, 4, bias=False), 0.1)] == [0.1]


@pytest.mark.parametrize(
    ("dtype", "batching", "times"), [("bfloat16", "packed", 2), ("bfloat16", "padded", 0), ("float32", "packed", 0)]
)
def test_each_role_that_packs_bfloat16_asks_for_the_fastest_attention(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, dtype: str, batching: str, times: int
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(flash, "choose", lambda *arguments: asked.append(arguments))
    trainer(tiny, tmp_path, dtype=dtype, options={"batching": batching}, algorithm={"kl": {"coefficient": 0.1}})
    assert asked == [(Heads(4, 2, 32, windows=False), torch.device("cpu"))] * times


def test_the_reference_stays_the_model_before_training(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, algorithm={"kl": {"coefficient": 0.1}})
    before, frozen = listed(made.logprobs("reference", pack(sequences(), 1000))), weights(made, "reference")
    batches = pack(with_logprobs(made, sequences(), "ref_logprobs", "reference"), 1000)
    made.train("policy", [batches])
    assert made.train("policy", [batches])["kl"] > 1e-4
    assert listed(made.logprobs("reference", pack(sequences(), 1000))) == before
    assert all(torch.equal(a, b) for a, b in zip(frozen, weights(made, "reference"), strict=True))


def test_log_probabilities_are_told_apart_by_sample(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path)
    together = made.logprobs("policy", pack(sequences(), 1000))
    assert together.keys() == {0, 1, 2, 3}
    for item in sequences():
        assert together[item.index] == pytest.approx(made.logprobs("policy", pack([item], 1000))[item.index], abs=1e-4)


PPO: dict[str, Any] = {"algorithm": {"name": "ppo", "valueClip": 0}, "critic": {"learningRate": 0.02, "warmupSteps": 3}}


def test_the_critic_learns_a_constant_and_the_policy_stays(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, **PPO)
    policy = weights(made)
    items = [s.with_columns(returns=0.7) for s in sequences()]
    assert listed(made.values(pack(items, 1000))) == {item.index: [0.0] * len(item.mask) for item in items}
    losses = []
    for _ in range(30):
        valued = add_column(items, "values", [made.values(pack(items, 1000))])
        losses.append(made.train("critic", [pack(valued, 12)])["loss"])
    assert losses[0] == pytest.approx(0.5 * 0.7**2, rel=1e-5)
    assert losses[-1] < 0.01 * losses[0]
    assert [
        v for row in made.values(pack(items, 1000)).values() for v in row
    ] == pytest.approx([0.7] * sum(len(s.mask) for s in items), abs=0.2)
    assert all(torch.equal(a, b) for a, b in zip(policy, weights(made), strict=True))


def _trained(made: Trainer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    items = [s.with_columns(returns=0.7) for s in sequences()]
    for _ in range(2):
        valued = add_column(
            with_logprobs(made, items, "old_logprobs", "policy"), "values", [made.values(pack(items, 1000))],
        )
        made.train("critic", [pack(valued, 1000)])
        made.train("policy", [pack(valued, 1000)])
        made._rest()
    made._use("policy")
    policy = weights(made)
    made._use("critic")
    return policy, weights(made, "critic")


def test_offload_gives_the_same_bits(tiny: Path, tmp_path: Path, group: None) -> None:
    stays, goes = trainer(tiny, tmp_path / "a", **PPO), trainer(tiny, tmp_path / "b", options={"offload": True}, **PPO)
    for one, two in zip(_trained(stays), _trained(goes), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def held(made: Trainer, role: str) -> int:
    """Bytes of a role's parameters and optimizer state where they are used."""
    states = made.roles[role].optimizer.state.values()  # type: ignore[union-attr]
    tensors = [*made.roles[role].module.parameters(), *(value for state in states for value in state.values())]
    return sum((t.to_local() if hasattr(t, "to_local") else t).untyped_storage().nbytes() for t in tensors)


def test_offload_leaves_one_role_on_the_device_and_none_at_rest(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, options={"offload": True}, **PPO)
    assert held(made, "policy") == held(made, "critic") == 0
    made.train("policy", [pack(sequences(), 1000)])
    assert held(made, "policy") > 0 and held(made, "critic") == 0
    made.values(pack(sequences(), 1000))
    assert held(made, "policy") == 0 and held(made, "critic") > 0
    made.save(1, {}, {})
    assert held(made, "policy") == held(made, "critic") == 0
    (outcome,) = made.saved(wait=True)
    assert outcome.error is None
    again = trainer(tiny, tmp_path, options={"offload": True}, **PPO)
    assert again.restore().state is not None and again.version == 1
    for role in ("policy", "critic"):
        made._use(role)
        again._use(role)
        assert all(torch.equal(a, b) for a, b in zip(weights(made, role), weights(again, role), strict=True))


def test_the_export_of_the_best_is_that_of_its_step(tiny: Path, tmp_path: Path, group: None) -> None:
    kept = {"path": str(tmp_path), "best": {"metric": "m"}}
    model, spec = {"path": str(tiny), "dtype": "float32"}, {"steps": 3, "learningRate": 0.01}
    made = Trainer(run_config(model=model, trainer=spec, checkpoint=kept), ["policy"], 0, 1, "cpu", 1)
    made.load()
    each = []
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1)):
        made.train("policy", [pack(sequences(), 1000)])
        made.save(step, {}, {"score": {"m": score}})
        each.append(weights(made))
    assert all(outcome.error is None for outcome in made.saved(wait=True))
    names = [name.removeprefix("lm.") for name, _ in made.roles["policy"].module.named_parameters()]
    for best, wanted in ((False, each[2]), (True, each[1])):
        found = dict(LlamaForCausalLM.from_pretrained(made.export(best=best)).named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in zip(names, wanted, strict=True))


def test_what_engines_read_in_shared_memory_stays(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, options={"offload": True})
    made._use("policy")
    mapped.export({name: shard.local for name, shard in made.source.held().items()}, 1)
    before = weights(made)
    made._rest()
    assert held(made, "policy") > 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))


PROMPTS, COMPLETIONS = ["1 + 2 =", "say it", "1"], [" 3", " a long one, longer than the others", ""]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_reward_model_scores_as_the_plain_call(
    tiny: Path, tmp_path: Path, group: None, pad: bool, batching: str,
) -> None:
    plain, tokenizer = write_reward(tiny, tmp_path / "rm", pad=pad), AutoTokenizer.from_pretrained(tmp_path / "rm")
    rewards = [{"name": "rm", "type": "model", "model": {"path": str(tmp_path / "rm"), "dtype": "float32"}}]
    made = trainer(tiny, tmp_path, rewards=rewards, options={"tokensPerMicroBatch": 40, "batching": batching})
    texts = [a + b for a, b in zip(PROMPTS, COMPLETIONS, strict=True)]
    wanted = [
        plain(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.item() for text in texts
    ]
    assert made.scores("reward:rm", PROMPTS, COMPLETIONS) == pytest.approx(wanted, abs=1e-6)


def test_a_reward_model_reads_chats_by_its_own_template(tiny: Path, tmp_path: Path, group: None) -> None:
    plain, tokenizer = write_reward(tiny, tmp_path / "rm"), AutoTokenizer.from_pretrained(tmp_path / "rm")
    rewards = [{"name": "rm", "type": "model", "model": {"path": str(tmp_path / "rm"), "dtype": "float32"}}]
    chat = [{"role": "user", "content": "1 + 2 ="}]
    with pytest.raises(BadSpec, match=r"reward:rm: prompts are chat messages, but the tokenizer of .* has no chat "
        r"template"):
        trainer(tiny, tmp_path, rewards=rewards).scores("reward:rm", [chat], ["3"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "rm")
    ids = tokenizer("user: 1 + 2 =\nassistant: 3\n", add_special_tokens=False, return_tensors="pt").input_ids
    found = trainer(tiny, tmp_path, rewards=rewards).scores("reward:rm", [chat, "1 + 2 ="], ["3", "3"])
    assert found == pytest.approx([plain(ids).logits.item()] * 2, abs=1e-6)


def test_a_sample_beyond_the_reward_models_context_is_told(tiny: Path, tmp_path: Path, group: None) -> None:
    write_reward(tiny, tmp_path / "rm")
    made = trainer(
        tiny, tmp_path,
        rewards=[{"name": "rm", "type": "model", "model": {"path": str(tmp_path / "rm"), "dtype": "float32"}}],
    )
    words = r"reward:rm: a sample of 607 tokens by its own tokenizer, but the model's context is 512: lower"
    with pytest.raises(RewardFailed, match=words):
        made.scores("reward:rm", ["1 + 2 ="], ["x" * 600])


def test_a_reward_models_token_beyond_its_embedding_is_told(tiny: Path, tmp_path: Path, group: None) -> None:
    write_reward(tiny, tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "rm")
    model = {"path": str(tmp_path / "rm"), "dtype": "float32"}
    made = trainer(tiny, tmp_path, rewards=[{"name": "rm", "type": "model", "model": model}])
    words = r"reward:rm: the tokenizer of .* gives token 81 \('<new>'\), its model has 81: use a tokenizer"
    with pytest.raises(BadSpec, match=words):
        made.scores("reward:rm", ["1 + 2 ="], ["<new>"])


def test_a_loss_that_is_not_finite_stops_with_its_batch_on_disk_and_the_weights_as_they_were(
    tiny: Path, tmp_path: Path, group: None,
) -> None:
    made = trainer(tiny, tmp_path, **PPO)
    before = weights(made)
    with pytest.raises(Diverged, match=r"the policy's loss is nan .* in step 4: the batch is in .*diverged-step-4\.pt"):
        made.train("policy", [pack(sequences(float("nan")), 1000)])
    (dumped,) = torch.load(tmp_path / "diverged-step-4.pt", weights_only=False)
    assert dumped["role"] == "policy" and dumped["batches"][0].columns["advantages"].isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))
    assert made.version == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_rank_alone_casts_its_weights_once_an_update(
    tiny: Path, tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, name: str, checkpointing: bool
) -> None:  # fmt: skip
    """And sums gradients as they come; what it makes is what a rank makes that casts and reduces each time."""
    casts: list[object] = []
    unsharded = FSDPParamGroup._to_unsharded

    def counted(of: FSDPParamGroup) -> None:
        casts.append(of)
        unsharded(of)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(FSDPParamGroup, "_to_unsharded", counted)
    options, algorithm = {"gradientCheckpointing": checkpointing}, {"name": name}
    one, two = (trainer(tiny, tmp_path, dtype="bfloat16", options=options, algorithm=algorithm) for _ in range(2))
    two.roles["policy"].alone = False
    items = with_logprobs(one, sequences(), "old_logprobs", "policy")
    batches = pack(items, 12)
    one.roles["policy"].module.reshard()
    casts.clear()
    once = after(one, [batches, batches])
    units = len(one.roles["policy"].module.layers) + 1
    assert len(casts) == 2 * units
    casts.clear()
    often = after(two, [batches, batches])
    assert len(casts) > len(batches) * 2 * units
    same(once, often)
    assert listed(one.logprobs("policy", batches)) == listed(one.logprobs("policy", batches))
    assert all(isinstance(parameter, DTensor) for layer in one.roles["policy"].module.layers
               for parameter in layer.parameters()), "a pass without a gradient leaves its layers in shards"
