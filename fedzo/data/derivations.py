"""The few fields of rows that a template cannot express: what ``task.derive`` may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedzo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Derivation:
    """Fields made from a row's columns: ``make`` gets the text of ``reads`` and returns ``makes``.

    Attributes:
        may_be_blank: Columns of ``reads`` that a row may leave blank.
        answers: Columns of ``reads`` that become a written answer.
    """

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    make: Callable[[dict[str, str]], dict[str, str]]
    may_be_blank: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


def find_derivation(name: str) -> Derivation:
    """The derivation of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in DERIVATIONS:
        raise ConfigError(f"task.derive must be one of {', '.join(DERIVATIONS)} or null, got {name!r}.")
    return DERIVATIONS[name]


def _boolq(row: dict[str, str]) -> dict[str, str]:
    """MeZO's question: a capital and a question mark."""
    question = row["question"]
    return {"question": question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")}


def _wsc(row: dict[str, str]) -> dict[str, str]:
    return {"span2_text": row["span2_text"].lower()}


def _copa(row: dict[str, str]) -> dict[str, str]:
    """MeZO's sentence: premise without its full stop, a conjunction, a choice in lower case (but for a first I)."""
    conjunctions = {"cause": "because", "effect": "so"}
    if row["question"] not in conjunctions:
        raise ConfigError(f"column 'question' (task.derive=copa) must be cause or effect, got {row['question']!r}.")
    choices = {column: _lower_first_word(row[column]) for column in ("choice1", "choice2")}
    return {"premise": row["premise"].removesuffix("."), "conjunction": conjunctions[row["question"]], **choices}


def _lower_first_word(text: str) -> str:
    first, space, rest = text.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _alpaca(row: dict[str, str]) -> dict[str, str]:
    """Alpaca's three columns as a prompt and a response."""
    prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"prompt": prompt, "response": row["output"]}


DERIVATIONS = {
    "alpaca": Derivation(
        ("instruction", "input", "output"),
        ("prompt", "response"),
        _alpaca,
        may_be_blank=("input",),
        answers=("output",),
    ),
    "boolq": Derivation(("question",), ("question",), _boolq),
    "copa": Derivation(
        ("premise", "question", "choice1", "choice2"), ("premise", "conjunction", "choice1", "choice2"), _copa
    ),
    "wsc": Derivation(("span2_text",), ("span2_text",), _wsc),
}
"""What ``task.derive`` may name."""
