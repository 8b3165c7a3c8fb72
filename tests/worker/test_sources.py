"""Several sources: turns by weight, exact resume, and rewards that judge their own sources only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.job import DataSpec, RewardSpec
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import Prompt, Sample, ScoredSample
from rlhf_worker.feed.data import Mixture, PromptSampler, samplers
from rlhf_worker.feed.feed import Feed
from rlhf_worker.feed.rows import Origin
from rlhf_worker.loop import of_sources, source_metrics, step_metrics
from rlhf_worker.rewards.scorer import Scorer
from tests.worker.configs import run_config
from tests.worker.samples import a_sample
from tests.worker.test_data import Characters, jsonl

LENGTHS = {"code": 5, "chat": 3, "math": 7}
WEIGHTS = {"code": 1.0, "chat": 0.5, "math": 2.5}
SAYS = """
calls = []
def reward(prompt, completion, **row):
    if "WRONG" in prompt:
        raise LookupError(prompt)
    return float(len(prompt))
"""


def rows(name: str) -> list[dict[str, Any]]:
    return [{"text": f"{name} {i}", "n": i} for i in range(LENGTHS[name])]


def data(tmp_path: Path, **sources: dict[str, Any]) -> dict[str, Any]:
    """Of three sources; `sources`: further fields of each."""
    each = [
        {"name": name, "weight": weight, **jsonl(tmp_path / f"{name}.jsonl", rows(name)), **sources.get(name, {})}
        for name, weight in WEIGHTS.items()
    ]
    return {"sources": each, "promptField": "text"}


def mixture(raw: dict[str, Any], state: dict[str, Any] | None = None) -> PromptSampler | Mixture:
    spec = DataSpec.model_validate(raw)
    origins = {
        source.name: Origin(field=f"data.sources[{source.name}]", source=source.name, rewards=source.rewards)
        for source in spec.sources or ()
    }
    made = samplers(spec, Characters(), 1000, origins)
    if state is not None:
        made.restore(state)
    return made


def uids(prompts: list[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


def test_every_stretch_of_prompts_has_the_sources_by_their_weights(tmp_path: Path) -> None:
    prompts = mixture(data(tmp_path)).next(80)
    for end in range(1, 81):
        for name, weight in WEIGHTS.items():
            assert abs(sum(prompt.source == name for prompt in prompts[:end]) - end * weight / 4) <= 1, (end, name)
    assert len(set(uids(prompts))) == 80
    assert {prompt.text.split()[0] for prompt in prompts if prompt.source == "math"} == {"math"}
    assert all(prompt.uid == f"{prompt.source}:{prompt.epoch}:{prompt.row}" for prompt in prompts)


def test_the_turns_are_these_for_ever(tmp_path: Path) -> None:
    """A change here makes every saved checkpoint resume on other prompts."""
    turns = [prompt.source for prompt in mixture(data(tmp_path)).next(8)]
    assert turns == ["math", "code", "math", "chat", "math", "math", "code", "math"]


def test_resume_anywhere_is_the_uninterrupted_order(tmp_path: Path) -> None:
    raw = data(tmp_path)
    whole = mixture(raw).next(40)
    for stop in range(40):
        first = mixture(raw)
        before = [prompt for size in (stop // 3, stop - stop // 3) for prompt in first.next(size)]
        state = json.loads(json.dumps(first.state()))
        second = mixture(raw, state)
        assert second.state() == state
        assert second.again(uids(whole[3:9])) == whole[3:9]
        assert before + second.next(40 - stop) == whole


def test_dropped_prompts_do_not_change_a_sources_share(tmp_path: Path) -> None:
    jsonl(tmp_path / "long.jsonl", [{"text": "x" * 50}, *rows("math"), {"text": "y" * 50}])
    raw = data(tmp_path, math={"jsonl": {"path": str(tmp_path / "long.jsonl")}}) | {
        "maxPromptTokens": 20,
        "overlongPrompts": "drop",
    }
    mixed = mixture(raw)
    assert "data.sources[math].jsonl" in mixed.check(1000) and "2 of 9 prompts" in mixed.check(1000)
    prompts = mixed.next(40)
    assert sum(prompt.source == "math" for prompt in prompts) == 25
    assert mixed.state()["dropped"] == sum(part["dropped"] for part in mixed.state()["sources"].values()) > 0


def test_other_sources_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    raw = data(tmp_path)
    state = mixture(raw).state()
    fewer = raw | {"sources": raw["sources"][:2]}
    alone = {"jsonl": raw["sources"][0]["jsonl"], "promptField": "text"}
    single = samplers(DataSpec.model_validate(alone), Characters(), 1000, {"": Origin()})
    with pytest.raises(BadData, match="made with code, chat, math"):
        mixture(fewer, state)
    with pytest.raises(BadData, match="made with one source"):
        mixture(raw, single.state())
    with pytest.raises(BadData, match="made with other data"):
        single.restore(state)


def test_what_is_wrong_with_each_source_is_told_at_once(tmp_path: Path) -> None:
    raw = data(
        tmp_path, code={"promptField": "q"}, chat={"jsonl": {"path": "/none"}}, math={"systemPrompt": "be brief"}
    )
    with pytest.raises(BadSpec) as caught:
        mixture(raw)
    for words in (
        "data.sources[code].jsonl: ",
        "data.sources[chat].jsonl.path: /none",
        "data.systemPrompt needs a chat template",
    ):
        assert words in str(caught.value)


def judge(name: str, **fields: Any) -> RewardSpec:
    return RewardSpec.model_validate(
        {"name": name, "type": "python", "code": SAYS, "retries": 0, "workers": 1, **fields}
    )


def sample(prompt: Prompt, text: str = "yes") -> Sample:
    return replace(a_sample(tokens=1), prompt=prompt, text=text)


def a_prompt(source: str, rewards: tuple[str, ...] | None, text: str = "four") -> Prompt:
    return Prompt(
        uid=f"{source}:0:0",
        epoch=0,
        row=0,
        token_ids=[1],
        text=text,
        fields={"prompt": text},
        source=source,
        rewards=rewards,
    )


def test_a_reward_is_not_called_for_what_it_does_not_judge() -> None:
    """`first` would raise for the second sample, and so end the run."""
    model = RewardSpec.model_validate({"name": "model", "type": "model", "model": {"path": "/m"}, "weight": 10.0})
    samples = [
        sample(a_prompt("a", ("first",))),
        sample(a_prompt("b", ("second", "model"), "WRONG?")),
        sample(a_prompt("c", None)),
    ]
    careful = judge("second", code="def reward(prompt, completion, **row): return 7.0", weight=2.0)
    with Scorer([judge("first"), careful, model]) as scorer:
        scored = scorer.score(samples, {"model": [0.5, 0.25]})
    assert [item.parts for item in scored] == [
        {"first": 4.0, "second": 0.0, "model": 0.0},
        {"first": 0.0, "second": 7.0, "model": 0.5},
        {"first": 4.0, "second": 7.0, "model": 0.25},
    ]  # fmt: skip
    assert [item.reward for item in scored] == [4.0, 19.0, 20.5]


def test_metrics_of_a_source_are_of_its_own_samples_and_rewards() -> None:
    a, b = sample(a_prompt("a", ("first",))), sample(a_prompt("b", None))
    parts = [{"first": 1.0, "second": 0.0, "environment": 3.0}, {"first": 0.5, "second": 2.0, "environment": 4.0}]
    scored = [
        ScoredSample(sample=s, reward=sum(p.values()), parts=p)
        for s, p in ((a, parts[0]), (b, parts[1]), (b, parts[1]), (a, parts[0]))
    ]
    assert source_metrics(scored) == {
        "source/a/first": 1.0, "source/a/environment": 3.0, "source/a/mean": 4.0,
        "source/a/mean_length": 1.0, "source/a/sample_share": 0.5,
        "source/b/first": 0.5, "source/b/second": 2.0, "source/b/environment": 4.0, "source/b/mean": 6.5,
        "source/b/mean_length": 1.0, "source/b/sample_share": 0.5,
    }  # fmt: skip
    assert source_metrics([ScoredSample(sample=sample(a_prompt("", None)), reward=1.0, parts={"first": 1.0})]) == {}


def test_a_reward_is_a_mean_over_what_it_judges_and_not_over_zeros_of_other_sources() -> None:
    a, b = sample(a_prompt("a", ("first",))), sample(a_prompt("b", ("second",)))
    parts = [{"first": 1.0, "second": 0.0}, {"first": 0.0, "second": 0.0}, {"first": 0.0, "second": 3.0}]
    scored = [ScoredSample(sample=s, reward=1.0, parts=p) for s, p in zip((a, a, b), parts, strict=True)]
    found = step_metrics(scored, {}, 1.0)
    assert (found["reward/first"], found["reward/second"]) == (0.5, 3.0)
    assert "reward/second" not in step_metrics(scored[:2], {}, 1.0)


def test_the_best_may_be_by_a_metric_of_a_source_that_the_first_step_does_not_draw(tmp_path: Path) -> None:
    raw = data(tmp_path, chat={"rewards": ["first"]}, math={"rewards": ["second"]}, code={"rewards": ["second"]})
    config = run_config(data=raw, rewards=[judge("first").to_dict(), judge("second").to_dict()])
    assert {"reward/first", "source/chat/first", "source/chat/mean", "source/math/second"} <= set(of_sources(config))
    assert not {"source/chat/second", "source/math/first"} & set(of_sources(config))


def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any], **changes: Any) -> Feed:
    monkeypatch.setattr("rlhf_worker.feed.feed.load_tokenizer", lambda model: Characters())
    monkeypatch.setattr("rlhf_worker.feed.feed.embedding_rows", lambda model: 1000)
    feed = Feed(run_config(data=raw, checkpoint={"path": str(tmp_path)}, **changes))
    feed.open()
    return feed


def test_a_feed_of_several_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = data(tmp_path, math={"rewards": ["first"]}, code={"rewards": ["second"]}, chat={"rewards": ["second"]})
    feed = opened(tmp_path, monkeypatch, raw, rewards=[judge("first").to_dict(), judge("second").to_dict()])
    feed.try_rewards()
    drawn = feed.draw([], 8)
    assert feed.draw(uids(drawn[2:4]), 0) == drawn[2:4]
    scored = feed.score([sample(prompt) for prompt in drawn])
    assert [item.parts for item in scored] == [
        {"first": 6.0, "second": 0.0} if prompt.source == "math" else {"first": 0.0, "second": 6.0} for prompt in drawn
    ]
    feed.scorer.close()


def test_what_is_wrong_with_data_and_rewards_is_told_in_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"name": "r", "type": "python", "code": "import no_such_module"}
    held_out = {"name": "held-out", "data": {"jsonl": {"path": "/none/test.jsonl"}}}
    with pytest.raises(BadSpec) as caught:
        opened(tmp_path, monkeypatch, {"jsonl": {"path": "/none/train.jsonl"}}, rewards=[broken], evaluation=[held_out])
    for words in (
        "rewards[r].code cannot be loaded",
        "data.jsonl.path: /none/train.jsonl",
        "evaluation[held-out]: data.jsonl.path: /none/test.jsonl",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("column", "environment", "refused"), [("self", True, True), ("self", False, False), ("action", True, False)]
)
def test_a_column_that_an_environment_cannot_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, environment: bool, refused: bool
) -> None:
    raw = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", column: 1}])
    rollout = {"maxTokens": 16, "environment": {"code": "class Environment: ..."} if environment else None}
    if refused:
        with pytest.raises(BadData, match=r"line 1: .* 'self'"):
            opened(tmp_path, monkeypatch, raw, rollout=rollout, rewards=[judge("r").to_dict()])
    else:
        opened(tmp_path, monkeypatch, raw, rollout=rollout, rewards=[judge("r").to_dict()]).scorer.close()
