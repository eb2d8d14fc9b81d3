"""A model's chat template: texts that go through it, and what it writes before a question and behind an answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from fedzo.data.conversation import ASSISTANT, Turn, opened
from fedzo.errors import ConfigError, printable

END_OF_THOUGHT = "</think>"
_TODAY = "26 Jul 2024"  # what Llama's templates write where nobody tells them the day
_SAME_DAY = f"{{% macro strftime_now(format) %}}{_TODAY}{{% endmacro %}}\n"
"""Hides the ``strftime_now`` of transformers. Its newline is dropped, so the template behind it renders as before."""
_SAMPLES = ("zqxj", "jxqz")
"""Words that no template has. Their first letters differ, so all that is before both is the template's own."""


def apply_chat_template(tokenizer: Any, conversation: Sequence[Turn], **arguments: Any) -> Any:
    """As the tokenizer's own, but a template that asks for today's date gets the same date on every day.

    With the real date a resumed run, another site and a later evaluation would read other prompts than the run did.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        conversation: Messages with ``role`` and ``content``.
        arguments: Further ones of the tokenizer's ``apply_chat_template``.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # by name; transformers takes this one
        template = template.get("default", "")
    if "strftime_now" in template:
        arguments["chat_template"] = _SAME_DAY + template
    return tokenizer.apply_chat_template(conversation, **arguments)


def chat_texts(asked: Sequence[Turn], answer: str, tokenizer: Any) -> list[str]:
    """The messages as a prompt that an answer follows, and the messages with their answer."""
    return [_asked(asked, tokenizer), _answered(asked, answer, tokenizer)]


def encode_instructions(questions: Sequence[str], tokenizer: Any, *, system: str = "") -> list[tuple[int, ...]]:
    """Token ids of questions as prompts of a chat, as the rows of ``kind=instruction`` have them.

    Args:
        questions: The texts of the user.
        tokenizer: A transformers tokenizer with a chat template.
        system: The system message before each of them, if any.

    Raises:
        ConfigError: The chat template does not take such a text.
    """
    if not questions:
        return []
    try:
        texts = [_asked(opened(question, system), tokenizer) for question in questions]
    except Exception as error:  # whatever the template's own code raises
        asked = "a system message and a text of the user" if system else "a text of the user alone"
        raise ConfigError(
            f"the model's chat template must take {asked}, but raises "
            f"{type(error).__name__}: {printable(str(error), most=200)}. Choose another model or chat template, or "
            "leave out --chat."
        ) from error
    return [tuple(tokens) for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def chat_opening(tokenizer: Any, *, system: str = "") -> tuple[int, ...]:
    """Token ids that the chat template writes before the user's text, with the system message if there is one."""
    one, other = encode_instructions(_SAMPLES, tokenizer, system=system)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token for token, _ in shared)


def chat_end(tokenizer: Any) -> set[int]:
    """The special token that ends an answer in the chat template: the first that it writes behind one, if any.

    A model that is trained on the template ends its answers with it, and often the tokenizer names another end.
    """
    if not getattr(tokenizer, "chat_template", None):
        return set()
    question, answer = _SAMPLES
    try:
        text = _answered(opened(question), answer, tokenizer)
    except TemplateError:  # it takes no answers
        return set()
    behind = text.rpartition(answer)[2] if answer in text else ""
    if not behind:
        return set()
    ids = tokenizer([behind], add_special_tokens=False, verbose=False)["input_ids"][0]
    special = special_tokens(tokenizer)
    return set([token for token in ids if token in special][:1])


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens that a text may hold, by id: wherever it has their text, they are read."""
    try:
        added = tokenizer.added_tokens_decoder.items()
    except (AttributeError, NotImplementedError):  # mistral-common's has none: it reads all of a text as text
        return {}
    return {number: token.content for number, token in added if token.special}


def after_thought(text: str) -> str:
    """What a model wrote behind its thoughts; the whole text where no thought ends."""
    _, ended, said = text.partition(END_OF_THOUGHT)
    return said.lstrip() if ended else text


def _asked(chat: Sequence[Turn], tokenizer: Any) -> str:
    return _rendered([*chat], tokenizer, add_generation_prompt=True)


def _answered(chat: Sequence[Turn], answer: str, tokenizer: Any) -> str:
    return _rendered([*chat, {"role": ASSISTANT, "content": answer}], tokenizer, add_generation_prompt=False)


def _rendered(chat: list[Turn], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    """As text. Templates of models that can think write that they do not, in both texts; others ignore the names."""
    off = {"enable_thinking": False, "thinking": False}
    return str(apply_chat_template(tokenizer, chat, tokenize=False, add_generation_prompt=add_generation_prompt, **off))
