"""Evaluation sets: when they are due, what is asked of the engines, and what the metrics mean."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_api.job import EvaluationSpec
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.feed.feed import Feed
from rlhf_worker.rollout.evaluation import due, evaluate, metrics
from tests.worker.configs import run_config
from tests.worker.samples import a_prompt, a_sample
from tests.worker.test_data import ROWS, Characters, jsonl


def spec(**fields: Any) -> EvaluationSpec:
    return EvaluationSpec.model_validate({"name": "a", "data": {"jsonl": {"path": "/x"}}, **fields})


@pytest.mark.parametrize(("steps", "every", "when"), [(10, 4, [0, 4, 8, 10]), (8, 4, [0, 4, 8]), (3, 50, [0, 3]), (2, 1, [0, 1, 2])])
def test_before_the_first_step_every_so_many_and_after_the_last(steps: int, every: int, when: list[int]) -> None:
    assert [step for step in range(steps + 1) if due(spec(every_steps=every), step, steps)] == when


def score(sample: Sample, reward: float) -> ScoredSample:
    return ScoredSample(sample=sample, reward=reward, parts={"exact": reward, "length": 2.0})


def test_metrics_of_groups() -> None:
    """Two prompts of three samples: 1 of 3 and 0 of 3 right."""
    rewards = [[0, 1, 0], [0, 0, 0]]
    groups = [[score(a_sample(row, tokens=k + 1), value) for k, value in enumerate(values)] for row, values in enumerate(rewards)]
    found = metrics(spec(samples=3, temperature=1), groups)
    assert found == {
        "eval/a/exact": 1 / 6, "eval/a/length": 2.0, "eval/a/mean_reward": 1 / 6, "eval/a/best_reward": 0.5, "eval/a/mean_length": 2.0,
        "eval/a/truncated_share": 0.0,
    }  # fmt: skip


class Engines:
    """Answers each prompt with spec.samples completions that are worth its row, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def judge(self, given: EvaluationSpec, prompts: list[Prompt]) -> list[list[ScoredSample]]:
        self.calls.append((given.name, [prompt.uid for prompt in prompts]))
        return [[score(a_sample(prompt.row), prompt.row)] * given.samples for prompt in prompts]


def test_only_sets_that_are_due_are_drawn_and_in_calls_of_a_steps_size() -> None:
    data = {"jsonl": {"path": "/x"}}
    sets = [{"name": "a", "data": data, "everySteps": 2}, {"name": "b", "data": data, "everySteps": 3, "samples": 8, "temperature": 1}]
    config = run_config(steps=10, evaluation=sets, rollout={"promptsPerStep": 2, "samplesPerPrompt": 4, "maxTokens": 16})
    prompts = {"a": [a_prompt(i) for i in range(10)], "b": [a_prompt(0), a_prompt(1)]}
    engines = Engines()

    def feed(method: str, name: str) -> list[Prompt]:
        assert method == "draw_evaluation"
        return prompts[name]

    found = evaluate(config, 2, engines.judge, feed)
    assert engines.calls == [("a", ["0:0", "0:1", "0:2", "0:3", "0:4"]), ("a", ["0:5", "0:6", "0:7", "0:8", "0:9"])]
    assert found["eval/a/mean_reward"] == 4.5
    assert found["eval/a/total_seconds"] >= 0
    engines.calls.clear()
    assert evaluate(config, 3, engines.judge, feed)["eval/b/best_reward"] == 0.5
    assert engines.calls == [("b", ["0:0"]), ("b", ["0:1"])]
    assert evaluate(config, 1, engines.judge, feed) == {}


def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], **fields: Any) -> Feed:
    monkeypatch.setattr("rlhf_worker.feed.feed.load_tokenizer", lambda model: Characters())
    monkeypatch.setattr("rlhf_worker.feed.feed.embedding_rows", lambda model: 1000)
    code = "def reward(prompt, completion, **row): return 1.0"
    train = jsonl(tmp_path / "train.jsonl", ROWS)
    config = run_config(
        data=train, evaluation=[{"name": "held-out", "data": data, **fields}], rewards=[{"name": "r", "type": "python", "code": code}],
        checkpoint={"path": str(tmp_path)},
    )  # fmt: skip
    feed = Feed(config)
    feed.open()
    return feed


def test_the_feed_draws_the_first_rows_in_the_order_of_the_source_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = opened(tmp_path, monkeypatch, jsonl(tmp_path / "test.jsonl", ROWS), limit=3)
    before = feed.sampler_state()
    prompts = feed.draw_evaluation("held-out")
    assert [(p.uid, p.text, p.fields["answer"]) for p in prompts] == [(f"held-out:{i}", f"say {i}", i) for i in range(3)]
    assert feed.draw_evaluation("held-out") == prompts
    assert feed.sampler_state() == before
    feed.scorer.close()


@pytest.mark.parametrize(
    ("rows", "more", "error", "message"),
    [
        ([], {}, BadData, r"evaluation\[held-out\]: data\.jsonl .*test\.jsonl: there are no rows"),
        ([{"text": "a"}], {}, BadData, r"evaluation\[held-out\]: data\.jsonl: .*line 1: no 'prompt'"),
        ([{"prompt": "x" * 2000}], {}, BadData, r"evaluation\[held-out\]: .*2001 tokens, data\.maxPromptTokens is 1024"),
        ([{"prompt": "a"}], {"systemPrompt": "be brief"}, BadSpec, r"evaluation\[held-out\]: data\.systemPrompt needs a chat template"),
    ],
)
def test_bad_data_of_a_set_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        opened(tmp_path, monkeypatch, {**jsonl(tmp_path / "test.jsonl", rows), **more})
