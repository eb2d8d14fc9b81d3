"""Pairs of texts of which it is known whether they mean the same, made from real rows by rules without a model.

Rows are taken in their order, so the same rows give the same pairs on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.prompts import Example


@dataclass(frozen=True, slots=True)
class Pair:
    """A row and a text that may stand in the place of one of its columns.

    Attributes:
        kind: How the text was made.
        row: The row as it is.
        text: The other text.
        same: Whether it means the same.
    """

    kind: str
    row: Row
    text: str
    same: bool


_CONTRACTED = {
    "do not": "don't",
    "does not": "doesn't",
    "did not": "didn't",
    "is not": "isn't",
    "are not": "aren't",
    "was not": "wasn't",
    "were not": "weren't",
    "has not": "hasn't",
    "have not": "haven't",
    "had not": "hadn't",
    "could not": "couldn't",
    "would not": "wouldn't",
    "should not": "shouldn't",
    "cannot": "can't",
    "will not": "won't",
    "it is": "it's",
    "I am": "I'm",
    "they are": "they're",
    "we are": "we're",
}
_CLAUSES = re.compile(r"([A-Z][^.?!;,:]*?) (because|when|after|before|while|although) ([^.?!;,:]+)\.")
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|has|have|had|can|could|will|would|should|must|may|might|does|do|did)\b(?! not|n't)(?= )"
)
_NUMBER = re.compile(r"\d+")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
_NAMES = ("Miller", "Okafor", "Tanaka")


def paraphrased(text: str) -> str:
    """The same in a slightly other form: a contraction made or undone, two clauses exchanged, or a frame around it."""
    if found := _CLAUSES.fullmatch(text.strip()):
        main, link, other = found.groups()
        return f"{link.capitalize()} {other}, {_lower_first(main)}."
    for long, short in _CONTRACTED.items():
        for old, new in ((long, short), (short, long)):
            for this, that in ((old, new), (_capital(old), _capital(new))):
                if re.search(rf"\b{re.escape(this)}\b", text):
                    return re.sub(rf"\b{re.escape(this)}\b", that, text, count=1)
    return f"It is true that {_lower_first(text.strip())}"


def negated(text: str) -> str:
    """The opposite: a negation put in or taken out, or a frame that denies the text."""
    for short in _CONTRACTED.values():
        if short.endswith("n't") and short not in ("can't", "won't") and re.search(rf"\b{short}\b", text):
            return re.sub(rf"\b{short}\b", short.removesuffix("n't"), text, count=1)
    if re.search(r"\bnot ", text):
        return re.sub(r"\bnot ", "", text, count=1)
    if _AUXILIARY.search(text):
        return _AUXILIARY.sub(r"\1 not", text, count=1)
    return f"It is not true that {_lower_first(text.strip())}"


def swapped(text: str) -> str | None:
    """Another number or name in the place of one; None where there is neither."""
    if number := _NUMBER.search(text):
        return text[: number.start()] + str(int(number[0][:15]) + 3) + text[number.end() :]
    if name := _NAME.search(text):
        other = next(each for each in _NAMES if each not in text)
        return text[: name.start()] + other + text[name.end() :]
    return None


def make_pairs(rows: Sequence[Row], column: str, examples: Sequence[Example], *, most: int) -> list[Pair]:
    """Pairs of each kind, as many as the rows give and ``most`` allows.

    Args:
        rows: Rows that have text in the column.
        column: The column in question.
        examples: Rewrites that the prompts show with their verdicts: no test holds their texts.
        most: Of each kind.
    """
    shown = {str(each.row[column]).strip() for each in examples}
    rows = [row for row in rows if str(row[column]).strip() not in shown]
    kinds: dict[str, Iterator[Pair]] = {
        "identical": _made(rows, column, "identical", lambda text: text, same=True),
        "paraphrased": _made(rows, column, "paraphrased", paraphrased, same=True),
        "negated": _made(rows, column, "negated", negated, same=False),
        "swapped": _made(rows, column, "swapped", swapped, same=False),
        "other row": _others(rows, column),
    }
    return [pair for made in kinds.values() for _, pair in zip(range(most), made, strict=False)]


def _made(
    rows: Sequence[Row], column: str, kind: str, make: Callable[[str], str | None], *, same: bool
) -> Iterator[Pair]:
    for row in rows:
        text = make(row[column])
        if text is not None and (kind == "identical" or text != row[column]):
            yield Pair(kind, row, text, same)


def _others(rows: Sequence[Row], column: str) -> Iterator[Pair]:
    for number, row in enumerate(rows):
        other = rows[(number + len(rows) // 2) % len(rows)][column]
        if other != row[column]:
            yield Pair("other row", row, other, same=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower_first(text: str) -> str:
    """The text to stand within a sentence: a first word that is no name or ``I`` begins in lower case."""
    first = text.split(" ", 1)[0]
    ordinary = {"The", "A", "An", "It", "He", "She", "They", "We", "You", "This", "That", "These", "Those", "My", "Her"}
    ordinary |= {
        "His",
        "Their",
        "Our",
        "Your",
        "There",
        "In",
        "On",
        "At",
        "After",
        "Before",
        "When",
        "As",
        "Its",
        "One",
    }
    return text[:1].lower() + text[1:] if first in ordinary else text
