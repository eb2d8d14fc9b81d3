"""What an endpoint says, read with trust in nothing: an answer of a chat, how long to wait, words of an error."""

from __future__ import annotations

import email.utils
import math
import time
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Annotated, Any

from fedzo.data.chat import END_OF_THOUGHT, after_thought
from fedzo.data.preprocess.backend import Completion, RowFault, RowReason
from fedzo.errors import quoted
from fedzo.records.decode import decode, parse_json
from fedzo.records.fields import Length, Within

MAX_ANSWER_BYTES = 4 << 20
"""Longest answer of an endpoint that is read."""
MAX_TEXT = 1 << 18
"""Longest text of a model, in characters."""
MAX_COUNT = 1 << 40
_THOUGHT = "<think>"

AnswerText = Annotated[str, Length(0, MAX_TEXT)]
TokenCount = Annotated[int, Within(0, MAX_COUNT)]
ModelName = Annotated[str, Length(0, 1000)]


class MalformedError(RowFault):
    """An answer that cannot be read."""

    def __init__(self, details: str) -> None:
        super().__init__(RowReason.malformed, details)


@dataclass(frozen=True, slots=True)
class _Answer:
    text: AnswerText
    finish_reason: Annotated[str, Length(0, 200)] | None
    model: ModelName
    prompt_tokens: TokenCount | None
    completion_tokens: TokenCount | None


def read_answer(body: bytes, *, prompt_tokens: int, completion_tokens: int) -> Completion:
    """The first choice of a ``chat.completion``; fields beside those that are used may hold anything.

    Args:
        body: As it came.
        prompt_tokens: Told where the endpoint does not count.
        completion_tokens: Told where the endpoint does not count.

    Raises:
        MalformedError: It is not JSON, has another shape, or no text, or tells of an error.
    """
    value = parse_json(body, where="answer", error=MalformedError)
    if type(value) is dict and "error" in value and "choices" not in value:
        raise MalformedError(f"an error in place of an answer: {error_words(body[:4000])}")
    choices = _entry(value, "choices", "answer")
    if type(choices) is not list or not choices:
        raise MalformedError("answer.choices must be a list that is not empty")
    message = _entry(choices[0], "message", "answer.choices[0]")
    text = _entry(message, "content", "answer.choices[0].message")
    end = _entry(choices[0], "finish_reason", "answer.choices[0]", required=False)
    usage = _entry(value, "usage", "answer", required=False)
    counts = ("prompt_tokens", "completion_tokens")
    known: dict[str, Any] = {
        "text": "" if text is None and end == "length" else text,  # its thought, which is elsewhere, took all tokens
        "finish_reason": end,
        "model": _entry(value, "model", "answer", required=False) or "",
    } | {name: None if usage is None else _entry(usage, name, "answer.usage", required=False) for name in counts}
    answer = decode(_Answer, known, where="answer", error=MalformedError)
    return Completion(
        text=answer.text,
        truncated=answer.finish_reason != "stop",
        model=answer.model,
        prompt_tokens=prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens,
        completion_tokens=completion_tokens if answer.completion_tokens is None else answer.completion_tokens,
    )


def without_thought(answer: Completion) -> Completion:
    """The answer behind what a model wrote while it thought; one that ends in its thoughts was cut off.

    Where a chat template begins the thought, the answer has its end alone.
    """
    if END_OF_THOUGHT in answer.text:
        return replace(answer, text=after_thought(answer.text))
    return replace(answer, truncated=True) if answer.text.lstrip().startswith(_THOUGHT) else answer


def _entry(value: object, name: str, where: str, *, required: bool = True) -> Any:
    if type(value) is not dict or (required and name not in value):
        raise MalformedError(f"{where} must be an object" + (f" with {name}" if required else ""))
    return value.get(name)


def retry_after(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for: a number or an HTTP date; None where it says neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def error_words(body: bytes) -> str:
    """What an endpoint says beside its status, in quotes on one line; empty where it says nothing."""
    text = body.decode("utf-8", "replace").strip()
    try:
        error = parse_json(body, where="", error=MalformedError)["error"]
        text = error if isinstance(error, str) else str(error["message"])
    except (MalformedError, LookupError, TypeError):
        pass
    return quoted(text) if text else ""
