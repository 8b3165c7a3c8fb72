"""The coefficient of the KL term from step to step."""

from rlhf_api.algorithms import KL

GAIN = 0.2  # most relative change of one horizon


class KLController:
    """Fixed without a target; with one, adaptive (arXiv 1909.08593): more when the KL is above the target, less when
    below.
    """

    def __init__(self, spec: KL) -> None:
        self.spec = spec
        self.coefficient = spec.coefficient

    def observe(self, kl: float, samples: int) -> None:
        """`kl`: of the step, in nats a token; `samples` of it. The coefficient stays positive however large the step
        is.
        """
        if self.spec.target:
            error = min(max(kl / self.spec.target - 1, -GAIN), GAIN)
            self.coefficient *= 1 + error * min(samples / self.spec.horizon, 1.0)

    def state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        """Of a checkpoint; a spec without a target has its own coefficient."""
        if self.spec.target:
            self.coefficient = state["coefficient"]
