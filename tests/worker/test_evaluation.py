"""Evaluation sets: when they are due, what is asked of the engines, and what the metrics mean."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.job import EvaluationSpec
from rlhf_worker.errors import BadData, BadSpec, RewardFailed
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.feed.feed import Feed
from rlhf_worker.rollout.estimates import majority_at, pass_at
from rlhf_worker.rollout.evaluation import answer, due, evaluate, metrics
from tests.worker.configs import run_config
from tests.worker.samples import a_prompt, a_sample
from tests.worker.test_data import ROWS, Characters, jsonl


def spec(**fields: Any) -> EvaluationSpec:
    return EvaluationSpec.model_validate({"name": "a", "data": {"jsonl": {"path": "/x"}}, **fields})


@pytest.mark.parametrize(
    ("steps", "every", "when"), [(10, 4, [0, 4, 8, 10]), (8, 4, [0, 4, 8]), (3, 50, [0, 3]), (2, 1, [0, 1, 2])],
)
def test_before_the_first_step_every_so_many_and_after_the_last(steps: int, every: int, when: list[int]) -> None:
    assert [step for step in range(steps + 1) if due(spec(every_steps=every), step, steps)] == when


def score(sample: Sample, reward: float) -> ScoredSample:
    return ScoredSample(sample=sample, reward=reward, parts={"exact": reward, "length": 2.0})


def test_metrics_of_groups() -> None:
    """Two prompts of three samples: 1 of 3 and 0 of 3 right."""
    rewards = [[0, 1, 0], [0, 0, 0]]
    groups = [
        [score(a_sample(row, tokens=k + 1), value) for k, value in enumerate(values)]
        for row, values in enumerate(rewards)
    ]
    found = metrics(spec(samples=3, temperature=1), groups)
    assert found == {
        "eval/a/exact": 1 / 6, "eval/a/length": 2.0, "eval/a/mean_reward": 1 / 6, "eval/a/best_reward": 0.5,
        "eval/a/mean_length": 2.0,
        "eval/a/truncated_share": 0.0,
    }  # fmt: skip


def chosen(n: int, k: int) -> list[tuple[int, ...]]:
    return list(combinations(range(n), k))


@pytest.mark.parametrize(("n", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_mean_over_all_sets_of_k(n: int, passed: int) -> None:
    for k in range(1, n + 1):
        sets = chosen(n, k)
        assert pass_at(n, passed, k) == pytest.approx(sum(min(one) < passed for one in sets) / len(sets))


def test_pass_at_k_of_the_paper() -> None:
    """Also where its binomials are beyond the floats; k = 1 is the share, k = n whether any passed."""
    assert [pass_at(4, 1, 2), pass_at(200, 7, 1), pass_at(9, 1, 9)] == pytest.approx([0.5, 0.035, 1.0])
    assert pass_at(1024, 1, 512) == pytest.approx(0.5)


def majority(answers: list[str | None], passed: list[bool], k: int) -> float:
    """By hand: over every set of k."""
    total = 0.0
    for one in chosen(len(answers), k):
        votes = Counter(answers[i] for i in one if answers[i] is not None)
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        shares = [[passed[i] for i in range(len(answers)) if answers[i] == answer] for answer in best]
        total += sum(sum(share) / len(share) for share in shares) / max(1, len(best))
    return total / len(chosen(len(answers), k))


@pytest.mark.parametrize("seed", range(12))
def test_maj_at_k_is_the_mean_over_all_sets_of_k(seed: int) -> None:
    """Ties, answers that are right now and then, and completions without one."""
    rng = random.Random(seed)
    answers: list[str | None] = [rng.choice(["1", "2", "3", "4", None]) for _ in range(rng.randint(1, 9))]
    passed = [rng.random() < 0.5 if seed % 2 else answer == "2" for answer in answers]
    for k in range(1, len(answers) + 1):
        assert majority_at(answers, passed, k) == pytest.approx(majority(answers, passed, k)), (answers, passed, k)


def test_maj_at_k_of_many_completions() -> None:
    """Of 1,024 completions 60 % are right and the others all different: any 64 of them elect the right answer."""
    right = [True] * 614 + [False] * 410
    assert majority_at(["7"] * 614 + [str(-i) for i in range(410)], right, 64) == pytest.approx(1.0)
    assert majority_at([None] * 1024, right, 64) == 0.0


def test_pass_and_majority_of_a_set() -> None:
    """Two prompts of four: answers 4 4 5 - and 1 2 2 2, of which 4 and 1 are right."""
    texts = [["so 4", "4? 4", "4 or 5", "none"], ["1", "2", "2", "2"]]
    groups = [
        [score(replace(a_sample(row), text=text), float(text[-1] == "41"[row])) for text in row_texts]
        for row, row_texts in enumerate(texts)
    ]
    found = metrics(spec(samples=4, temperature=1, pass_at=[1, 2, 4], maj_at=[1, 3, 4], answer_pattern=r"(\d)"), groups)
    assert {name: found[f"eval/a/pass_at_{k}"] for name, k in (("1", 1), ("2", 2), ("4", 4))} == pytest.approx(
        {"1": 3 / 8, "2": (5 / 6 + 1 / 2) / 2, "4": 1.0}
    )
    assert found["eval/a/maj_at_1"] == pytest.approx(3 / 8) and found["eval/a/maj_at_4"] == 0.5
    by_hand = [
        majority([answer(text, r"(\d)") for text in row], [text[-1] == "41"[i] for text in row], 3)
        for i, row in enumerate(texts)
    ]
    assert found["eval/a/maj_at_3"] == pytest.approx(sum(by_hand) / 2)
    whole = metrics(
        spec(samples=4, temperature=1, pass_at=[4], maj_at=[4], pass_reward=2.5),
        [[score(item.sample, 2.5 - 1e-12) for item in groups[1]]],
    )
    assert (whole["eval/a/pass_at_4"], whole["eval/a/maj_at_4"]) == (1.0, 1.0)


class Engines:
    """Answers each prompt with spec.samples completions that are worth its row, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def judge(self, given: EvaluationSpec, prompts: list[Prompt]) -> list[list[ScoredSample]]:
        self.calls.append((given.name, [prompt.uid for prompt in prompts]))
        return [[score(a_sample(prompt.row), prompt.row)] * given.samples for prompt in prompts]


