"""Episodes: ids only grow, observations are masked, and environments can fail, hang and die without becoming samples.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.tiny_model import tokenizer
from rlhf_api.job import EnvironmentSpec, PromptsSpec
from rlhf_worker.errors import BadSpec, EnvironmentFailed
from rlhf_worker.experience import Prompt, Sample
from rlhf_worker.rollout.environment import Environments, opened
from rlhf_worker.rollout.episode import Episode, Request, Speech, Turn, request_seed
from rlhf_worker.template import Template
from tests.worker.configs import run_config

EOS = 2
CHATML = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt "
    "%}<s>assistant\n{% endif %}")
CALCULATOR = """
class Environment:
    def reset(self, prompt, answer, **row):
        self.answer = answer
    def step(self, completion):
        if completion == str(self.answer):
            return {"observation": "", "done": True, "reward": 1.0}
        return {"observation": f" {self.answer} is it", "done": False, "reward": -0.25}
"""


def speech(chat: bool = False) -> Speech:
    found = tokenizer()
    found.chat_template = CHATML
    return speaking(found, chat=chat)


def speaking(given: Any, *, chat: bool, **fields: Any) -> Speech:
    """As the engines make it, of a run whose data is this."""
    data = PromptsSpec.model_validate({"jsonl": {"path": "/p"}, "chatTemplate": chat})
    return Speech(given, Template(given, data, len(given)), **fields)


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def request(max_tokens: int = 200, **fields: Any) -> Request:
    text = "2 + 3 ="
    return Request(
        prompt=Prompt(uid="0:7", epoch=0, row=7, token_ids=ids(text), text=text, fields=fields), seed=5,
        temperature=1.0, max_tokens=max_tokens,
    )


def says(*turns: str) -> Callable[[Episode], AsyncIterator[Turn]]:
    """A policy that says these turns, ends each with its EOS, and then repeats the last."""

    async def turn(episode: Episode) -> Turn:
        made = [*ids(turns[min(episode.turns, len(turns) - 1)]), EOS][: episode.left]
        return Turn(made, [-1.0] * len(made), [episode.turns] * len(made), "stop" if made[-1] == EOS else "length")

    return turn  # type: ignore[return-value]


async def played(spec: dict[str, Any], policy: Any, wanted: Request, chat: bool = False) -> Sample:
    table = Environments(EnvironmentSpec.model_validate({"timeoutSeconds": 20.0, "workers": 1, **spec}), speech(chat))
    try:
        return await table.play(wanted, policy)
    finally:
        table.close()


async def test_a_tool_answers_and_its_tokens_are_masked() -> None:
    sample = await played({"code": CALCULATOR}, says("4", "5"), request(answer=5))
    assert sample.token_ids.tolist() == [*ids("4"), EOS, *ids(" 5 is it"), *ids("5"), EOS]
    assert sample.mask.tolist() == [True] * 2 + [False] * 8 + [True] * 2
    assert sample.logprobs.tolist() == [-1.0] * 2 + [0.0] * 8 + [-1.0] * 2
    assert sample.versions.tolist() == [0] * 10 + [1] * 2
    assert (sample.text, sample.finish_reason, sample.episode_reward) == ("4 5 is it5", "stop", 0.75)


async def test_a_chat_template_renders_the_observation_as_a_suffix() -> None:
    """What the template says of the whole conversation, token for token, although only its end was tokenised."""
    sample = await played({"code": CALCULATOR}, says("4", "5"), request(answer=5), chat=True)
    messages = [("assistant", "4"), ("user", " 5 is it"), ("assistant", "5")]
    whole = "".join(
        f"<s>{role}\n{text}</s>\n" for role, text in messages
    ).removeprefix("<s>assistant\n").removesuffix("\n")
    assert sample.token_ids.tolist() == ids(whole)
    assert [
        token for token, ours in zip(sample.token_ids.tolist(), sample.mask.tolist(), strict=True) if ours
    ] == [*ids("4"), EOS, *ids("5"), EOS]


async def test_the_calculator_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    spec = yaml.safe_load(text.split("```yaml")[1].split("```")[0])["rollout"]["environment"]
    sample = await played(spec, says("(3*7)", "x"), request(answer="21"))
    assert (sample.text, sample.episode_reward) == ("(3*7)", 0.0)
    found = Environments(EnvironmentSpec.model_validate(spec), speech())
    asked = Turn([5], [-1.0], [0], "stop")
    try:
        sample = await found.play(request(answer="21"), told(asked, found, "<<3*7>>", "it is 21"))
    finally:
        found.close()
    assert sample.episode_reward == 1.0 and sample.mask.tolist() == [True, False, False, True]


def told(turn: Turn, found: Environments, *texts: str) -> Any:
    """The same token each turn, decoded as these texts: the tiny tokenizer has no < and >."""
    each = iter(texts)
    found.speech.text = lambda before, ids, reason: next(each, "") if len(ids) == 1 else ""  # type: ignore[method-assign, assignment]

    async def play(episode: Episode) -> Turn:
        return turn

    return play


async def test_episodes_are_spread_over_the_subprocesses() -> None:
    code = ("import os\nclass Environment:\n    def reset(self, **row): pass\n    def step(self, completion): return "
        "{'observation': '', 'done': True, 'reward': float(os.getpid())}")
    table = Environments(EnvironmentSpec(code=code, workers=2, timeout_seconds=20.0), speech())
    try:
        samples = await asyncio.gather(*(table.play(request(), says("4")) for _ in range(4)))  # type: ignore[arg-type]
    finally:
        table.close()
    assert sorted(Counter(sample.episode_reward for sample in samples).values()) == [2, 2]


async def test_each_turn_goes_on_from_exactly_what_was_there() -> None:
    seen: list[list[int]] = []
    policy = says("1", "2", "3", "5")

    async def watched(episode: Episode) -> Turn:
        seen.append(episode.context)
        return await policy(episode)  # type: ignore[misc, no-any-return]

    sample = await played({"code": CALCULATOR}, watched, request(answer=5))
    seen.append([*request().prompt.token_ids, *sample.token_ids.tolist()])
    assert len(seen) == 5
    assert all(after[: len(before)] == before for before, after in pairwise(seen))


async def test_turns_and_tokens_are_bounded() -> None:
    two = await played({"code": CALCULATOR, "maxTurns": 2}, says("4"), request(answer=5))
    assert sum(token == EOS for token in two.token_ids.tolist()) == 2 and two.finish_reason == "stop"
    cut = await played({"code": CALCULATOR}, says("4"), request(answer=5, max_tokens=8))
    # 8 more do not fit before a turn
    assert (cut.token_ids.tolist(), cut.finish_reason, cut.episode_reward) == ([*ids("4"), EOS], "length", -0.25)
    within = await played({"code": CALCULATOR}, says("4", "44444444"), request(answer=5, max_tokens=13))
    assert len(within.token_ids) == 13 and within.finish_reason == "length" and within.episode_reward == -0.5


@pytest.mark.parametrize("column", ["action", "episode", "arguments", "completion", "kind", "function"])
async def test_a_column_may_have_any_name(column: str) -> None:
    code = f"""
