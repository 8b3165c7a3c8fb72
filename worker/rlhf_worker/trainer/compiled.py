"""How the trainer compiles: one set of choices for decoder layers and the head.

Shapes are dynamic, so that batches of all sizes share a graph a layer kind: one for passes with a gradient and one for
those without. What would make a further one on the way, which costs a step 10 to 20 s, is kept out here.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as shape_config

P = ParamSpec("P")
R = TypeVar("R")

# Fused kernels hold their values in float32 to the end. With this they round to bfloat16 where the uncompiled model and
# the kernels of engines do. Else passes with a gradient and without, which are fused otherwise, differ: the first ratio
# of policies is no longer 1.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}
# All layers of all roles that are of one class share it; the default of 8 is less than two roles need.
GRAPHS = 64


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` by torch.compile. What it cannot compile runs as it is, and torch says so in the log."""
    fast = torch.compile(function, dynamic=True, options=OPTIONS)

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        # Settings are of a thread, and gradients have their own. Without the first, sizes that are alike by chance in
        # the first batch (its tokens and the hidden size) must be so in every other.
        with (
            shape_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
            # Numbers of a layer (scales, epsilons) never change: as symbols they are found to be none at the end of a
            # graph, which is then traced once more.
            dynamo_config.patch(suppress_errors=True, recompile_limit=GRAPHS, specialize_float=True),
        ):
            made: R = fast(*arguments, **options)
        return made

    return call
