"""Tokens that leave vLLM's core together: the same tokens, numbers and versions as one by one, in fewer messages.

The oracle is a twin: the same request with the same seed in the same steps, that streams and so is sent token by token.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.config import SchedulerConfig
from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput
from vllm.v1.outputs import LogprobsLists

from rlhf_api.job import SamplingSpec
from rlhf_worker.engines import scheduler
from rlhf_worker.engines.engine import Engine, merge_outputs
from rlhf_worker.engines.scheduler import Window
from rlhf_worker.experience import Prompt
from rlhf_worker.rollout.episode import Request
from tests.worker.test_vllm_config import engine
from tests.worker.test_vllm_sampling import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
TOKENS = 100
MESSAGES = TOKENS // scheduler.TOKENS + 3  # its first token, what is left at its end, and its last


def test_this_vllm_is_the_one_that_the_scheduler_was_written_for() -> None:
    assert scheduler.misfit(Scheduler) == scheduler.misfit(AsyncScheduler) == ""


def configured(**scheduler_config: Any) -> Any:
    """As much of vLLM's configuration as `merge_outputs` looks at."""
    values = {"max_model_len": 64, "is_encoder_decoder": False, "async_scheduling": True} | scheduler_config
    return SimpleNamespace(scheduler_config=SchedulerConfig(**values))


@pytest.mark.parametrize(("asynchronous", "name"), [(True, "MergingAsyncScheduler"), (False, "MergingScheduler")])
def test_the_scheduler_goes_on_as_the_one_that_vllm_chose(asynchronous: bool, name: str) -> None:
    config = configured(async_scheduling=asynchronous)
    chosen = config.scheduler_config.get_scheduler_cls()
    assert merge_outputs(config) == ""
    found = config.scheduler_config.get_scheduler_cls()
    assert found is getattr(scheduler, name) and issubclass(found, chosen)


def test_a_scheduler_that_the_user_names_is_used() -> None:
    config = configured(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    assert merge_outputs(config) == ""
    assert config.scheduler_config.get_scheduler_cls() is Scheduler


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FIELDS", scheduler.FIELDS - {"events"}, "EngineCoreOutput differs in events"),
        ("ROWS", ("logprobs",), "LogprobsLists has"),
        ("METHODS", ("update_from_output", "nope"), "Scheduler has no nope"),
        ("MERGING", {}, "its scheduler is AsyncScheduler"),
    ],
)
def test_another_vllm_keeps_its_own_scheduler(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, words: str
) -> None:
    monkeypatch.setattr(scheduler, name, value)
    config = configured()
    assert merge_outputs(config).startswith(words)
    assert config.scheduler_config.get_scheduler_cls() is AsyncScheduler


def test_a_vllm_whose_insides_moved_keeps_its_own_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("rlhf_worker.engines.scheduler")
    monkeypatch.setitem(sys.modules, "rlhf_worker.engines.scheduler", None)  # which fails to import
    config = configured()
    assert "halted" in merge_outputs(config)
    assert config.scheduler_config.get_scheduler_cls() is AsyncScheduler


def arrays(rows: int, columns: int, of: int) -> LogprobsLists:
    """Numbers that tell their step, row and column."""
    values = 1000 * of + 10 * np.arange(rows)[:, None] + np.arange(columns)
    return LogprobsLists(values, -values.astype(np.float32), values[:, 0] + 1)


def test_a_window_gives_each_request_its_rows_and_its_columns_of_steps_of_any_width() -> None:
    window, rows = Window(), list[int]()
    for of, (count, columns) in enumerate([(2, 3), (70, 4), (3, 200)]):
        window.add(arrays(count, columns, of))
        rows += window.slice_request(1, 1)
    assert window.ids.shape[1] == scheduler.COLUMNS
    ids, logprobs, ranks, _ = window.taken(rows, 3)
    assert ids.tolist() == [[10, 11, 12], [1010, 1011, 1012], [2010, 2011, 2012]]
    assert np.array_equal(logprobs, -ids) and ranks.tolist() == [11, 1011, 2011]
    assert window.whole(window.slice_request(2, 1)).logprobs.tolist() == [[-2020.0 - i for i in range(200)]]
    window.clear()
    window.add(arrays(2, 1, 5)._replace(cu_num_generated_tokens=[0, 0, 2]))  # two tokens in a step, as drafts give
    assert window.slice_request(1, 2) == (0, 1)
    assert window.taken([0, 1], 1).logprob_token_ids.tolist() == [[5000], [5010]]


