"""Each algorithm's own numbers, as data, and the one function that fills them in. What they mean: docs/algorithms.md.
"""

from typing import Any, Literal

from pydantic import Field

from rlhf_api.job import AlgorithmSpec, CorrectionSpec, DynamicSamplingSpec, GAESpec, KLSpec, OverlongSpec

Options = dict[str, Any]

UNGROUPED = ("ppo", "reinforce++")  # one sample a prompt is enough

COMMON: Options = {
    "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0, "loss_aggregation": "tokens",
    "advantage_normalization": "none", "value_clip": 0.2,
    "gae": {"gamma": 1.0, "lam": 0.95}, "kl": {"target": 0.0, "horizon": 10_000},
    "dynamic_sampling": {"enabled": False, "max_rounds": 10}, "overlong": {"buffer_tokens": 0, "penalty": 1.0},
    "correction": {
        "token_cap": 2.0, "token_min": 0.0, "token_max": 0.0, "sequence_min": 0.0, "sequence_max": 0.0, "alarm": 0.05,
    },
}  # fmt: skip

OWN: dict[str, Options] = {
    "ppo": {"advantage_normalization": "batch", "kl": {"place": "reward"}},
    "grpo": {"advantage_normalization": "group", "loss_aggregation": "sequences"},
    "rloo": {"kl": {"place": "reward"}},
    "reinforce++": {"advantage_normalization": "batch", "kl": {"place": "reward"}},
    "reinforce++-baseline": {"advantage_normalization": "batch", "kl": {"estimator": "k2"}},
    "dr_grpo": {"loss_aggregation": "constant"},
    "dapo": {"advantage_normalization": "group", "clip_high": 0.28, "dynamic_sampling": {"enabled": True}},
    "gspo": {"advantage_normalization": "group", "loss_aggregation": "sequences", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"advantage_normalization": "group", "clip_low": 1.0, "clip_high": 4.0},
}
OVERLONG_SHARE = 5  # dapo's buffer: a fifth of maxTokens


class KL(KLSpec):
    estimator: Literal["k1", "k2", "k3"]
    place: Literal["loss", "reward"]
    target: float
    horizon: int


class GAE(GAESpec):
    gamma: float
    lam: float = Field(alias="lambda")


class DynamicSampling(DynamicSamplingSpec):
    enabled: bool
    max_rounds: int


class Overlong(OverlongSpec):
    buffer_tokens: int
    penalty: float


class Correction(CorrectionSpec):
    token_cap: float
    token_min: float
    token_max: float
    sequence_min: float
    sequence_max: float
    alarm: float


class Algorithm(AlgorithmSpec):
    """AlgorithmSpec with nothing left open."""

    clip_low: float
    clip_high: float
    dual_clip: float
    loss_aggregation: Literal["tokens", "sequences", "constant"]
    advantage_normalization: Literal["none", "group", "batch"]
    value_clip: float
    gae: GAE
    kl: KL
    dynamic_sampling: DynamicSampling
    overlong: Overlong
    correction: Correction


def fill(spec: AlgorithmSpec, max_tokens: int) -> Algorithm:
    """The user's options over the algorithm's own over what all share. `max_tokens`: of one completion."""
    own: Options = OWN[spec.name]
    given = spec.model_dump(exclude_none=True)
    place = given["kl"].get("place") or own.get("kl", {}).get("place", "loss")
    derived: Options = {"kl": {"place": place, "estimator": "k1" if place == "reward" else "k3"}}
    if spec.name == "dapo":
        derived["overlong"] = {"buffer_tokens": max(1, max_tokens // OVERLONG_SHARE)}
    return Algorithm.model_validate(_merged(COMMON, derived, own, given))


def _merged(*layers: Options) -> Options:
    """Later layers win, key by key also in nested objects."""
    out: Options = {}
    for layer in layers:
        for key, value in layer.items():
            out[key] = _merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out
