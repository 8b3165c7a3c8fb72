"""Sampling: the trainer's log probabilities are of the distribution drawn from, and turns end where they must."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hack.tiny_model import CHARACTERS, SPECIAL, tokenizer
from rlhf_api.job import SamplingSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Prompt, Sample, pack, to_train_sequences
from rlhf_worker.rollout.admission import Group
from rlhf_worker.rollout.episode import Request
from rlhf_worker.rollout.producer import Rollouts
from rlhf_worker.rollout.sampling import check_sampling, first_stop, support
from rlhf_worker.trainer.rank import Trainer
from tests.worker.configs import run_config
from tests.worker.samples import a_prompt, dealt, evenly, whole

TEMPERATURE = 0.7
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
REPLAYED: list[dict[str, Any]] = [
    {},
    {"topK": 5},
    {"topK": 40, "topP": 0.6},
    {"topK": 8, "minP": 0.7},
    {"topK": 71, "minTokens": 12},
    {"topK": 256, "topP": 0.9},
]
ENVIRONMENT = """
class Environment:
    def reset(self, **row): pass
    def step(self, completion): return {"observation": " go on", "done": False, "reward": 1.0}
"""


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def shown(token_ids: list[int]) -> str:
    return str(tokenizer().decode(token_ids, skip_special_tokens=True))


def requests(
    count: int = 4, tokens: int = 24, trained: bool = True, temperature: float = TEMPERATURE, **sampling: Any
) -> list[Request]:
    texts = [f"{row} + {'1' * (row + 1)} =" for row in range(count)]
    spec = SamplingSpec.model_validate(sampling)
    return [
        Request(
            prompt=Prompt(uid=f"0:{row}", epoch=0, row=row, token_ids=ids(text), text=text, fields={}), seed=11 + row,
            temperature=temperature, max_tokens=tokens, sampling=spec, trained=trained,
        )
        for row, text in enumerate(texts)
    ]  # fmt: skip


def trainer(tiny: Path, root: Path, *, options: dict[str, Any] | None = None, **rollout: Any) -> Trainer:
    """With the hf engine, which holds its weights."""
    config = run_config(
        model={"path": str(tiny), "dtype": "float32"}, checkpoint={"path": str(root)},
        trainer={"steps": 1, "learningRate": 0.01, **(options or {})},
        rollout={"engine": "hf", "maxTokens": 24, "temperature": TEMPERATURE, **rollout},
    )  # fmt: skip
    made = Trainer(config, list(config.roles), 0, 1, "cpu", 1)
    made.load()
    made.refresh()
    return made


def distribution(
    lm: Any, before: Sequence[int], turn: Sequence[int], spec: SamplingSpec, ends: set[int], temperature: float
) -> torch.Tensor:
    """Log probabilities of the next token, (V,), by the options' definitions, one token at a time."""
    logits = lm(torch.tensor([[*before, *turn]])).logits[0, -1].detach().double()
    counts = Counter(turn)
    for token in range(len(logits)):
        if token in counts or token in before:
            logits[token] *= spec.repetition_penalty if logits[token] < 0 else 1 / spec.repetition_penalty
        logits[token] -= spec.frequency_penalty * counts[token] + spec.presence_penalty * (token in counts)
        if token in ends and len(turn) < spec.min_tokens:
            logits[token] = -torch.inf
    logits /= temperature
    chosen, share = list[int](), 0.0
    order = logits.argsort(descending=True).tolist()[: spec.top_k or None]
    among = logits[order].softmax(0).tolist()
    for token, probability in zip(order, among, strict=True):
        if share < spec.top_p and probability >= spec.min_p * among[0] and probability > 0:
            chosen.append(token)
        share += probability
    kept = torch.full_like(logits, -torch.inf)
    kept[chosen] = logits[chosen]
    return kept.log_softmax(0)


def expected(
    lm: Any, sample: Sample, spec: SamplingSpec, temperature: float = TEMPERATURE
) -> tuple[list[float], list[set[int]]]:
    """Of each token: its log probability, and the set that it was drawn from."""
    tokens = sample.token_ids.tolist()
    steps = [
        distribution(lm, sample.prompt.token_ids, tokens[:i], spec, {2, *spec.stop_token_ids}, temperature)
        for i in range(len(tokens))
    ]
    sets = [set(step.isfinite().nonzero().flatten().tolist()) for step in steps]
    return [float(step[token]) for step, token in zip(steps, tokens, strict=True)], sets


