"""Advantages and losses of the user's own: what they are given, what comes of what they give, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_api.run import RunConfig
from rlhf_worker.algorithm import custom
from rlhf_worker.algorithm.losses import policy_loss
from rlhf_worker.algorithm.shape import shape
from rlhf_worker.crew import check_functions
from rlhf_worker.errors import BadSpec
from tests.worker.configs import run_config
from tests.worker.samples import sequences

CPU = torch.device("cpu")
BEST_OF_ITS_GROUP = """
def advantage(rewards, groups, parts, **more):
    best = rewards.new_zeros(int(groups.max()) + 1).scatter_reduce(0, groups, rewards, "amax", include_self=False)
    return (rewards == best[groups]).to(rewards.dtype), {"best": best.mean().item(), "r": parts["r"].max().item()}
"""
LAST_TOKEN = """
def advantage(*, rewards, mask, **more):
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return last * rewards[:, None] + 7 * ~mask
"""
CLIPPED = """
import torch

def loss(*, logprobs, old_logprobs, advantages, **more):
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(0.8, 1.2)
    terms = torch.maximum(-ratio * advantages, -bounded * advantages)
    return terms, {"far": (ratio - 1).abs()}
"""


def config(**algorithm: Any) -> RunConfig:
    return run_config(algorithm=algorithm, rollout={"maxTokens": 16, "samplesPerPrompt": 3})


def test_advantages_of_ones_own_are_taken_as_they_are_with_their_metrics() -> None:
    given = config(name="dapo", advantage={"code": BEST_OF_ITS_GROUP}, overlong={"bufferTokens": 0})
    items, rewards = sequences([(2, 4), (1, 2), (3, 1), (2, 2)]), [1.0, 0.0, 0.5, 2.0]
    made = shape(
        given.algorithm, 0.0, items, rewards, [0, 0, 1, 1], updates=[range(4)], max_tokens=16,
        parts={"r": [5.0, 6, 7, 8]},
        custom=custom.advantage(given),
    )  # fmt: skip
    assert made.advantages == [1.0, 0.0, 0.0, 1.0], "a number a sample"
    assert made.metrics == {"advantage/best": 1.5, "advantage/r": 8.0}


def test_they_may_be_each_tokens_own_and_what_does_not_count_has_none() -> None:
    given = config(advantage={"code": LAST_TOKEN})
    made = shape(
        given.algorithm, 0.0, sequences([(2, 3), (1, 1)]), [1.0, 2.0], [0, 0], updates=[range(2)], max_tokens=16,
        custom=custom.advantage(given),
    )  # fmt: skip
    assert [np.asarray(own).tolist() for own in made.advantages] == [[0.0, 0.0, 1.0], [2.0]]


def test_a_loss_of_ones_own_has_the_weights_the_correction_and_the_kl_of_every_other() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, reference, engine = (torch.randn(5, generator=generator) / 2 for _ in range(4))
    columns = {
        "advantages": torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0]), "loss_weights": torch.full((5,), 0.3),
        "old_logprobs": old,
        "token_weights": torch.full((5,), 0.2), "rollout_logprobs": engine, "ref_logprobs": reference,
        "kl_weights": torch.full((5,), 0.1),
    }  # fmt: skip
    found = []
    for own in (False, True):
        given = config(kl={"coefficient": 0.1}, entropyCoefficient=0.1, **({"loss": {"code": CLIPPED}} if own else {}))
        logprobs = new.clone().requires_grad_()
        entropy, numbers = torch.ones(5), torch.tensor([0, 0, 0, 1, 1])
        loss, metrics = policy_loss(given.algorithm, logprobs, entropy, columns, numbers, custom.loss(given, CPU))
        found.append((loss, torch.autograd.grad(loss, logprobs)[0], metrics))
    (loss, gradient, metrics), (own_loss, own_gradient, own_metrics) = found
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(own_gradient, gradient)
    assert own_metrics.keys() ^ metrics.keys() == {"clip_fraction", "loss/far"}
    torch.testing.assert_close(own_metrics["loss/far"], ((new - old).exp() - 1).abs().mean())


def test_without_functions_there_is_nothing_to_try() -> None:
    assert custom.advantage(config()) is None and custom.loss(config(), CPU) is None
    check_functions(config())


ADVANTAGE, LOSS = "def advantage(rewards, **more): ", "def loss(logprobs, **more): "


@pytest.mark.parametrize(
    ("kind", "spec", "words"),
    [
        ("advantage", {"function": "no_such_module:f"}, "No module named 'no_such_module'"),
        ("advantage", {"function": "math:nothing"}, "module math has no function 'nothing'"),
        ("advantage", {"code": "def score(**more): ..."}, "defines no function advantage"),
        ("advantage", {"code": "def advantage("}, "SyntaxError"),
        ("advantage", {"code": "def advantage(rewards): ..."}, "unexpected keyword argument 'groups'"),
        ("advantage", {"code": "def advantage(rewards, baseline, **more): ..."}, "missing a required argument: "
            "'baseline'"),
        ("advantage", {"code": ADVANTAGE + "return [1.0]"}, r"returned \[1.0\], floats \(6(, 3)?,?\) or \(6(, 3)?,?\) "
            r"are needed"),
        ("advantage", {"code": ADVANTAGE + "return rewards.mean()"}, r"returned torch.float64 \(\)"),
        ("advantage", {"code": ADVANTAGE + "return rewards.long()"}, r"returned torch.int64 \(6,\)"),
        ("advantage", {"code": ADVANTAGE + "return rewards / rewards.min()"}, "is not finite"),
        ("advantage", {"code": ADVANTAGE + "return rewards, {'a': rewards}"}, "metrics are a dictionary of names to a "
            "number"),
        ("advantage", {"code": ADVANTAGE + "return rewards, {'a b': 1}"}, "metrics are a dictionary of names"),
        ("advantage", {"code": ADVANTAGE + "return more['columns']['values']"}, "KeyError: 'values'"),
        ("loss", {"code": LOSS + "return logprobs.sum()"}, r"returned torch.float32 \(\), floats \(3,\) are needed"),
        ("loss", {"code": LOSS + "return logprobs.detach()"}, "has no gradient"),
        ("loss", {"code": LOSS + "return logprobs.log()"}, "is not finite"),
        ("loss", {"code": LOSS + "return logprobs, {'a': 1.0}"}, "names to a tensor like what it returns"),
        ("loss", {"function": "math:exp"}, "TypeError"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_used_is_told_before_anything_starts(kind: str, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSpec, match=f"(?s)^spec.algorithm.{kind}: .*{words}"):
        check_functions(config(**{kind: spec}))


def test_both_faults_are_told() -> None:
    with pytest.raises(BadSpec, match=r"(?s)spec\.algorithm\.advantage: .*spec\.algorithm\.loss: "):
        check_functions(config(advantage={"function": "no:f"}, loss={"function": "no:f"}))


def test_an_answer_that_changes_its_kind_is_refused_when_it_does() -> None:
    code = LOSS + "return logprobs, ({'far': logprobs} if len(logprobs) > 3 else {})"
    own = custom.loss(config(loss={"code": code}), CPU)
    assert own is not None
    zeros = torch.zeros(4, requires_grad=True)
    with pytest.raises(BadSpec, match=r"spec\.algorithm\.loss: metrics \['far'\], but \[\] when it was tried"):
        own(logprobs=zeros, old_logprobs=zeros, advantages=zeros, entropy=zeros, sequence=zeros, columns={})
