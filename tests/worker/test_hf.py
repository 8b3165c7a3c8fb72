"""Generation by transformers: ids, log probabilities and ends, against the model's own forward pass."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hack.tiny_model import tokenizer, write
from rlhf_api.run import RunConfig
from rlhf_worker.engines.hf import Generator
from rlhf_worker.experience import Prompt
from rlhf_worker.rollout.episode import Request
from tests.worker.configs import run_config
from tests.worker.samples import whole

CPU = torch.device("cpu")
EOS = 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiny")
    write(found)
    return found


def config(path: Path, **rollout: Any) -> RunConfig:
    return run_config(
        model={"path": str(path), "dtype": "float32"}, rollout={"engine": "hf", "maxTokens": 24, **rollout},
    )


def generator(path: Path, **rollout: Any) -> Generator:
    made = Generator(config(path, **rollout), 0, CPU)
    made.refresh(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters(), 3)
    return made


def requests(*texts: str, temperature: float = 0.7, seed: int | None = 11, **fields: Any) -> list[Request]:
    prompts = [
        Prompt(
            uid=f"0:{row}", epoch=0, row=row, token_ids=list(tokenizer().encode(text, add_special_tokens=False)),
            text=text, fields=fields,
        )
        for row, text in enumerate(texts)
    ]
    return [Request(prompt=prompt, seed=seed, temperature=temperature, max_tokens=24) for prompt in prompts]


def test_log_probabilities_are_those_of_the_sampled_distribution(path: Path) -> None:
    """Also of rows that were padded on the left."""
    made = generator(path)
    for sample in whole(made, requests("2 + 3 =", "a much longer prompt than that =")):
        context = torch.tensor([[*sample.prompt.token_ids, *sample.token_ids.tolist()]])
        logits = made.lm(context).logits[0, len(sample.prompt.token_ids) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids.tolist())[:, None])[:, 0]
        assert torch.allclose(torch.tensor(sample.logprobs.tolist()), expected, atol=1e-4)
        assert sample.versions.tolist() == [3] * len(sample.token_ids) and all(sample.mask)


def test_a_completion_ends_after_its_first_end_or_is_cut(path: Path) -> None:
    samples = whole(generator(path), requests(*(f"{i} + 1 =" for i in range(9))) * 8)
    for sample in samples:
        token_ids = sample.token_ids.tolist()
        ended = EOS in token_ids
        assert sample.finish_reason == ("stop" if ended else "length")
        assert token_ids.index(EOS) == len(token_ids) - 1 if ended else len(token_ids) == 24
        assert sample.text == tokenizer().decode(sample.token_ids.tolist(), skip_special_tokens=True)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_the_same_seed_gives_the_same_samples_and_temperature_0_the_likeliest(path: Path) -> None:
    made = generator(path)
    one, other = (whole(made, requests("2 + 3 =")) for _ in range(2))
    assert one == other
    unseeded = [whole(made, requests("2 + 3 =", seed=None)) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    (greedy,) = whole(made, requests("2 + 3 =", temperature=0.0))
    tokens = list(greedy.prompt.token_ids)
    for token in greedy.token_ids:
        assert int(made.lm(torch.tensor([tokens])).logits[0, -1].argmax()) == token
        tokens.append(token)


def test_many_rows_are_generated_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_worker.engines.hf.SCORES", 81 * 24 * 2)
    samples = whole(generator(path), requests(*(f"{i} + 1 =" for i in range(5))))
    assert [sample.prompt.row for sample in samples] == [0, 1, 2, 3, 4]


def test_an_environment_plays_with_it(path: Path) -> None:
    code = ("class Environment:\n    def reset(self, **row): pass\n    def step(self, completion): return "
        "{'observation': ' go on', 'done': False, 'reward': 1.0}")
    made = generator(path, environment={"code": code, "maxTurns": 2, "workers": 1})
    try:
        samples = whole(made, requests("2 + 3 =", "4 ="))
    finally:
        made.close()
    assert all(sample.episode_reward for sample in samples)


def ticking(step: int = 1) -> SimpleNamespace:
    """A clock that so many seconds go by on whenever someone looks."""
    seconds = count(0, step)
    return SimpleNamespace(time=lambda: next(seconds), monotonic=lambda: next(seconds))


def test_what_is_finished_at_the_deadline_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a batch: transformers looks at its clock after each token."""
    asked = requests(*(f"{i} + 1 =" for i in range(9))) * 8
    every = whole(generator(path), asked)
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", ticking())
    part = generator(path).generate(asked, 12.5)
    for sample, cut in zip(every, part, strict=True):
        assert cut == (sample if sample.finish_reason == "stop" and len(sample.token_ids) <= 13 else None)
    assert {sample is None for sample in part} == {True, False}


def test_whole_batches_before_the_deadline_are_kept_and_none_begins_after_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_worker.engines.hf.SCORES", 81 * 24 * 2)
    monkeypatch.setattr("rlhf_worker.engines.hf.time", ticking(1000))
    samples = generator(path).generate(requests(*(f"{i} + 1 =" for i in range(6))), 2500.0)
    assert [sample is None for sample in samples] == [False] * 4 + [True] * 2
    assert generator(path).generate(requests("2 + 3 ="), -1.0) == [None]


def test_finished_episodes_survive_the_deadline_and_a_hanging_one_does_not_hold_them(path: Path) -> None:
    code = """import time
class Environment:
    def reset(self, hangs, **row): self.hangs = hangs
    def step(self, completion):
        if self.hangs:
            time.sleep(600)
        return {'observation': '', 'done': True, 'reward': 1.0}"""
    made = generator(path, environment={"code": code, "workers": 2, "timeoutSeconds": 600})
    asked = [*requests("2 + 3 =", hangs=True), *requests("4 =", hangs=False)]
    try:
        whole(made, asked[1:])  # its subprocess is up
        samples = made.generate(asked, 5.0)
    finally:
        made.close()
    assert samples[0] is None and samples[1] and samples[1].episode_reward == 1.0


def test_weights_that_do_not_fit_are_refused(path: Path) -> None:
    weights = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    made = Generator(config(path), 0, CPU)
    with pytest.raises(ValueError, match="do not fit"):
        made.refresh(list(weights.items())[1:], 1)
    with pytest.raises(ValueError, match=r"do not fit: .*extra"):
        made.refresh([*weights.items(), ("extra", torch.zeros(1))], 1)


def test_without_an_end_token_completions_end_by_their_length(tmp_path: Path) -> None:
    write(tmp_path)
    bare = tokenizer()
    bare.eos_token = bare.pad_token = None
    bare.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    samples = whole(generator(tmp_path), requests("2 + 3 =", "a longer prompt ="))
    assert [(len(sample.token_ids), sample.finish_reason) for sample in samples] == [(24, "length")] * 2
