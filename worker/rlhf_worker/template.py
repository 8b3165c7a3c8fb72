"""From messages to text, and from text to token ids, as `data` has it.

For prompts (feed/data.py) and for what environments say (rollout/episode.py).
"""

import inspect
import re
import traceback
from typing import Any, Protocol

from rlhf_api.job import PromptsSpec
from rlhf_worker.errors import BadSpec

Message = dict[str, Any]
HALF_PAIR = re.compile("[\ud800-\udfff]")
PROBE: list[Message] = [{"role": "user", "content": "?"}]
# What a template raises about messages that it does not expect, besides jinja's own TemplateError.
REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class Unfit(Exception):
    """Messages or a text that cannot become tokens; the message says why, and who knows the place adds it."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    @property
    def chat_template(self) -> Any: ...
    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str: ...
    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...


class Template:
    """`chat`: whether prompts are rendered by a chat template; else they are text, and stay what they are."""

    def __init__(self, tokenizer: Tokenizer, spec: PromptsSpec, vocabulary: int | None = None) -> None:
        """vocabulary: rows of the model's embedding, where they are known. Raises BadSpec."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._own = spec.chat_template_text
        self.chat = spec.chat_template and (self._own is not None or tokenizer.chat_template is not None)
        given = {"chat_template": self._own, "tools": spec.tools}
        self._options = {**(spec.chat_template_kwargs or {}), **{name: value for name, value in given.items() if value}}
        self._opening: list[int] | None = None
        if self.chat:
            self._check(spec)
            return
        kwargs = spec.chat_template_kwargs
        idle = {"systemPrompt": spec.system_prompt, "chatTemplateKwargs": kwargs, "tools": spec.tools}
        if unused := [f"data.{name}" for name, value in idle.items() if value]:
            raise BadSpec(
                f"{' and '.join(unused)} needs a chat template: remove it, or set data.chatTemplate with a tokenizer "
                "that has one, or data.chatTemplateText"
            )

    def _check(self, spec: PromptsSpec) -> None:
        """Raises BadSpec."""
        kwargs, tools = spec.chat_template_kwargs or {}, {"tools": "data.tools"} if spec.tools else {}
        ours = {"self", "messages", "conversations", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        if wrong := sorted((ours - {"documents"}) & kwargs.keys()):
            raise BadSpec(f"data.chatTemplateKwargs: {', '.join(wrong)} is set by the run itself: remove it")
        text = self._text(spec)
        read = {"messages": self._field, **dict.fromkeys(kwargs, "data.chatTemplateKwargs"), **tools}
        for name, field in read.items():
            if not re.search(rf"\b{re.escape(name)}\b", text):
                raise BadSpec(
                    f"{field}: the chat template reads no {name!r}: "
                    "correct the name, or use another template (data.chatTemplateText)"
                )

    @property
    def _field(self) -> str:
        return "data.chatTemplateText" if self._own else "spec.model.path: the tokenizer's chat template"

    def _text(self, spec: PromptsSpec) -> str:
        """Of the template, which can be parsed. Raises BadSpec."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            text = self._tokenizer.get_chat_template(self._own, spec.tools)
        except ValueError:
            names = ", ".join(sorted(self._tokenizer.chat_template))
            raise BadSpec(
                f"data.chatTemplateText: the tokenizer has several chat templates ({names}) and no default: name one"
            ) from None
        try:
            self._tokenizer.apply_chat_template(PROBE, tokenize=False, add_generation_prompt=True, **self._options)
        except TemplateSyntaxError as error:
            raise BadSpec(f"{self._field}, line {error.lineno}: {error.message}") from None
        except (TemplateError, *REFUSALS):
            return text  # it may refuse a message that no prompt has
        return text

    def render(self, messages: list[Message]) -> str:
        """With the opening of the assistant's turn. Raises Unfit, or BadSpec for a fault of `data.chatTemplateText`."""
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self._options
                )
            )
        except (TemplateError, *REFUSALS) as error:
            reason = f"{type(error).__name__}: {error}"
            if (
                self._own and type(error) is not TemplateError
            ):  # which is `raise_exception`'s: the template knows what it refuses
                raise BadSpec(
                    f"data.chatTemplateText, line {_line(error)}: {reason}, for the messages {messages!r:.200}"
                ) from None
            raise Unfit(
                f"the chat template refuses the messages: {error if type(error) is TemplateError else reason}"
            ) from None

    def tokens(self, text: str, *, opening: bool) -> list[int]:
        """opening: with the special tokens that the tokenizer puts before a text, unless it has them. Raises Unfit."""
        if half := HALF_PAIR.search(text):
            raise Unfit(f"character {half.start()} is half a surrogate pair ({half[0]!r}), which is no text: remove it")
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if not token_ids:
            raise Unfit("the text has no tokens")
        if opening:
            if self._opening is None:
                self._opening = _before(token_ids, list(self._tokenizer.encode(text, add_special_tokens=True)))
            token_ids = token_ids if token_ids[: len(self._opening)] == self._opening else [*self._opening, *token_ids]
        if self._vocabulary is not None and max(token_ids) >= self._vocabulary:
            raise Unfit(
                f"the text has token {max(token_ids)}, and the model's embedding has {self._vocabulary} rows: "
                "remove the text that the tokenizer alone knows, or use a checkpoint whose embedding grew with it"
            )
        return token_ids


def _before(alone: list[int], whole: list[int]) -> list[int]:
    """The special tokens before a text. Those behind it are left out: EOS would end a prompt before its completion."""
    return next((whole[:start] for start in range(len(whole)) if whole[start : start + len(alone)] == alone), [])


def _line(error: BaseException) -> int | str:
    """Of a template, in which an error came up: jinja gives the frames their lines in it."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in ("<template>", "<unknown>")
    ]
    return lines[-1] or "?" if lines else "?"
