"""Who has the GPUs that trainer and engines share, and when: the order of the loop's calls in one step, with stand-ins for all actors."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_worker import loop as module
from rlhf_worker.experience import PackedBatch, by_sample
from rlhf_worker.loop import Loop
from rlhf_worker.stop import Stop
from rlhf_worker.weights.sync import Synced
from tests.worker.configs import run_config
from tests.worker.samples import a_sample, scored


class Stand:
    """In for every actor: notes what it is asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.metrics: dict[str, float] = {}  # of the samples taken last

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.answer(method, *args))

    def answer(self, method: str, *args: Any) -> Any:
        self.asked.append(" ".join([method, *(arg for arg in args if isinstance(arg, str))]))
        return {} if method == "train" else zeros(args[-1])

    # The fleet, and where samples come from.

    def sleep(self) -> None:
        self.asked.append("sleep")

    def sync(self, *, prove: bool) -> Synced:
        self.asked.append("sync")
        return Synced(1, 0.0, "none", None)

    def take(self) -> list[Any]:
        self.asked.append("take")
        return [SimpleNamespace(samples=[scored(a_sample(row), float(index)) for index in range(8)]) for row in range(16)]

    def finish(self, step: int) -> tuple[dict[str, Any], list[str]]:
        return {}, []

    def pump(self) -> None: ...


def zeros(batches: list[PackedBatch]) -> dict[int, list[float]]:
    return {index: row for batch in batches for index, row in by_sample(batch, batch.targets[batch.target_mask] * 0.0).items()}


@pytest.mark.parametrize(("args", "mode", "sleep"), [
    ({}, "Colocated", []), ({"enable_sleep_mode": True}, "Colocated", ["sleep"]), ({"enable_sleep_mode": True}, "Separated", []),
])  # fmt: skip
def test_engines_that_share_gpus_sleep_from_the_last_completion_to_the_sync(monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], mode: str, sleep: list[str]) -> None:
    stand = Stand()
    monkeypatch.setattr(module, "gather", lambda calls, *rest: calls)
    monkeypatch.setattr(module, "call", lambda *args, **more: None)
    config = run_config(algorithm={"name": "ppo", "kl": {"coefficient": 0.1}}, rollout={"maxTokens": 16, "engineArgs": args}, placement={"mode": mode})
    ranks = {role: [stand] for role in ("policy", "reference", "critic")}
    reporter = SimpleNamespace(stepped=lambda *args, **more: None, active=lambda: None, bounded=nullcontext)
    loop = Loop(config, SimpleNamespace(fleet=stand, ranks=ranks, feed=stand), reporter, Stop())  # type: ignore[arg-type]
    loop.rollouts = stand  # type: ignore[assignment]
    loop._step()
    forward, train = ["logprobs policy", "logprobs reference", "values"], ["train critic", "train policy"]
    assert stand.asked == ["take", *sleep, *forward, *train, "sync"]