class Twins:
    """Requests to one engine, and what its core sends for each."""

    def __init__(self, made: Engine) -> None:
        self.made, self.llm = made, made._running()
        self.messages: Counter[str] = Counter()
        self.events: Counter[EngineCoreEventType] = Counter()
        process = self.llm.output_processor.process_outputs

        def counted(outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
            self.messages.update(output.request_id.split("-")[0] for output in outputs)
            self.events.update(event.type for output in outputs for event in output.events or ())
            return process(outputs, *args, **kwargs)

        self.llm.output_processor.process_outputs = counted

    async def one(self, name: str, *, streams: bool, seen: Callable[[int], None] = lambda _: None,
        **options: Any) -> CompletionOutput:
        """Ignores the end of a sequence, so that all are of TOKENS; seen: told of the tokens as they come."""
        kind = RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            **{"seed": 5, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 0} | options, output_kind=kind,
            flat_logprobs=True, detokenize="stop" in options,
        )
        async for output in self.llm.generate(tokens_input([5, 6, 7, 8]), params, name):
            seen(len(output.outputs[0].token_ids))
        found: CompletionOutput = output.outputs[0]
        return found

    async def pair(self, seen: Callable[[int], None] = lambda _: None, **options: Any) -> list[asyncio.Task[Any]]:
        """Both in the same steps from the first on. `seen` is of the one that streams."""
        await self.llm.get_supported_tasks()
        await self.made._hold()
        tasks = [asyncio.create_task(self.one("merged", streams=False, **options)),
            asyncio.create_task(self.one("streamed", streams=True, seen=seen, **options))]
        await asyncio.sleep(0)
        await self.llm.resume_generation()
        return tasks

    async def both(self, **options: Any) -> None:
        assert_equal(*await asyncio.gather(*await self.pair(**options)))


def assert_equal(one: CompletionOutput, other: CompletionOutput) -> None:
    assert one.token_ids == other.token_ids and one.weight_versions == other.weight_versions
    assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
    assert one.logprobs.token_ids == other.logprobs.token_ids and one.logprobs.ranks == other.logprobs.ranks
    assert one.logprobs.logprobs == pytest.approx(other.logprobs.logprobs, abs=1e-5)
    assert one.logprobs.start_indices == other.logprobs.start_indices


def with_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Engine, Twins], Awaitable[None]],
    **rollout: Any) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    async def run() -> None:
        made = engine(monkeypatch, tiny, maxTokens=TOKENS, **rollout)
        await made.start("shm")
        try:
            await work(made, Twins(made))
        finally:
            await made.close()

    asyncio.run(run())


def test_many_tokens_a_message_are_the_tokens_one_by_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(made: Engine, twins: Twins) -> None:
        await twins.both()
        assert twins.messages["streamed"] == TOKENS and twins.messages["merged"] <= MESSAGES
        ends = (await twins.one("end", streams=True)).token_ids[40:41]
        await twins.both(stop_token_ids=ends)
        await asyncio.gather(twins.both(logprobs=3), twins.one("other", streams=False, logprobs=7, seed=6))
        await beside_a_sync(made, twins)
        await a_text_that_ends_it(twins)
        await cut_off(made, twins)
        await carried_over(made, twins)

    with_engine(tiny, monkeypatch, work)


async def beside_a_sync(made: Engine, twins: Twins) -> None:
    """Each token keeps the version that made it, and no token that was kept gets the next one."""
    twins.messages.clear()
    some = asyncio.Event()
    tasks = await twins.pair(seen=lambda count: some.set() if count > 40 else None)
    await some.wait()
    await made.pause()
    await made.adopt(1)
    one, other = await asyncio.gather(*tasks)
    assert [span.version for span in one.weight_versions] == ["0", "1"]
    assert_equal(one, other)
    assert twins.messages["merged"] <= MESSAGES + 1


async def a_text_that_ends_it(twins: Twins) -> None:
    """Its tokens come one by one: whoever looks for the text must not look late."""
    twins.messages.clear()
    one = await twins.one("text", streams=False, stop=["nowhere"])
    assert len(one.token_ids) == twins.messages["text"] == TOKENS


