"""Prompts: the samplers that draw, render and tokenise rows.

The order is a function of seed and epoch alone, and the turns of several sources one of how many each has given: so a
sampler's whole state is a few numbers a source (and a digest that notices other data).
"""

import itertools
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from rlhf_api.job import DataSpec, PromptsSpec
from rlhf_worker.errors import BadData, together
from rlhf_worker.experience import Prompt
from rlhf_worker.feed.rows import Origin, PromptSource
from rlhf_worker.template import Message, Template, Tokenizer, Unfit

TOLD_FAULTS = 5  # rows that an error names


@dataclass(slots=True)
class Survey:
    """What is wrong with rows that were looked at."""

    seen: int = 0
    fit: bool = False  # whether any does
    long: dict[int, int] = field(default_factory=dict)  # row -> tokens
    faults: list[str] = field(default_factory=list)


class PromptSampler:
    """Draws prompts: every row once an epoch, in an order made from seed and epoch, but for those that are dropped."""

    def __init__(self, source: PromptSource, template: Template, spec: PromptsSpec) -> None:
        self._source, self._template, self._spec = source, template, spec
        self._digest = source.digest()
        self._drawn = self._dropped = 0  # places in the order; those of them that gave no prompt

    @property
    def given(self) -> int:
        """Prompts so far."""
        return self._drawn - self._dropped

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts, over as many epochs as they take. Raises BadData; then none is consumed."""
        survey = Survey()
        prompts = list(islice(self._fitting(map(self._locate, itertools.count(self._drawn)), survey), count))
        self._verdict(survey)
        self._drawn += survey.seen
        self._dropped += survey.seen - count
        return prompts

    def first(self, count: int | None) -> list[Prompt]:
        """The first rows (None: all) in the order of the source, of epoch 0. Consumes nothing. Raises BadData."""
        survey = Survey()
        rows = range(len(self._source)) if self._spec.overlong_prompts == "drop" else range(len(self._source))[:count]
        prompts = list(islice(self._fitting(((0, row) for row in rows), survey), count))
        self._verdict(survey)
        return prompts

    def again(self, uids: Sequence[str]) -> list[Prompt]:
        """Prompts that were drawn before, by their uids. Consumes nothing. Raises BadData."""
        return [self._prompt(*map(int, uid.split(":")[-2:])) for uid in uids]

    def check(self, count: int) -> str:
        """Render the rows of the next `count` prompts, each once, without consuming them.

        So bad rows fail a run at its start, all of them at once.
        Returns what is to be told of prompts that are dropped; empty when none is. Raises BadData.
        """
        survey = Survey()
        ahead = range(self._drawn, self._drawn + 2 * len(self._source))  # two epochs hold one whole
        places = dict.fromkeys(
            self._locate(index)[1] for index in ahead[: count if self._spec.overlong_prompts == "refuse" else None]
        )
        for _ in islice(self._fitting(((0, row) for row in places), survey), count):
            pass
        self._verdict(survey)
        if not survey.long:
            return ""
        return (
            f"{self._source.name}: {len(survey.long)} of {survey.seen} prompts have more than "
            f"{self._spec.max_prompt_tokens} tokens and are dropped"
        )

    def _fitting(self, places: Iterable[tuple[int, int]], survey: Survey) -> Iterator[Prompt]:
        """Ends where nothing fits."""
        for place in places:
            survey.seen += 1
            try:
                prompt = self._prompt(*place)
            except BadData as error:
                survey.faults.append(str(error))
            else:
                if len(prompt.token_ids) <= self._spec.max_prompt_tokens:
                    survey.fit = True
                    yield prompt
                else:
                    survey.long[prompt.row] = len(prompt.token_ids)
            if not survey.fit and survey.seen >= 2 * len(self._source):
                return

    def _verdict(self, survey: Survey) -> None:
        """Raises BadData."""
        wrong, more = survey.faults[:TOLD_FAULTS], len(survey.faults) - TOLD_FAULTS
        if more > 0:
            wrong.append(f"and {more} more rows of {self._source.name}")
        if survey.long and (self._spec.overlong_prompts == "refuse" or not survey.fit):
            wrong.append(self._too_long(survey))
        if wrong:
            raise BadData("\n".join(wrong))

    def _too_long(self, survey: Survey) -> str:
        row, most = min(survey.long), max(survey.long.values())
        others = (
            f"; {len(survey.long)} of {survey.seen} prompts are longer, up to {most} tokens" if survey.seen > 1 else ""
        )
        fix = "" if self._spec.overlong_prompts == "drop" else ", or set data.overlongPrompts to drop"
        return (
            f"{self._source.place(row)}: the prompt has {survey.long[row]} tokens, "
            f"data.maxPromptTokens is {self._spec.max_prompt_tokens}{others}: shorten them or raise the limit{fix}"
        )

    def state(self) -> dict[str, Any]:
        epoch, position = divmod(self._drawn, len(self._source))
        return {
            "epoch": epoch, "position": position, "dropped": self._dropped, "data": self._digest,
            "seed": self._spec.seed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken. Raises BadData if the data or the seed is another."""
        if (state.get("data"), state.get("seed")) != (self._digest, self._spec.seed):
            raise BadData(
                f"{self._source.name}: the checkpoint was made with other data or another data.seed: "
                "restore them, or start with an empty checkpoint.path"
            )
        self._drawn = state["epoch"] * len(self._source) + state["position"]
        self._dropped = state.get("dropped", 0)

    def _locate(self, index: int) -> tuple[int, int]:
        """Epoch and row of the run's prompt `index`."""
        epoch, position = divmod(index, len(self._source))
        return epoch, _permutation(self._spec.seed, epoch, len(self._source))[position]

    def _prompt(self, epoch: int, row: int) -> Prompt:
        prompt, fields = self._source.read(row)
        origin = self._source.origin
        try:
            text = self._text(prompt)
            token_ids = self._template.tokens(text, opening=not self._template.chat)
        except Unfit as error:
            raise BadData(f"{self._source.place(row)}: {error}") from None
        uid = f"{origin.source}:{epoch}:{row}" if origin.source else f"{epoch}:{row}"
        return Prompt(
            uid=uid, epoch=epoch, row=row, token_ids=token_ids, text=text, fields=fields, source=origin.source,
            rewards=origin.rewards,
        )

    def _text(self, prompt: str | list[Message]) -> str:
        """Raises Unfit."""
        if self._template.chat:
            system = [{"role": "system", "content": self._spec.system_prompt}] if self._spec.system_prompt else []
            return self._template.render(
                [*system, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]
            )
        if not isinstance(prompt, str):
            raise Unfit(
                "a list of chat messages needs data.chatTemplate and a tokenizer with a chat template, "
                "or data.chatTemplateText"
            )
        return prompt