class Environment:
    def reset(self, prompt, **row): self.value = row[{column!r}]
    def step(self, completion): return {{"observation": "", "done": True, "reward": self.value}}
"""
    row: dict[str, Any] = {column: 2.5}
    assert (await played({"code": code}, says("4"), request(**row))).episode_reward == 2.5


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (r"return {'observation': 'half \ud800', 'done': False}", "half a surrogate pair"),
        ("raise ValueError('no such tool')", "ValueError: no such tool"),
        ("import os; os._exit(3)", "its process died: exit status 3"),
        ("import time; time.sleep(100)", "no answer within 0.5 s; its process was killed"),
        ("return 'done'", "step returned 'done'"),
        ("return {'observation': 'x', 'done': False, 'reward': float('nan')}", "returned nan, a finite number is "
            "needed"),
        ("return {'observation': 'x', 'done': 0}", "step returned"),
    ],
)
async def test_a_failing_step_never_becomes_a_sample(step: str, words: str) -> None:
    code = f"class Environment:\n    def reset(self, **row): pass\n    def step(self, completion):\n        {step}\n"
    with pytest.raises(EnvironmentFailed, match=r"failed 2 times on prompt 0:7") as caught:
        await played(
            {"code": code, "retries": 1, "timeoutSeconds": 0.5 if "sleep" in step else 20.0}, says("4"), request(),
        )
    assert words in str(caught.value)


async def test_a_failing_episode_that_may_be_drawn_anew_is_an_empty_sample_with_its_failure() -> None:
    code = "class Environment:\n    def reset(self, **row): raise ValueError('no such tool')\n"
    sample = await played({"code": code, "retries": 1, "onFailure": "redraw"}, says("4"), request())
    assert "rollout.environment failed 2 times on prompt 0:7" in sample.failure and "no such tool" in sample.failure
    assert (sample.token_ids.tolist(), sample.mask.tolist(), sample.text, sample.episode_reward) == ([], [], "", None)


async def test_columns_of_any_name_reach_reset() -> None:
    code = """
class Environment:
    def reset(self, prompt, **row): self.row = row
    def step(self, completion):
        return {"observation": "", "done": True, "reward": sum(self.row.values())}
"""
    row: dict[str, Any] = {"action": 1.0, "episode": 2.0, "arguments": 4.0, "function": 8.0, "completion": 16.0}
    assert (await played({"code": code}, says("4"), request(**row))).episode_reward == 31.0


async def test_numpys_done_and_reward_are_taken() -> None:
    code = """
from __future__ import annotations
import dataclasses
import numpy as np

@dataclasses.dataclass
class Environment:
    turns: int = 0
    def reset(self, **row): pass
    def step(self, completion):
        return {"observation": np.str_(" 1"), "done": np.bool_(True), "reward": np.float32(0.5)}
