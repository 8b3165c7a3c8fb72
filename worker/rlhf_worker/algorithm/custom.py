"""Advantages and losses of the user's own: loaded and tried once at the start, then called by keyword."""

import inspect
import numbers
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_api.job import FunctionSpec
from rlhf_api.run import RunConfig
from rlhf_worker.algorithm.shape import passes
from rlhf_worker.errors import BadSpec, together
from rlhf_worker.rewards.child import load, tail

Answer = tuple[Tensor, dict[str, Any]]


def advantage(config: RunConfig) -> Callable[..., Answer] | None:
    """The user's own, which gives (B,) or (B, T); None without one. Raises BadSpec."""
    if not (spec := config.algorithm.advantage):
        return None
    size = config.rollout.samples_per_prompt
    groups = torch.arange(2).repeat_interleave(size)
    rewards, table = torch.linspace(0, 1, len(groups), dtype=torch.float64), torch.zeros(len(groups), 3).double()
    names = [reward.name for reward in config.rewards] + ["environment"] * bool(config.rollout.environment)
    example = {
        "rewards": rewards, "groups": groups, "mask": table == 0,
        "columns": dict.fromkeys(["rollout_logprobs", *_passed(config)], table),
        "parts": dict.fromkeys(names, rewards),
    }  # fmt: skip
    return Custom("advantage", spec, example)


def loss(config: RunConfig, device: torch.device) -> Callable[..., Answer] | None:
    """The user's own, which gives (N,) with a gradient; None without one. Raises BadSpec."""
    if not (spec := config.algorithm.loss):
        return None
    targets = torch.zeros(3, device=device)
    names = ["advantages", "loss_weights", "token_weights", "rollout_logprobs", *_passed(config)]
    names += ["kl_weights"] if config.algorithm.kl.coefficient and config.algorithm.kl.place == "loss" else []
    example = {
        "logprobs": torch.zeros_like(targets, requires_grad=True), "old_logprobs": targets, "advantages": targets,
        "entropy": targets, "sequence": torch.tensor([0, 0, 1], device=device),
        "columns": dict.fromkeys(names, targets),
    }  # fmt: skip
    return Custom("loss", spec, example)


def check(config: RunConfig) -> None:
    """Raises BadSpec with what is wrong of both."""
    together([partial(advantage, config), partial(loss, config, torch.device("cpu"))])


def _passed(config: RunConfig) -> dict[str, str]:
    return passes(config.algorithm, config.trainer.epochs * config.trainer.updates_per_step)


class Custom:
    """Gives a tensor, or it and metrics by name: numbers (advantage), or a number a target, (N,), of which the mean
    is logged (loss). Metrics are called <kind>/<name>, and are the same in every call.
    """

    def __init__(self, kind: str, spec: FunctionSpec, example: Mapping[str, Any]) -> None:
        self.kind, self.field, self.names = kind, f"spec.algorithm.{kind}", frozenset[str]()
        called = f"{kind}({', '.join(f'{name}=' for name in example)})"
        try:
            self.function = load(spec.function, spec.code, self.field, "function", f"{kind}(...)")
            inspect.signature(self.function).bind(**example)
            value, metrics = self._answer(example)
        except BadSpec:
            raise
        except Exception as error:
            raise BadSpec(f"{self.field}: tried as {called} with small tensors: {tail()}") from error
        if not value.isfinite().all() or (kind == "loss" and not value.requires_grad):
            fault = "has no gradient" if value.isfinite().all() else "is not finite"
            raise BadSpec(f"{self.field}: what {called} returns {fault}, tried with zeros")
        self.names = frozenset(metrics)

    def __call__(self, **arguments: Any) -> Answer:
        """Raises BadSpec for another answer than at the start."""
        value, metrics = self._answer(arguments)
        if metrics.keys() != self.names:  # ranks add them up by name
            raise BadSpec(f"{self.field}: metrics {sorted(metrics)}, but {sorted(self.names)} when it was tried")
        return value, {f"{self.kind}/{name}": number for name, number in metrics.items()}

    def _answer(self, arguments: Mapping[str, Any]) -> Answer:
        answer = self.function(**arguments)
        value, metrics = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
        tokens = arguments["logprobs" if self.kind == "loss" else "mask"].shape
        shapes = {tokens, arguments["rewards"].shape} if self.kind == "advantage" else {tokens}
        if not isinstance(value, Tensor) or value.shape not in shapes or not value.is_floating_point():
            told = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.200}"
            wanted = " or ".join(str(tuple(shape)) for shape in shapes)
            raise BadSpec(f"{self.field}: returned {told}, floats {wanted} are needed, or those and a dictionary")
        if not isinstance(metrics, dict) or not all(self._fits(*metric, tokens) for metric in metrics.items()):
            each = "a tensor like what it returns" if self.kind == "loss" else "a number"
            raise BadSpec(f"{self.field}: metrics are a dictionary of names to {each}, not {metrics!r:.200}")
        return value, metrics

    def _fits(self, name: object, number: object, tokens: torch.Size) -> bool:
        named = isinstance(name, str) and name.isidentifier()
        if self.kind == "loss":
            return named and isinstance(number, Tensor) and number.shape == tokens
        return named and isinstance(number, numbers.Real)
