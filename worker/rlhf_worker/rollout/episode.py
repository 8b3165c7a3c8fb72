"""One completion while it is made: turns of the policy, and between them what an environment says. Token ids only ever
grow.

What the policy made is never tokenised again: an observation is rendered by the chat template as what follows a turn of
the assistant, and only that suffix is tokenised. Its tokens are masked out of the loss. """

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_api.job import PromptsSpec, SamplingSpec
from rlhf_api.run import RunConfig
from rlhf_worker.experience import Prompt, Sample
from rlhf_worker.pretrained import embedding_rows
from rlhf_worker.rollout.sampling import NONE
from rlhf_worker.template import Template, Unfit

TURN = "What the assistant said."  # stands for a turn when the template is asked what follows one
BEFORE = 8  # tokens before a text that a decoder may need to see: some put a space only between words


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion that is wanted."""

    prompt: Prompt
    seed: int | None  # None: the engine's own stream of random numbers
    temperature: float
    max_tokens: int  # turns and observations together
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    trained: bool = False  # then with `Sample.support`
    evaluation: str = ""  # the set that wants it, by name
    begun: Sample | None = None  # what an earlier step left unfinished of it, to go on from

    @property
    def wants_support(self) -> bool:
        return self.trained and self.sampling.top_k > 0


def request_seed(seed: int, step: int, uid: str, index: int) -> int:
    """The same sample gets the same seed in every run and after every resume. 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{step}/{uid}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy made in one go; the lists have one entry a token."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: str  # "stop" | "length" | "abort": it was cut off where it stood
    stop: str = ""  # the text that ended it, if it was one
    support: NDArray[np.int32] | None = None  # (tokens, 1 + topK), as `Sample.support`


class Speech:
    """From token ids to text, and from an observation to token ids, by a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any, template: Template, *, special: bool = False) -> None:
        """special: whether texts show special tokens."""
        self.tokenizer, self.template, self.special = tokenizer, template, special

    @classmethod
    def of(cls, tokenizer: Any, config: RunConfig, data: PromptsSpec | None = None) -> "Speech":
        """Of prompts that `data` renders, the run's own by default. Raises BadSpec."""
        template = Template(tokenizer, data or config.data, embedding_rows(config.model))
        return cls(tokenizer, template, special=config.data.show_special_tokens)

    def text(self, before: Sequence[int], token_ids: Sequence[int], finish_reason: str) -> str:
        """What an engine that decodes token by token would show: not what ended it, nor half a character at the end."""
        body = list(token_ids[:-1] if finish_reason == "stop" else token_ids)
        context = list(before[-BEFORE:])
        start, whole = self._decode(context), self._decode(context + body)
        return (whole[len(start) :] if whole.startswith(start) else self._decode(body)).rstrip("\ufffd")

    def _decode(self, token_ids: Sequence[int]) -> str:
        shown = {"skip_special_tokens": not self.special, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(token_ids, **shown))

    def observation(self, text: str, last: int) -> list[int]:
        """What stands between two turns, the next one's opening included; `last`: the token that ended the turn before.

        Raises Unfit, or BadSpec for a fault of the template.
        """
        if not self.template.chat:
            return self.template.tokens(text, opening=False) if text else []
        messages = [
            {"role": "user", "content": "?"}, {"role": "assistant", "content": TURN}, {"role": "user", "content": text}
        ]
        _, found, after = self.template.render(messages).partition(TURN)
        if not found:
            raise Unfit(
                "the chat template leaves out the assistant's turns: use another (data.chatTemplateText), or "
                "data.chatTemplate false"
            )
        token_ids = self.template.tokens(after, opening=False)
        return token_ids[1:] if token_ids[:1] == [last] else token_ids  # the policy ended its turn as the template does


