"""How one value, or an array of them, is read and written; and what is said of one that is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from reprlib import Repr
from types import NoneType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedzo.records.fields import ArrayShape, Length, Matching

NOTHING = object()
"""Stands for a value that is not there."""
MAX_SHOWN = 80
"""Characters of a value that are shown."""


class MismatchError(Exception):
    """A value is not what its field asks for; ``path`` grows from the inside out."""

    def __init__(self, rule: str, got: object) -> None:
        super().__init__(rule)
        self.rule = rule
        self.got = got
        self.path = ""

    def within(self, step: str) -> MismatchError:
        """The same, told from one level further out."""
        self.path = step + ("." if self.path and self.path[0] != "[" else "") + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path} must {self.rule}, got {shown(self.got)}".lstrip()


def shown(value: object) -> str:
    """A value in at most ``MAX_SHOWN`` characters, also where all of it would fill the memory."""
    return "nothing" if value is NOTHING else _SHORT.repr(value)[:MAX_SHOWN]


class _Short(Repr):
    """``reprlib`` makes the whole text of bytes and of long whole numbers before it cuts them."""

    def repr_str(self, value: str, level: int) -> str:
        return repr(value[:MAX_SHOWN])

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[:MAX_SHOWN])

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 256 else f"a whole number of {value.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxother = 3, 8, 8, MAX_SHOWN


class Codec(Protocol):
    """Reads and writes one kind of value; ``rule`` says what the value must do."""

    @property
    def rule(self) -> str: ...
    def read(self, value: Any) -> Any: ...
    def write(self, value: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Flag:
    """A boolean."""

    rule: str = "be true or false"

    def read(self, value: Any) -> bool:
        if type(value) is not bool:
            raise MismatchError(self.rule, value)
        return value

    def write(self, value: Any) -> bool:
        return self.read(value)


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number or a float within a range."""

    kind: type[int] | type[float]
    low: float
    high: float

    @property
    def rule(self) -> str:
        what, digits = ("a whole number", "") if self.kind is int else ("a float", "g")
        if self.low == self.high:
            return f"be {self.low:{digits}}"
        return f"be {what} of {self.low:{digits}} to {self.high:{digits}}"

    def read(self, value: Any) -> Any:
        if type(value) is not self.kind or not self.low <= value <= self.high:  # nan is in no range
            raise MismatchError(self.rule, value)
        return value

    def write(self, value: Any) -> Any:
        if not isinstance(value, int | float | np.number):
            raise MismatchError(self.rule, value)
        return self.read(self.kind(value))


_SURROGATE = re.compile("[\ud800-\udfff]")  # half a UTF-16 pair, which no file in UTF-8 can hold


@dataclass(frozen=True, slots=True)
class Text:
    """Text or bytes of bounded length."""

    kind: type[str] | type[bytes]
    length: Length

    @property
    def rule(self) -> str:
        what = "text of {} to {} characters" if self.kind is str else "{} to {} bytes"
        return "be " + what.format(self.length.least, self.length.most)

    def read(self, value: Any) -> Any:
        if type(value) is not self.kind or not self.length.least <= len(value) <= self.length.most:
            raise MismatchError(self.rule, value)
        if isinstance(value, str) and _SURROGATE.search(value):
            raise MismatchError("be text that UTF-8 can hold", value)
        return value

    def write(self, value: Any) -> Any:
        return self.read(value)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Text that a pattern matches as a whole."""

    matching: Matching

    @property
    def rule(self) -> str:
        return f"be {self.matching.says}"

    def read(self, value: Any) -> str:
        if type(value) is not str or not self.matching.pattern.fullmatch(value):
            raise MismatchError(self.rule, value)
        return value

    def write(self, value: Any) -> str:
        return self.read(value)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several words."""

    members: dict[str, Any]

    @property
    def rule(self) -> str:
        return f"be {' or '.join(map(repr, self.members))}"

    def read(self, value: Any) -> Any:
        if type(value) is not str or value not in self.members:
            raise MismatchError(self.rule, value)
        return self.members[value]

    def write(self, value: Any) -> str:
        self.read(str(value))
        return str(value)


@dataclass(frozen=True, slots=True)
class ArrayCodec:
    """Reads and writes the arrays of one ``ArrayShape``: nested lists of numbers in JSON.

    Their entries are looked at all at once: a line holds tens of thousands.
    """

    grid: ArrayShape

    @property
    def rule(self) -> str:
        what = {"bool": "true or false"}.get(self.grid.dtype, f"{self.grid.dtype} numbers, finite")
        unknown = " or null" if self.grid.unknown else ""
        return f"be {len(self.grid.most)} levels of lists, alike in length, of {what}{unknown}"

    def read(self, value: Any) -> npt.NDArray[Any]:
        shape, level = [], [value]
        for most in self.grid.most:
            if set(map(type, level)) != {list} or len(lengths := set(map(len, level))) != 1:
                raise MismatchError(self.rule, value)
            shape.append(lengths.pop())
            if not 1 <= shape[-1] <= most:
                raise MismatchError(f"be lists of 1 to {most} at level {len(shape)}", value)
            level = list(chain.from_iterable(level))
        kinds: set[type] = {bool} if self.grid.dtype == "bool" else {float}
        if not set(map(type, level)) <= (kinds | {NoneType} if self.grid.unknown else kinds):
            raise MismatchError(self.rule, value)
        with np.errstate(over="ignore"):
            array = np.array(level, bool if self.grid.dtype == "bool" else np.float64).astype(self.grid.dtype)
        if np.isinf(array).any() if self.grid.unknown else not np.isfinite(array).all():
            raise MismatchError(self.rule, value)
        return array.reshape(shape)

    def write(self, value: Any) -> list[Any]:
        array = np.asarray(value)
        if array.ndim != len(self.grid.most) or array.dtype != self.grid.dtype:
            raise MismatchError(self.rule, value)
        if self.grid.dtype == "bool":
            return list(array.tolist())
        plain, unknown = array.astype(np.float64), ~np.isfinite(array)
        if unknown.any():
            if not self.grid.unknown:
                raise MismatchError(self.rule, value)
            plain = plain.astype(object)
            plain[unknown] = None
        return list(plain.tolist())