"""
    assert (await played({"code": code}, says("4"), request())).episode_reward == 0.5


async def test_an_episode_begins_again_after_its_process_died(tmp_path: Any) -> None:
    code = f"""
import os, pathlib
class Environment:
    def reset(self, **row): pass
    def step(self, completion):
        mark = pathlib.Path({str(tmp_path / "died")!r})
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return {{"observation": "", "done": True}}
"""
    sample = await played({"code": code, "retries": 1}, says("4"), request())
    assert sample.token_ids.tolist() == [*ids("4"), EOS] and sample.episode_reward is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"function": "no_such_module:Thing"}, "function cannot be loaded.*No module named"),
        ({"function": "json:Thing"}, "function cannot be loaded.*module json has no class 'Thing'"),
        ({"code": "x = 1"}, "code cannot be loaded.*defines no class Environment"),
    ],
)
async def test_a_class_that_cannot_be_loaded_is_refused_at_once(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSpec, match=f"(?s)rollout.environment.{words}"):
        await played(spec, says("4"), request())


def test_a_template_without_assistant_turns_is_refused() -> None:
    found = tokenizer()
    found.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    given = EnvironmentSpec.model_validate({"code": CALCULATOR, "workers": 1})
    with pytest.raises(BadSpec, match=r"rollout\.environment: no obs.* leaves out the assistant's turns"):
        Environments(given, speaking(found, chat=True))


def says_kind(kind: str) -> str:
    return CHATML.replace("{{ m.content }}", f"{{{{ m.content }}}} {kind}")


async def test_a_sets_observations_are_rendered_as_its_own_data_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it plays the run's environment, in the run's subprocesses."""
    monkeypatch.setattr("rlhf_worker.rollout.episode.embedding_rows", lambda model: 1000)
    rows = {"jsonl": {"path": "/p"}}
    run = {"code": CALCULATOR, "workers": 1, "timeoutSeconds": 20.0}
    own = {**run, "code": CALCULATOR.replace("is it", "was it")}
    sets: list[dict[str, Any]] = [
        {"name": "plain", "data": {**rows, "chatTemplate": False}},
        {"name": "other", "data": {**rows, "chatTemplateText": says_kind("sir")}},
        {"name": "own", "data": {**rows, "chatTemplateText": says_kind("sir")}, "environment": own},
    ]
    config = run_config(
        data={**rows, "chatTemplateText": says_kind("ok")}, rollout={"environment": run}, evaluation=sets
    )
    found = opened(config, tokenizer())
    try:
        shared = found[""]._processes
        assert found["plain"]._processes is shared is found["other"]._processes is not found["own"]._processes
        policy: Any = says("4", "5")
        texts = {name: (await table.play(request(answer=5), policy)).text for name, table in found.items()}
    finally:
        for table in found.values():
            table.close()
    whole = "4 {1}\nuser\n 5 {0} it {1}\nassistant\n5".format
    assert texts == {
        "": whole("is", "ok"), "plain": "4 5 is it5", "other": whole("is", "sir"), "own": whole("was", "sir")
    }


def test_a_sets_template_that_hides_turns_is_told_by_the_sets_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_worker.rollout.episode.embedding_rows", lambda model: 1000)
    rows = {"jsonl": {"path": "/p"}}
    hides = "{{ messages[-1].content }}"
    config = run_config(
        data={**rows, "chatTemplateText": CHATML}, rollout={"environment": {"code": CALCULATOR, "workers": 1}},
        evaluation=[{"name": "e", "data": {**rows, "chatTemplateText": hides}}],
    )
    with pytest.raises(BadSpec, match=r"evaluation\[e\]: no observation .* leaves out the assistant's turns"):
        opened(config, tokenizer())


def test_text_is_what_a_decoder_token_by_token_shows() -> None:
    said = speech()
    assert said.text(ids("2 + 3 ="), [*ids(" 5"), EOS], "stop") == " 5"
    assert said.text([], ids("abc"), "length") == "abc"
    assert said.text([], ids("abc"), "stop") == "ab"  # a stop token that is no special token


def test_a_turn_of_unlike_lists_or_too_many_tokens_is_refused() -> None:
    for turn in (Turn([1, 2], [-1.0], [0, 0], "stop"), Turn([1] * 9, [-1.0] * 9, [0] * 9, "stop")):
        with pytest.raises(ValueError, match="a turn of"):
            Episode(request(max_tokens=8)).add(turn)


def test_seeds_differ_by_sample_step_and_run_and_are_the_same_again() -> None:
    seeds = {
        request_seed(seed, step, uid, index) for seed in (0, 1) for step in (1, 2) for uid in ("0:1", "1:1")
        for index in (0, 1)
    }
    assert len(seeds) == 16
    assert request_seed(0, 1, "0:1", 0) in seeds and all(0 <= seed < 2**63 for seed in seeds)
