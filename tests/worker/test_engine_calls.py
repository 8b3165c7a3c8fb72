"""An engine's actor around a core that only pretends: what is held together, and what a deadline leaves. No vLLM."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_worker.engines import engine as module
from rlhf_worker.engines.engine import Engine
from rlhf_worker.errors import DeadlineExceeded, EngineFailed
from rlhf_worker.rollout.episode import Episode, Request, Turn
from tests.worker.configs import run_config
from tests.worker.samples import a_prompt


class Core:
    """vLLM's front end and core: notes what reaches the core, in order. The first request asks it something."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.tasks: tuple[str, ...] | None = None
        self.errored = self.hangs = False
        self.never: set[int] = set()  # rows whose requests do not end
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._pause)

    async def _pause(self, mode: str, clear_cache: bool) -> None:
        self.heard.append("pause")

    async def resume_generation(self) -> None:
        self.heard.append("resume")

    async def get_supported_tasks(self) -> tuple[str, ...]:
        if self.tasks is None:
            for _ in range(5):  # a message there and one back
                await asyncio.sleep(0)
            self.tasks = ("generate",)
        return self.tasks

    async def is_paused(self) -> bool:
        if self.hangs:
            await asyncio.Event().wait()
        return False

    async def turn(self, episode: Episode) -> Turn:
        await self.get_supported_tasks()
        row = episode.request.prompt.row
        self.heard.append(f"request {row}")
        if row in self.never:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.errored:
            raise RuntimeError("a broken pipe")
        return Turn([7], [-1.0], [0], "stop")


def engine(core: Core, staleness: int = 0) -> Engine:
    rollout = {"maxTokens": 16, "staleness": staleness}
    one = Engine(run_config(rollout=rollout, placement={"mode": "Separated"}), 0, "cpu", [0], [], 1)
    one.llm, one._turn = core, core.turn  # type: ignore[method-assign]
    one.speech = SimpleNamespace(text=lambda *_: "made")  # type: ignore[assignment]
    return one


def requests(*rows: int) -> list[Request]:
    return [Request(prompt=a_prompt(row), seed=None, temperature=1.0, max_tokens=16) for row in rows]


async def test_the_first_batch_after_a_start_is_held_until_all_of_it_is_there() -> None:
    core = Core()
    one = engine(core)
    await asyncio.gather(*(one._completions(requests(*rows), 60.0, (at, 2)) for at, rows in ((1, [1, 2]), (0, [0]))))
    assert core.heard == ["pause", "request 0", "request 1", "request 2", "resume"], "in the calls' order"
    await one._completions(requests(3), 60.0)
    assert core.heard[5:] == ["request 3"], "it joined those that run"


async def test_a_sync_begins_before_a_batch_is_held_or_after_it_goes_on() -> None:
    """Else the batch's resume would be the sync's."""
    core = Core()
    one = engine(core)
    work = one._completions(requests(0, 1), 60.0, (0, 1))
    batch, pause = asyncio.create_task(work), asyncio.create_task(one.pause())
    await asyncio.gather(batch, pause)
    assert core.heard == ["pause", "request 0", "request 1", "resume", "pause"]
    with pytest.raises(RuntimeError, match="part of a sync"):
        await one._completions(requests(2), 60.0)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_a_deadline_takes_only_what_is_not_finished(staleness: int) -> None:
    core = Core()
    core.never = {1}
    made = await engine(core, staleness)._completions(requests(0, 1, 2), 0.05)
    assert [sample and sample.prompt.row for sample in made] == [0, None, 2]


async def test_an_engine_that_finished_nothing_in_a_deadline_says_so_with_the_field() -> None:
    core = Core()
    core.never = {0, 1}
    one = engine(core)
    said = r"of 2 completions it finished 0 in 0\.05 s \(spec\.rollout\.deadlineSeconds\): raise it, or lower"
    with pytest.raises(DeadlineExceeded, match=said):
        await one._completions(requests(0, 1), 0.05)
    waiting = asyncio.create_task(one._completions(requests(0, 1), 0.05))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    one._ended += 1  # of another call: it is not that nothing goes on
    assert await waiting == [None, None]


async def test_a_core_that_does_not_answer_past_a_deadline_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    core = Core()
    core.never, core.hangs = {1}, True
    said = r"engine 0 hangs: of 2 completions it finished 1 in 0\.05 s, and does not answer"
    with pytest.raises(EngineFailed, match=said):
        await engine(core)._completions(requests(0, 1), 0.05)
    one = engine(core, staleness=1)
    one._whole = lambda seconds: asyncio.sleep(0)  # type: ignore[method-assign]
    one.stale = True  # a sync is under way, which has a deadline of its own
    assert await one._completions(requests(1), 0.05) == [None]


async def test_whatever_a_request_meets_first_a_dead_core_is_a_lost_engine() -> None:
    core = Core()
    core.errored = True
    with pytest.raises(EngineFailed, match="engine 0 is dead: a broken pipe"):
        await engine(core)._completions(requests(0), 60.0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"head_dtype": "float32"}),
        ({"hf_overrides": {"rope_theta": 1e6}}, {"head_dtype": "float32", "rope_theta": 1e6}),
        ({"hf_overrides": {"head_dtype": "model"}}, {"head_dtype": "model"}),
        ({"hf_overrides": None}, {"head_dtype": "float32"}),
        ({"hf_overrides": "nothing that vLLM takes"}, "nothing that vLLM takes"),
    ],
    ids=str,
)
def test_the_head_is_the_trainers_in_float32_unless_the_spec_says_another(given: dict[str, Any], wanted: Any) -> None:
    one = Engine(run_config(rollout={"maxTokens": 16, "engineArgs": given}), 0, "cpu", [0], [], 1)
    assert one._engine_args("shm")["hf_overrides"] == wanted