def of_trainer(made: Trainer, samples: Sequence[Sample], *, padded: bool = False) -> list[float]:
    sequences = to_train_sequences(samples)
    values = made.logprobs("policy", pack(sequences, 60, padded=padded))
    return [
        value
        for sequence in sequences
        for value, ours in zip(values[sequence.index], sequence.mask, strict=True)
        if ours
    ]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_trainer_and_engine_agree_under_every_option(tiny: Path, tmp_path: Path, group: None, batching: str) -> None:
    made = trainer(tiny, tmp_path, options={"batching": batching})
    assert made.generator is not None
    for sampling in REPLAYED if batching == "packed" else REPLAYED[2:3]:
        samples = whole(made, requests(**sampling))
        drawn = [value for sample in samples for value in sample.logprobs.tolist()]
        assert of_trainer(made, samples, padded=batching == "padded") == pytest.approx(drawn, abs=1e-4), sampling
        spec = SamplingSpec.model_validate(sampling)
        for sample in samples:
            values, sets = expected(made.generator.lm, sample, spec)
            assert sample.logprobs.tolist() == pytest.approx(values, abs=1e-4), sampling
            if sampling:
                assert sample.support is not None and (sample.support[:, 0] == sample.token_ids.tolist()).all()
                assert [set(row[row >= 0].tolist()) for row in sample.support] == sets
    restricted = whole(made, requests(topK=5))
    for sample in restricted:
        object.__setattr__(sample, "support", None)
    assert of_trainer(made, restricted) != pytest.approx(
        [value for sample in restricted for value in sample.logprobs.tolist()], abs=0.1
    )


def test_a_step_trains_on_the_distribution_that_was_drawn_from(tiny: Path, tmp_path: Path, group: None) -> None:
    """No mismatch before the update, the entropy is that of the sets, and the update raises what was good over them."""
    made = trainer(tiny, tmp_path, options={"learningRate": 1e-4})
    assert made.generator is not None
    samples = whole(made, requests(topK=5, topP=0.9))
    tokens = sum(len(sample.token_ids) for sample in samples)
    before = of_trainer(made, samples)
    sequences = [
        s.with_columns(
            advantages=1.0, old_logprobs=sample.logprobs, **evenly(4, len(s.mask), tokens)
        )
        for s, sample in zip(to_train_sequences(samples), samples, strict=True)
    ]
    metrics = made.train("policy", [dealt(sequences, 1, made.config.trainer)[0]])
    assert (
        metrics["mismatch/abs"] < 1e-5
        and metrics["mismatch/kl"] < 1e-8
        and metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    )
    drawn_from, lm = SamplingSpec(top_k=5, top_p=0.9), made.generator.lm
    steps = [
        distribution(lm, s.prompt.token_ids, s.token_ids[:i].tolist(), drawn_from, {2}, TEMPERATURE)
        for s in samples
        for i in range(len(s.token_ids))
    ]
    entropies = [-float((step.exp() * step.nan_to_num(neginf=0.0)).sum()) for step in steps]
    assert metrics["entropy"] == pytest.approx(sum(entropies) / tokens, abs=1e-3)
    assert sum(of_trainer(made, samples)) > sum(before)


def test_turns_with_observations_between_them_keep_their_sets(tiny: Path, tmp_path: Path, group: None) -> None:
    made = trainer(tiny, tmp_path, environment={"code": ENVIRONMENT, "maxTurns": 3, "workers": 1})
    try:
        samples = whole(made, requests(2, tokens=60, topK=3, stopTokenIds=ids("abcdefghijklmnopqrstuvwxyz")))
    finally:
        made.generator.close()  # type: ignore[union-attr]
    assert all(not all(sample.mask) for sample in samples)
    drawn = [value for sample in samples for value in sample.logprobs[sample.mask].tolist()]
    assert of_trainer(made, samples) == pytest.approx(drawn, abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [{"repetitionPenalty": 1.3}, {"repetitionPenalty": 0.8}, {"presencePenalty": 1.5, "frequencyPenalty": -0.5}],
    ids=str,
)
@pytest.mark.parametrize("topk", [0, 6])
def test_penalties_count_the_prompt_and_the_turn_and_no_padding(
    tiny: Path, tmp_path: Path, group: None, sampling: dict[str, Any], topk: int
) -> None:
    made = trainer(tiny, tmp_path)
    assert made.generator is not None
    spec = SamplingSpec.model_validate({**sampling, "topK": topk})
    for sample in whole(made, requests(topK=topk, **sampling)):
        assert sample.logprobs.tolist() == pytest.approx(expected(made.generator.lm, sample, spec)[0], abs=1e-4)


def test_a_text_ends_a_turn_with_the_token_that_completes_it(tiny: Path, tmp_path: Path, group: None) -> None:
    """All tokens of the text are the policy's own and are trained; the text is without it."""
    made = trainer(tiny, tmp_path)
    free = whole(made, requests(1))[0]
    stop = free.text[6:8]
    cut = whole(made, requests(1, stop=["never so", stop]))[0]
    end = next(count for count in range(24) if stop in shown(free.token_ids.tolist()[:count]))
    assert cut.token_ids.tolist() == free.token_ids.tolist()[:end] and all(cut.mask)
    assert cut.logprobs.tolist() == free.logprobs.tolist()[:end]
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    later = whole(made, requests(1, stop=[stop], minTokens=end, topK=71))[0]
    assert len(later.token_ids) > end and stop in later.text + stop


