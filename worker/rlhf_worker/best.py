"""Which step is the best by spec.checkpoint.best, whose checkpoint is kept beside the newest."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_api.job import BestSpec
from rlhf_worker.errors import BadSpec

EVALUATED = "eval/"  # what the metrics of evaluations begin with


def ranked(spec: BestSpec, memories: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of checkpoints, oldest first, each by its name and what the loop remembered: those with the metric, best first.
    """
    found = [(name, memory.get("score", {}).get(spec.metric)) for name, memory in memories.items()]
    scored = [(name, value) for name, value in found if value is not None]
    return [name for name, _ in sorted(scored, key=lambda one: -one[1] if spec.mode == "max" else one[1])]


class Best:
    """The loop's view: the score of its newest step, and the best that a checkpoint was made of.

    An evaluation that improves on it is worth a checkpoint; other metrics, which every step has, count for steps
    that are saved anyway.
    """

    def __init__(self, spec: BestSpec | None) -> None:
        self.spec = spec
        self.score: float | None = None
        self.top: float | None = None
        self.improved = False

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Of a checkpoint; one of another metric says nothing."""
        self.top = memory.get("best", {}).get(self.spec.metric) if self.spec else None

    def finished(self) -> None:
        """A step, of which nothing is known yet."""
        self.score, self.improved = None, False

    def observe(self, values: Mapping[str, float]) -> None:
        """Metrics of the newest step, as they are logged."""
        if self.spec is None or not math.isfinite(value := values.get(self.spec.metric, math.nan)):
            return
        self.score, self.improved = value, self.spec.metric.startswith(EVALUATED) and self._better(value) != self.top

    def _better(self, value: float) -> float:
        assert self.spec is not None
        return value if self.top is None else (max if self.spec.mode == "max" else min)(value, self.top)

    def saved(self) -> dict[str, dict[str, float]]:
        """What the newest step's checkpoint remembers."""
        if self.spec is None:
            return {}
        self.improved, self.top = False, self.top if self.score is None else self._better(self.score)
        known = {"score": self.score, "best": self.top}
        return {name: {self.spec.metric: value} for name, value in known.items() if value is not None}

    def require(self, values: Mapping[str, float], *, evaluated: bool) -> None:
        """Raises BadSpec when the metric is not among `values`: all of an evaluation, or of a step."""
        if self.spec and self.spec.metric.startswith(EVALUATED) is evaluated and self.spec.metric not in values:
            raise BadSpec(
                f"spec.checkpoint.best.metric: this run logs no {self.spec.metric}: use one of "
                    f"{', '.join(sorted(values))}"
            )
