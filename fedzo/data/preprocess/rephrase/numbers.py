"""The numbers of a text, from digits and English words: what a check compares. It takes time linear in the text."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from fedzo.data.words import folded

_MINUS = "-\u2212"
_NUMBER_OR_WORD = re.compile(rf"(?<![^\s(\[])[{_MINUS}](?=\d)|\d+(?:[.,]\d+)*|[^\W\d_]+")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_JOINS = re.compile(r"[\s-]{0,3}")
_UNIT_WORDS = (
    "zero zeroth|one first|two second|three third|four fourth|five fifth|six sixth|seven seventh|eight eighth|"
    "nine ninth|ten tenth|eleven eleventh|twelve twelfth|thirteen thirteenth|fourteen fourteenth|fifteen fifteenth|"
    "sixteen sixteenth|seventeen seventeenth|eighteen eighteenth|nineteen nineteenth"
)
_TEN_WORDS = (
    "twenty twentieth|thirty thirtieth|forty fortieth|fifty fiftieth|sixty sixtieth|seventy seventieth|"
    "eighty eightieth|ninety ninetieth"
)
_SMALL = {word: value for value, both in enumerate(_UNIT_WORDS.split("|")) for word in both.split()}
_SMALL |= {word: 10 * value for value, both in enumerate(_TEN_WORDS.split("|"), start=2) for word in both.split()}
_SMALL |= {f"{word}s": value for word, value in _SMALL.items() if word.endswith(("th", "third"))}  # two thirds
_SCALES = {
    "hundred": 100,
    "thousand": 1_000,
    "million": 10**6,
    "billion": 10**9,
    "bn": 10**9,
    "trillion": 10**12,
}
_SCALES |= {f"{word}th": value for word, value in _SCALES.items() if word != "bn"}
# They often say something else ("no one", "at first", "a second"), or say the number in passing ("both"): none of
# them must be there, and each may stand for its number.
_LOOSE = {"one": 1, "first": 1, "second": 2, "once": 1, "single": 1, "twice": 2, "both": 2, "couple": 2, "pair": 2}
_LOOSE |= {"double": 2, "dozen": 12, "triple": 3, "hundreds": 100, "thousands": 1_000, "millions": 10**6}
_LOOSE |= {"billions": 10**9}
_MAX_DIGITS = 30


def numbers(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The numbers of a text as plain decimals, from digits and English number words, ordinals too.

    Returns:
        Those that surely are numbers, and those that words tell that often say something else (``one``, ``second``).
    """
    read = folded(text)
    found = _Numbers()
    end = 0
    for match in _NUMBER_OR_WORD.finditer(read):
        token = match.group()
        if not _JOINS.fullmatch(read, end, match.start()):
            found.close()
        found.add(token)
        end = match.end()
    found.close()
    return frozenset(found.sure), frozenset(found.loose)


class _Numbers:
    """Reads word after word; words that stand beside each other are one number where English says so."""

    def __init__(self) -> None:
        self.sure: set[str] = set()
        self.loose: set[str] = set()
        self._words: list[str] = []  # of the number that is being read
        self._sign = ""  # a minus that stands right before it
        self._done = self._part = self._last = Decimal(0)  # thousands and more; what is below; the last word's value

    def close(self) -> None:
        """The number ends here."""
        if self._words:
            alone = len(self._words) == 1 and self._words[0] in _LOOSE
            (self.loose if alone else self.sure).add(self._sign + _plain(self._done + self._part))
        self._words, self._sign = [], ""
        self._done = self._part = self._last = Decimal(0)

    def add(self, token: str) -> None:
        """Read a word, or a sign."""
        if token in _MINUS or token == "minus":
            self.close()
            self._sign = "-"
        elif token[0].isdecimal():
            self._add_digits(token)
        elif token in _SCALES:
            self._add_scale(token)
        elif token in _SMALL:
            self._add_small(token, Decimal(_SMALL[token]))
        elif token != "and" or not self._words or self._last < 100:
            self.close()
            if token in _LOOSE:
                self.loose.add(str(_LOOSE[token]))

    def _add_digits(self, token: str) -> None:
        values = _digits(token)
        if len(values) > 1 or len(values[0]) > _MAX_DIGITS:  # a date, or too long to reckon with
            if self._words:
                self.close()
            self.sure |= {self._sign + values[0], *values[1:]}
            self.close()
        else:
            self._add_small(token, Decimal(values[0]))

    def _add_small(self, token: str, value: Decimal) -> None:
        below_ten = 20 <= self._last < 100 and self._last % 10 == 0 and 0 < value < 10  # "twenty-one"
        year = 10 <= self._part < 100 and 10 <= value < 100 and self._part != 10  # "nineteen ninety"
        words_only = not any(word[0].isdecimal() for word in (*self._words, token))
        if self._words and self._words[-1][0].isdecimal() and token[0].isdecimal():  # "in 2000 12 people": two numbers
            self.close()
        elif self._words and year and words_only and not self._done and len(self._words) == 1:
            self._part *= 100
        elif self._words and not (self._last >= 100 > value or (below_ten and words_only)):
            self.close()
        self._words.append(token)
        self._part += value
        self._last = value

    def _add_scale(self, token: str) -> None:
        scale = Decimal(_SCALES[token])
        if scale == 100:
            self._part = (self._part or Decimal(1)) * scale
        else:
            self._done += (self._part or Decimal(1)) * scale
            self._part = Decimal(0)
        self._words.append(token)
        self._last = scale


def _digits(token: str) -> list[str]:
    """The numbers of a piece of digits, commas and full stops: one, or several as in a date or a list."""
    digits = "".join(sign if sign in ",." else str(unicodedata.decimal(sign)) for sign in token)
    if _THOUSANDS.fullmatch(digits):
        digits = digits.replace(",", "")
    pieces = [each for piece in digits.split(",") for each in (piece.split(".") if piece.count(".") > 1 else [piece])]
    return [_plain(Decimal(piece)) if len(piece) <= _MAX_DIGITS else piece.lstrip("0") for piece in pieces]


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