def test_a_token_ends_a_turn_and_is_trained_with_its_own_log_probability(
    tiny: Path, tmp_path: Path, group: None
) -> None:
    made = trainer(tiny, tmp_path)
    free = whole(made, requests(1))[0]
    token = free.token_ids.tolist()[6]
    end = free.token_ids.tolist().index(token) + 1
    cut = whole(made, requests(1, stopTokenIds=[token]))[0]
    assert cut.token_ids.tolist() == free.token_ids.tolist()[:end] and all(cut.mask)
    assert cut.logprobs.tolist() == pytest.approx(free.logprobs.tolist()[:end])
    assert of_trainer(made, [cut]) == pytest.approx(cut.logprobs.tolist(), abs=1e-4)
    assert (cut.text, cut.finish_reason) == (shown(free.token_ids.tolist()[: end - 1]), "stop")


def test_what_was_returned_of_a_set_is_the_set() -> None:
    """Three are equally likely, and of topK 2 only two were returned: given that it was one of the two."""
    third = np.log(1 / 3)
    given, sets = support(np.array([[7, 4, 7], [9, 4, 7]]), np.array([[third, third, third], [third, third, third]]))
    assert given.tolist() == pytest.approx([np.log(1 / 2), third]) and sets.tolist() == [[7, 4, -1], [9, 4, 7]]
    given, sets = support(np.array([[4, 4, 7]]), np.array([[0.0, 0.0, -np.inf]]))
    assert given.tolist() == [0.0] and sets.tolist() == [[4, -1, -1]]


@pytest.mark.parametrize(
    ("texts", "stop", "least", "found"),
    [
        (["", "a", "ab", "abc"], ["b"], 0, (2, "b")),
        (["", "a", "ab", "abc"], ["bc", "b"], 0, (2, "b")),
        (["", "abcd"], ["cd", "bc"], 0, (1, "bc")),  # the one that ends first
        (["", "ab", "abab"], ["b"], 1, (2, "b")),  # not the first one, which came too early
        (["", "ab", "abc"], ["b"], 1, None),
        (["", "a", "ab"], ["ab"], 1, (2, "ab")),  # its end is what counts
        (["", "a", "a", "ab"], ["ab"], 0, (3, "ab")),  # half a character says nothing yet
        ([""], ["b"], 0, None),
    ],
)
def test_the_first_stop(texts: list[str], stop: list[str], least: int, found: tuple[int, str] | None) -> None:
    assert first_stop(texts, stop, least) == found


def test_ends_that_never_come_are_refused_together_by_their_fields() -> None:
    data = {"jsonl": {"path": "/x"}}
    evaluation = [{"name": "e", "data": data, "sampling": {"stop": ["ok", "a</s>"]}}]
    config = run_config(rollout={"maxTokens": 8, "sampling": {"stopTokenIds": [3, VOCABULARY]}}, evaluation=evaluation)
    first = rf"spec\.rollout\.sampling\.stopTokenIds: the tokenizer has {VOCABULARY} tokens, .*"
    with pytest.raises(BadSpec, match=rf"{first}; evaluation\[e\]\.sampling\.stop: 'a</s>' .*\(2\)"):
        check_sampling(config, tokenizer())
    check_sampling(
        run_config(rollout={"maxTokens": 8, "sampling": {"stopTokenIds": [VOCABULARY - 1], "stop": ["x"]}}), tokenizer()
    )


def test_training_and_each_evaluation_ask_for_their_own_sampling() -> None:
    data = {"jsonl": {"path": "/x"}}
    sets = [
        {"name": "a", "data": data, "temperature": 0.5, "sampling": {"topP": 0.9}, "environment": {"function": "m:E"}},
        {"name": "b", "data": data, "maxTokens": 3, "sampling": {"frequencyPenalty": 1}},
    ]
    config = run_config(rollout={"maxTokens": 8, "temperature": 0.7, "sampling": {"topK": 5}}, evaluation=sets)
    rollouts = Rollouts(config, None, 0)  # type: ignore[arg-type]
    asked = [rollouts._requests(Group(a_prompt(), 0, of))[0] for of in (None, *config.evaluation)]
    given = [(one.temperature, one.max_tokens, one.evaluation) for one in asked]
    assert given == [(0.7, 8, ""), (0.5, 8, "a"), (0.0, 3, "b")]
    specs = [{"top_k": 5}, {"top_p": 0.9}, {"frequency_penalty": 1}]
    assert [one.sampling for one in asked] == [SamplingSpec.model_validate(spec) for spec in specs]
    assert [one.wants_support for one in asked] == [True, False, False]