def test_only_sets_that_are_due_are_drawn_and_in_calls_of_a_steps_size() -> None:
    data = {"jsonl": {"path": "/x"}}
    sets = [
        {"name": "a", "data": data, "everySteps": 2},
        {"name": "b", "data": data, "everySteps": 3, "samples": 8, "temperature": 1}
    ]
    config = run_config(
        steps=10, evaluation=sets, rollout={"promptsPerStep": 2, "samplesPerPrompt": 4, "maxTokens": 16},
    )
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
        data=train, evaluation=[{"name": "held-out", "data": data, **fields}],
        rewards=[{"name": "r", "type": "python", "code": code}],
        checkpoint={"path": str(tmp_path)},
    )  # fmt: skip
    feed = Feed(config)
    feed.open()
    return feed


def test_the_feed_draws_the_first_rows_in_the_order_of_the_source_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = opened(tmp_path, monkeypatch, jsonl(tmp_path / "test.jsonl", ROWS), limit=3)
    before = feed.sampler_state()
    prompts = feed.draw_evaluation("held-out")
    assert [
        (p.uid, p.text, p.fields["answer"]) for p in prompts
    ] == [(f"held-out:{i}", f"say {i}", i) for i in range(3)]
    assert feed.draw_evaluation("held-out") == prompts
    assert feed.sampler_state() == before
    feed.scorer.close()


def reward(value: float, words: str = "") -> dict[str, Any]:
    body = f"raise ValueError('{words}')" if words else f"return {value}"
    return {"name": "own", "type": "python", "code": f"def reward(prompt, completion, **row): {body}"}


def test_a_set_has_rewards_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = opened(tmp_path, monkeypatch, jsonl(tmp_path / "test.jsonl", ROWS), rewards=[{**reward(0.25), "weight": 2}])
    (ours,), (theirs,) = feed.score([a_sample()]), feed.score([a_sample()], {}, "held-out")
    assert (ours.parts, ours.reward) == ({"r": 1.0}, 1.0) and (theirs.parts, theirs.reward) == ({"own": 0.25}, 0.5)
    feed.try_rewards()
    for scorer in (feed.scorer, *feed.judges.values()):
        scorer.close()


def test_a_sets_reward_that_fails_names_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = opened(
        tmp_path, monkeypatch, jsonl(tmp_path / "test.jsonl", ROWS), rewards=[{**reward(0, "no"), "retries": 0}]
    )
    with pytest.raises(
        RewardFailed,
        match=r"(?s)evaluation\[held-out\]: rewards\[own\] failed once .* on prompt held-out:0.*ValueError: no",
    ):
        feed.try_rewards()
    for scorer in (feed.scorer, *feed.judges.values()):
        scorer.close()
    with pytest.raises(BadSpec, match=r"evaluation\[held-out\]: .*own.*"):
        opened(
            tmp_path,
            monkeypatch,
            jsonl(tmp_path / "test.jsonl", ROWS),
            rewards=[{**reward(0), "code": "import nope_nope"}],
        )


@pytest.mark.parametrize(
    ("rows", "more", "error", "message"),
    [
        ([], {}, BadData, r"evaluation\[held-out\]: data\.jsonl .*test\.jsonl: there are no rows"),
        ([{"text": "a"}], {}, BadData, r"evaluation\[held-out\]: data\.jsonl: .*line 1: no 'prompt'"),
        (
            [{"prompt": "x" * 2000}], {}, BadData,
            r"evaluation\[held-out\]: .*2001 tokens, data\.maxPromptTokens is 1024",
        ),
        ([{"prompt": "a"}], {"systemPrompt": "be brief"}, BadSpec, r"evaluation\[held-out\]: data\.systemPrompt needs "
            r"a chat template"),
    ],
)
def test_bad_data_of_a_set_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], more: dict[str, Any], error: type[Exception],
    message: str
) -> None:
    with pytest.raises(error, match=message):
        opened(tmp_path, monkeypatch, {**jsonl(tmp_path / "test.jsonl", rows), **more})


@pytest.mark.parametrize(("fields", "column", "words"), [
    ({"rewards": [{"name": "own", "type": "http", "url": "http://h/score"}]}, {"seen": float("nan")}, "no JSON"),
    ({"environment": {"code": "class Environment: ..."}}, {"self": 1}, "'self'"),
])  # fmt: skip
def test_a_set_s_columns_are_held_against_its_own_rewards_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], column: dict[str, Any], words: str
) -> None:
    rows = [{"prompt": "say 1", "answer": 1, **column}]
    with pytest.raises(BadData, match=rf"evaluation\[held-out\]: .*{words}"):
        opened(tmp_path, monkeypatch, jsonl(tmp_path / "test.jsonl", rows), **fields)
