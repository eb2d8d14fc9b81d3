"""Pairs of texts of which it is known whether they mean the same, made from real rows by rules without a model.

Rows are taken in their order, so the same rows give the same pairs on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.english import (
    AUXILIARY,
    CONTRACTED,
    FIRST_WORD,
    FUNCTION_WORDS,
    NAME,
    NAMES,
    NOT_FRAMES,
    NUMBER,
    NUMBER_WORD,
    ORDINARY_WORDS,
    OTHER_NUMBERS,
    PAST,
    PERSON,
    PERSONS,
    SAME_FRAMES,
    SYNONYMS,
)
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


KINDS = ("identical", "paraphrased", "negated", "swapped", "other row")
SAME_KINDS = KINDS[:2]
# "after her children" is no clause: two words are too few to tell
_LINK = r"because|when|while|although|after(?= \S+ \S+ \S)|before(?= \S+ \S+ \S)"
_ONE_SENTENCE = r"(?=[^.?!;,:]+\.\Z)"  # looked for once, and not anew after each link
_CLAUSES = re.compile(rf"{_ONE_SENTENCE}([A-Z][^.?!;,:]*?) ({_LINK}) ([^.?!;,:]+)\.")


def paraphrased(text: str, turn: int = 0) -> str:
    """The same in a slightly other form, by the first of some rules that fits.

    Two clauses exchanged, a contraction made or undone, a word of the same meaning, or a frame around the text.

    Args:
        text: The text.
        turn: Which frame is taken where no other rule fits.
    """
    if found := _CLAUSES.fullmatch(text.strip()):
        main, link, other = found.groups()
        return f"{link.capitalize()} {other}, {_lower_first(main)}."
    for long, short in CONTRACTED.items():
        for old, new in ((long, short), (short, long)):
            for this, that in ((old, new), (_capital(old), _capital(new))):
                if re.search(rf"\b{re.escape(this)}\b", text):
                    return re.sub(rf"\b{re.escape(this)}\b", that, text, count=1)
    for old, new in SYNONYMS.items():
        if re.search(rf"\b{old}\b", text):
            return re.sub(rf"\b{old}\b", new, text, count=1)
    return _framed(SAME_FRAMES, text, turn)


def negated(text: str, turn: int = 0) -> str:
    """The opposite: a negation put in or taken out, or a frame that denies the text, which ``turn`` chooses."""
    for short in CONTRACTED.values():
        if short.endswith("n't") and short not in ("can't", "won't") and re.search(rf"\b{short}\b", text):
            return re.sub(rf"\b{short}\b", short.removesuffix("n't"), text, count=1)
    if re.search(r"\bnot ", text):
        return re.sub(r"\bnot ", "", text, count=1)
    if AUXILIARY.search(text):
        return AUXILIARY.sub(r"\1 not", text, count=1)
    if turn % 2 == 0 and (found := PAST.fullmatch(text.strip())):
        return f"{found[1]} never {found[2]}"
    return _framed(NOT_FRAMES, text, turn)


def swapped(text: str, turn: int = 0) -> str | None:
    """Another number, name or person in the place of one; None where there is none of them."""
    if number := NUMBER.search(text):
        return text[: number.start()] + str(int(number[0][:15]) + 3) + text[number.end() :]
    if word := NUMBER_WORD.search(text):
        other = next(each for each in OTHER_NUMBERS if each != word[0].casefold())
        return text[: word.start()] + (_capital(other) if word[0][0].isupper() else other) + text[word.end() :]
    if name := NAME.search(text) or _first_name(text):
        other = next(each for each in NAMES if each not in text)
        return text[: name.start()] + other + text[name.end() :]
    if person := PERSON.search(text):
        return text[: person.start()] + PERSONS[person[0]] + text[person.end() :]
    return None


def _first_name(text: str) -> re.Match[str] | None:
    """A capitalised first word that is a name, as far as a list of other words can tell."""
    found = FIRST_WORD.match(text)
    return None if found is None or found[0] in FUNCTION_WORDS else found


def _framed(frames: Sequence[str], text: str, turn: int) -> str:
    whole = text.strip()
    closed = whole if whole.endswith((".", "!", "?", '"', "'")) else f"{whole}."
    frame = frames[turn % len(frames)]
    return frame.replace("{text}", closed).replace("{lower}", _lower_first(whole))


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
    kinds = (
        _made(rows, column, "identical", lambda text, _: text),
        _made(rows, column, "paraphrased", paraphrased),
        _made(rows, column, "negated", negated),
        _made(rows, column, "swapped", swapped),
        _others(rows, column),
    )
    return [pair for made in kinds for _, pair in zip(range(most), made, strict=False)]


def _made(rows: Sequence[Row], column: str, kind: str, make: Callable[[str, int], str | None]) -> Iterator[Pair]:
    for turn, row in enumerate(rows):
        text = make(row[column], turn)
        if text is not None and (kind == "identical" or text != row[column]):
            yield Pair(kind, row, text, same=kind in SAME_KINDS)


def _others(rows: Sequence[Row], column: str) -> Iterator[Pair]:
    for number, row in enumerate(rows):
        other = rows[(number + len(rows) // 2) % len(rows)][column]
        if other != row[column]:
            yield Pair("other row", row, other, same=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower_first(text: str) -> str:
    """The text to stand within a sentence: a first word that is no name or ``I`` begins in lower case."""
    return text[:1].lower() + text[1:] if text.split(" ", 1)[0] in ORDINARY_WORDS else text