class Episode:
    """A completion that grows until `finish_reason` is set. One that was begun goes on in the turn that it was in."""

    def __init__(self, request: Request) -> None:
        self.request, begun = request, request.begun
        self.token_ids: list[int] = begun.token_ids.tolist() if begun else []
        self.logprobs: list[float] = begun.logprobs.tolist() if begun else []
        self.mask: list[bool] = begun.mask.tolist() if begun else []
        self.versions: list[int] = begun.versions.tolist() if begun else []
        self.turns, self._begun = 0, len(self.token_ids)
        self.reward: float | None = None
        self.finish_reason = ""
        self.stop = ""
        self._support: list[NDArray[np.int32]] = [] if begun is None or begun.support is None else [begun.support]
        self._turn = 0  # where the last turn begins

    @property
    def context(self) -> list[int]:
        """What the next turn goes on from."""
        return [*self.request.prompt.token_ids, *self.token_ids]

    @property
    def left(self) -> int:
        """Tokens that are left."""
        return self.request.max_tokens - len(self.token_ids)

    @property
    def least(self) -> int:
        """Tokens that the next turn has at least."""
        made = 0 if self.turns else self._begun
        return min(max(0, self.request.sampling.min_tokens - made), self.left)

    @property
    def seed(self) -> int | None:
        """What goes on draws other random numbers than those that made what there is."""
        return None if self.request.seed is None else self.request.seed + self.turns + self._begun

    def add(self, turn: Turn) -> None:
        """A turn of the policy. Raises ValueError if it is longer than what was left, or its lists are of unlike
        length.
        """
        if not len(turn.token_ids) == len(turn.logprobs) == len(turn.versions) <= self.left:
            raise ValueError(f"a turn of {len(turn.token_ids)} tokens, {len(turn.logprobs)} logprobs, "
                f"{len(turn.versions)} versions, where {self.left} tokens are left")
        self._turn = len(self.token_ids)
        self._extend(turn.token_ids, turn.logprobs, turn.versions, mask=True)
        self._support += [] if turn.support is None else [turn.support]
        self.turns += 1
        self.finish_reason, self.stop = turn.finish_reason, turn.stop

    def observe(self, token_ids: list[int]) -> None:
        """What the environment put there. It goes on, if a token of another turn still fits; else the completion was
        cut here.
        """
        if len(token_ids) >= self.left:
            self.finish_reason = "length"
            return
        version = self.versions[-1] if self.versions else 0
        self._extend(token_ids, [0.0] * len(token_ids), [version] * len(token_ids), mask=False)
        self._support += [np.full((len(token_ids), rows.shape[1]), NONE, np.int32) for rows in self._support[-1:]]
        self.finish_reason = ""

    def _extend(self, token_ids: list[int], logprobs: list[float], versions: list[int], *, mask: bool) -> None:
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += versions
        self.mask += [mask] * len(token_ids)

    def last_turn(self, speech: Speech) -> str:
        """The text of the last turn."""
        return self._text(
            speech, [*self.request.prompt.token_ids, *self.token_ids[: self._turn]], self.token_ids[self._turn :]
        )

    def _text(self, speech: Speech, before: list[int], token_ids: list[int]) -> str:
        """Without what ended the last turn, be it a token or a text."""
        text = speech.text(before, token_ids, self.finish_reason)
        if not self.stop:
            return text
        whole = speech.text(before, token_ids, "length")  # the token that completed the text has more in it, or less
        end = whole.find(self.stop, max(0, len(text) - len(self.stop) + 1))
        return whole if end < 0 else whole[:end]

    def sample(self, speech: Speech) -> Sample:
        """The completion; its text holds all turns and observations. One that is to be gone on with has none yet."""
        whole = self.finish_reason != "abort"
        return Sample(
            prompt=self.request.prompt, token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32), mask=np.array(self.mask, np.bool_),
            versions=np.array(self.versions, np.int32), finish_reason=self.finish_reason,
            text=self._text(speech, self.request.prompt.token_ids, self.token_ids) if whole else "",
            episode_reward=self.reward, support=np.concatenate(self._support) if self._support else None,
        )  # fmt: skip