class Mixture:
    """Draws from several sources: each prompt is of the one that is furthest behind its share of all so far.

    What `PromptSampler` does for one, it does for each.
    """

    def __init__(self, weights: Mapping[str, float], parts: Mapping[str, PromptSampler]) -> None:
        """By the names of the sources, in one order."""
        self._shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self._parts = dict(parts)

    def _turns(self, count: int) -> list[str]:
        """The sources of the next prompts: a function of how many each has given."""
        given = {name: part.given for name, part in self._parts.items()}
        turns: list[str] = []
        for total in range(sum(given.values()) + 1, sum(given.values()) + count + 1):
            turns.append(max(given, key=lambda name: self._shares[name] * total - given[name]))
            given[turns[-1]] += 1
        return turns

    def next(self, count: int) -> list[Prompt]:
        turns = self._turns(count)
        drawn = {name: iter(part.next(turns.count(name))) for name, part in self._parts.items()}
        return [next(drawn[name]) for name in turns]

    def first(self, count: int | None) -> list[Prompt]:
        return [prompt for part in self._parts.values() for prompt in part.first(count)]

    def again(self, uids: Sequence[str]) -> list[Prompt]:
        return [self._parts[uid.partition(":")[0]].again([uid])[0] for uid in uids]

    def check(self, count: int) -> str:
        reach = {name: math.ceil(count * share) + 1 for name, share in self._shares.items()}
        return "\n".join(filter(None, together(partial(part.check, reach[name]) for name, part in self._parts.items())))

    def state(self) -> dict[str, Any]:
        states = {name: part.state() for name, part in self._parts.items()}
        return {"sources": states, "dropped": sum(state["dropped"] for state in states.values())}

    def restore(self, state: Mapping[str, Any]) -> None:
        states = state.get("sources", {})
        if states.keys() != self._parts.keys():
            names = ", ".join(states) or "one source"
            raise BadData(
                f"data.sources: the checkpoint was made with {names}: "
                "restore them, or start with an empty checkpoint.path"
            )
        for name, part in self._parts.items():
            part.restore(states[name])


def sampler(spec: PromptsSpec, tokenizer: Tokenizer, vocabulary: int | None, origin: Origin) -> PromptSampler:
    """Of one source. Raises BadData, BadSpec."""
    template = Template(tokenizer, spec, vocabulary)
    source = PromptSource(spec, origin)
    for name in source.hidden:
        print(
            f"{source.name}: rewards and environments do not get column {name!r}, but the run's own by this name",
            flush=True,
        )
    return PromptSampler(source, template, spec)


def samplers(
    data: DataSpec, tokenizer: Tokenizer, vocabulary: int | None, origins: Mapping[str, Origin]
) -> PromptSampler | Mixture:
    """Of all sources; origins: by their names, "" of a single one. Raises BadData, BadSpec."""
    if data.sources is None:
        return sampler(data, tokenizer, vocabulary, origins[""])
    parts = together(
        partial(sampler, data.of(source), tokenizer, vocabulary, origins[source.name]) for source in data.sources
    )
    names = [source.name for source in data.sources]
    return Mixture({source.name: source.weight for source in data.sources}, dict(zip(names, parts, strict=True)))


@lru_cache(maxsize=64)  # two epochs of each source
def _permutation(seed: int, epoch: int, rows: int) -> "array[int]":
    order = list(range(rows))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return array("q", order)
