"""Rendering by real tokenizers: own templates, their variables and tools, special tokens, and what is refused."""

from typing import Any

import pytest

from hack.tiny_model import tokenizer
from rlhf_api.job import PromptsSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.rollout.episode import Speech
from rlhf_worker.template import Message, Template, Unfit

BOS, EOS = 1, 2
HI: list[Message] = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = (
    PLAIN
    + "{% if enable_thinking is defined and not enable_thinking %}/no{% endif %}"
    + "{% if tools %}{{ tools[0].name }}{% endif %}"
)


def template(given: Any = None, vocabulary: int | None = None, **fields: Any) -> Template:
    return Template(given or tokenizer(), PromptsSpec.model_validate({"jsonl": {"path": "/p"}, **fields}), vocabulary)


def of_the_tokenizer(text: Any) -> Any:
    made = tokenizer()
    made.chat_template = text
    return made


def adding(single: str) -> Any:
    """The tiny tokenizer with a post-processor."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return made


def test_own_text_comes_before_the_tokenizers() -> None:
    assert template(of_the_tokenizer("{{ messages[0].content }}!")).render(HI) == "hi!"
    assert template(of_the_tokenizer("{{ messages[0].content }}!"), chatTemplateText=PLAIN).render(HI) == "user: hi\n"
    assert template(chatTemplateText=PLAIN).chat and not template().chat
    assert not template(of_the_tokenizer(PLAIN), chatTemplate=False).chat


def test_variables_and_tools_reach_the_template() -> None:
    given = of_the_tokenizer(THINKING)
    assert template(given).render(HI) == "user: hi\n"
    assert template(given, chatTemplateKwargs={"enable_thinking": False}).render(HI) == "user: hi\n/no"
    assert (
        template(given, chatTemplateKwargs={"enable_thinking": True}, tools=[{"name": "add"}]).render(HI)
        == "user: hi\nadd"
    )


def test_one_of_the_tokenizers_templates_by_its_name() -> None:
    several = of_the_tokenizer({"short": "{{ messages[0].content }}", "long": PLAIN})
    assert template(several, chatTemplateText="short").render(HI) == "hi"
    with pytest.raises(
        BadSpec,
        match=r"data\.chatTemplateText: the tokenizer has several chat templates \(long, short\) and no default",
    ):
        template(several)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"chatTemplateText": "{{ messages }}\n{% if %}"}, r"data\.chatTemplateText, line 2: Expected an expression"),
        ({"chatTemplateText": "{% for m in messages %}"}, r"data\.chatTemplateText, line 1: "),
        ({"chatTemplateText": "short"}, r"data\.chatTemplateText: the chat template reads no 'messages'"),
        (
            {"chatTemplateText": PLAIN, "chatTemplateKwargs": {"enable_thinkin": True}},
            r"data\.chatTemplateKwargs: the chat template reads no 'enable_thinkin'",
        ),
        ({"chatTemplateText": PLAIN, "tools": [{"name": "add"}]}, r"data\.tools: the chat template reads no 'tools'"),
        *(
            (
                {"chatTemplateText": PLAIN, "chatTemplateKwargs": {name: True}},
                rf"data\.chatTemplateKwargs: {name} is set by the run",
            )
            for name in ("self", "tokenize", "messages", "conversation", "add_generation_prompt", "tools")
        ),
        ({"chatTemplateKwargs": {"a": 1}}, r"data\.chatTemplateKwargs needs a chat template"),
        ({"tools": [{"name": "add"}]}, r"data\.tools needs a chat template"),
    ],
)
def test_what_is_wrong_with_a_template_is_told_at_the_start(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSpec, match=words):
        template(**fields)


def test_a_broken_template_of_the_checkpoint_is_told_as_its_own() -> None:
    with pytest.raises(BadSpec, match=r"spec\.model\.path: the tokenizer's chat template, line 1: "):
        template(of_the_tokenizer("{% for m in messages %}"))


def test_a_fault_of_the_own_text_is_no_fault_of_the_data() -> None:
    """But what the template refuses by itself is."""
    text = "{% for m in messages %}\n{{ m.content + 1 }}\n{% endfor %}"
    with pytest.raises(BadSpec, match=r"data\.chatTemplateText, line 2: TypeError"):
        template(chatTemplateText=text).render(HI)
    with pytest.raises(Unfit, match="the chat template refuses the messages: TypeError"):
        template(of_the_tokenizer(text)).render(HI)
    refusing = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}{{ messages }}"
    )
    with pytest.raises(Unfit, match="the chat template refuses the messages: a system message first"):
        template(chatTemplateText=refusing).render(HI)


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        ("$A", "ab", []), ("<s> $A", "ab", [BOS]), ("<s> $A </s>", "ab", [BOS]), ("$A </s>", "ab", []),
        ("<s> $A </s>", "<s>ab", []), ("$A", "<s>ab", []),
    ],
)  # fmt: skip
def test_a_text_opens_as_the_tokenizer_has_it_once_and_never_ends(single: str, text: str, expected: list[int]) -> None:
    alone = list(tokenizer().encode(text, add_special_tokens=False))
    made = template(adding(single))
    assert made.tokens(text, opening=True) == [*expected, *alone]
    assert made.tokens("b", opening=True)[:-1] == ([BOS] if "<s>" in single else [])
    assert made.tokens(text, opening=False) == alone


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no tokens"),
        ("a\udc80", "character 1 is half a surrogate pair"),
        ("z", r"token 29, and the model's embedding has 20 rows"),
    ],
)
def test_texts_that_are_no_prompt(text: str, words: str) -> None:
    with pytest.raises(Unfit, match=words):
        template(vocabulary=20).tokens(text, opening=True)


def test_special_tokens_are_shown_where_asked_but_for_the_last() -> None:
    given = tokenizer()
    said = [BOS, *given.encode("ab", add_special_tokens=False), EOS]
    assert Speech(given, template(given)).text([], said, "stop") == "ab"
    assert Speech(given, template(given), special=True).text([], said, "stop") == "<s>ab"
    assert Speech(given, template(given), special=True).text([], said, "length") == "<s>ab</s>"
