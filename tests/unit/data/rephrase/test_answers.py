"""What an endpoint says may be anything: an answer or a fault comes of it, and no other error."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedzo.data.preprocess.backend import Completion
from fedzo.data.preprocess.rephrase.answers import MAX_TEXT, MalformedError, error_words, read_answer, retry_after

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _maybe(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, PLAIN)


MESSAGE = _maybe(st.fixed_dictionaries({"content": _maybe(st.none() | st.text())}, optional={"role": PLAIN}))
END = _maybe(st.sampled_from(["stop", "length"]))
CHOICE = _maybe(st.fixed_dictionaries({"message": MESSAGE}, optional={"finish_reason": END}))
USAGE = st.fixed_dictionaries(
    {}, optional={"prompt_tokens": _maybe(st.integers(0, 99)), "completion_tokens": _maybe(st.integers(0, 99))}
)
BODY = st.fixed_dictionaries(
    {"choices": _maybe(st.lists(CHOICE, min_size=1, max_size=2))},
    optional={"usage": _maybe(USAGE), "model": _maybe(st.text()), "id": PLAIN},
)


def _read(body: bytes) -> Completion | None:
    said = ""
    try:
        answer = read_answer(body, prompt_tokens=5, completion_tokens=6)
    except MalformedError as fault:
        said = str(fault)
    if said:
        assert len(said) < 1000
        assert said.isprintable()
        return None
    assert len(answer.text) <= MAX_TEXT
    answer.text.encode()
    assert 0 <= answer.prompt_tokens <= 1 << 40
    assert 0 <= answer.completion_tokens <= 1 << 40
    return answer


@given(st.binary())
def test_any_bytes(body: bytes) -> None:
    _read(body)
    assert error_words(body).isprintable()


@given(BODY, st.data())
def test_nearly_good_answers(value: dict[str, Any], data: st.DataObject) -> None:
    body = json.dumps(value).encode()
    answer = _read(body)
    if answer is not None:
        text, end = value["choices"][0]["message"]["content"], value["choices"][0].get("finish_reason")
        assert answer.text == ("" if (text, end) == (None, "length") else text)
        assert answer.truncated == (end != "stop")
        told = (value.get("usage") or {}).get("prompt_tokens")
        assert answer.prompt_tokens == (5 if told is None else told)
    _read(body[: data.draw(st.integers(0, len(body)))])


@given(st.text())
def test_any_wait(header: str) -> None:
    wait = retry_after(header)
    assert wait is None or wait >= 0


def test_waits_that_are_no_numbers() -> None:
    assert [retry_after(header) for header in ("nan", "inf", "1e999", "", "Fri, 99 Xyz 2026 00:00:00 GMT")] == [
        None
    ] * 5
    assert retry_after("Fri, 01 Jan 2021 00:00:00 GMT") == 0
    assert retry_after("1.5") == 1.5


def test_the_words_of_an_error_are_found() -> None:
    for body in (b'{"error": {"message": "a\\nb"}}', b'{"error": "a\\nb"}', b"a\nb"):
        assert error_words(body) == '"a b"'
    assert error_words(b" ") == ""