async def cut_off(made: Engine, twins: Twins) -> None:
    """What was kept of an aborted request holds up no pause, and nothing of it remains."""
    late = asyncio.create_task(twins.one("late", streams=False))
    some = asyncio.Event()
    beside = asyncio.create_task(twins.one("beside", streams=True, seen=lambda n: some.set() if n > 5 else None))
    await some.wait()
    late.cancel()
    await made.pause()
    await made.adopt(2)
    assert [span.version for span in (await beside).weight_versions] == ["1", "2"]
    await twins.both()


async def carried_over(made: Engine, twins: Twins) -> None:
    """What was kept of a completion that is cut off comes out too, with the sets that it was drawn from; and it goes on
    from there under the next weights.
    """
    prompt, drawn = Prompt(uid="0:1", epoch=0, row=1, token_ids=[5, 6, 7, 8], text="", fields={}), SamplingSpec(
        top_k=5, min_tokens=TOKENS,
    )
    asked = Request(prompt=prompt, seed=5, temperature=1.0, max_tokens=TOKENS, sampling=drawn, trained=True)
    (free,) = await made._completions([asked], 60.0)
    some = asyncio.Event()
    work = asyncio.create_task(made._completions([asked], 60.0))
    beside = asyncio.create_task(twins.one("beside", streams=True, seen=lambda n: some.set() if n > 50 else None))
    await some.wait()
    await made.interrupt()
    (cut,) = await work
    await beside
    assert free is not None and cut is not None and not cut.finished and 50 <= len(cut.token_ids) < TOKENS
    assert not made._live
    await made.pause()
    await made.adopt(made.version + 1)
    (whole,) = await made._completions([replace(asked, begun=cut)], 60.0)
    assert whole is not None and whole.finished and len(whole.token_ids) == TOKENS
    for sample in (free, whole):
        for name in ("token_ids", "logprobs", "support"):
            first = getattr(sample, name)[: len(cut.token_ids)]
            assert first == pytest.approx(getattr(cut, name), abs=1e-4), name
    left = TOKENS - len(cut.token_ids)
    assert whole.versions.tolist() == [made.version - 1] * len(cut.token_ids) + [made.version] * left
    assert (whole.support[:, 0] == whole.token_ids).all() and all(whole.mask)  # type: ignore[index]
    await made._hold()
    waiting = asyncio.create_task(made._completions([replace(asked, begun=cut)], 60.0))
    for _ in range(20):  # until it waits in the core
        await asyncio.sleep(0)
    await made.interrupt()  # before it has any
    (same,) = await waiting
    assert same is not None and not same.finished and same.token_ids.tolist() == cut.token_ids.tolist()


PROMPT = Prompt(uid="0:0", epoch=0, row=0, token_ids=[5 + i % 60 for i in range(300)], text="", fields={})
BLOCKS = 256  # tokens of whole blocks in it, which have 128 on a CPU
ASKED = [Request(prompt=PROMPT, seed=i, temperature=1.0, max_tokens=4) for i in range(8)]
LONG = {"max_model_len": 400, "disable_log_stats": False}


def cached(made: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each request that ends from now on, how many tokens of its prompt were there."""
    final, found = made._final, list[int]()

    async def noted(*args: Any) -> Any:
        output = await final(*args)
        found.append(output.num_cached_tokens)
        return output

    monkeypatch.setattr(made, "_final", noted)
    return found


def test_the_samples_of_a_prompt_prefill_it_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that begin in the same step; and again after a sync."""

    async def work(made: Engine, twins: Twins) -> None:
        for version in (1, 2):
            found = cached(made, monkeypatch)
            await made.generate(ASKED, 60.0)
            assert sorted(found) == [0] + [BLOCKS] * 7
            await made.pause()
            await made.adopt(version)

    with_engine(tiny, monkeypatch, work, engineArgs=LONG)


def test_with_staleness_a_sync_leaves_what_runs_its_cache_and_gives_it_to_no_other(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(made: Engine, twins: Twins) -> None:
        found = cached(made, monkeypatch)
        await made.generate(ASKED[:1], 60.0)
        await made.generate(ASKED[:1], 60.0)
        await beside_a_sync(made, twins)
        await made.generate(ASKED[:1], 60.0)
        await made.generate(ASKED[:1], 60.0)
        assert found == [0, BLOCKS, 0, BLOCKS]
        assert EngineCoreEventType.PREEMPTED not in twins.events and twins.events[EngineCoreEventType.SCHEDULED]

    with_engine(tiny, monkeypatch, work, engineArgs=LONG, staleness=1)
