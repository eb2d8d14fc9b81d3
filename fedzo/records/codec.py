"""How each kind of field is read and written: one small codec a type hint, put together once and kept.

``read`` takes plain values, of JSON or of a Flower ConfigRecord, and lets nothing pass but what the hint and its ranges
allow. ``write`` is its inverse. A bool is no int, and an int is no float.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from math import isfinite
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from fedzo.errors import printable
from fedzo.records.fields import ArrayShape, Length, Matching, OmitDefault, Within
from fedzo.records.values import NOTHING, ArrayCodec, Choice, Codec, Flag, MismatchError, Number, Pattern, Text


def codec_of(hint: Any) -> Codec:
    """The codec of a type hint, made once.

    Raises:
        TypeError: The hint has no codec, or lacks a range.
    """
    return _made(hint)


@cache
def _made(hint: Any) -> Codec:
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _Record(hint)  # type: ignore[arg-type]
    if hint is bool:
        return Flag()
    if hint in (int, float):
        within = _mark(hint, marks, Within)
        return Number(hint, within.low, within.high)
    if hint is str and any(isinstance(mark, Matching) for mark in marks):
        return Pattern(_mark(hint, marks, Matching))
    if hint in (str, bytes):
        return Text(hint, _mark(hint, marks, Length))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return Choice({str(member): member for member in hint})
    if origin is Literal:
        return Choice({word: word for word in inner})
    if origin in (Union, types.UnionType):
        options = tuple(codec_of(option) for option in inner if option is not types.NoneType)
        return _Either(options, nullable=types.NoneType in inner)
    if origin is tuple and inner[1:] == (...,):
        return _List(codec_of(inner[0]), _mark(hint, marks, Length))
    if origin is tuple:
        return _Fixed(tuple(codec_of(item) for item in inner))
    if origin is dict:
        return _Table(codec_of(inner[0]), codec_of(inner[1]), _mark(hint, marks, Length))
    if origin is np.ndarray:
        return ArrayCodec(_mark(hint, marks, ArrayShape))
    raise TypeError(f"a field of a record cannot be of type {hint}")


def _mark(hint: Any, marks: tuple[Any, ...], kind: type[Any]) -> Any:
    found = [mark for mark in marks if isinstance(mark, kind)]
    if len(found) != 1:
        raise TypeError(f"a field of type {hint} must be annotated with one {kind.__name__}, got {marks}")
    return found[0]


@dataclass(frozen=True, slots=True)
class _Either:
    """One of several kinds, of which null may be one: then it stands for a number that is not finite, too."""

    options: tuple[Codec, ...]
    nullable: bool

    @property
    def rule(self) -> str:
        rules = [option.rule.removeprefix("be ") for option in self.options]
        return "be " + " or ".join([*rules, "null"] if self.nullable else rules)

    def read(self, value: Any) -> Any:
        if value is None and self.nullable:
            return None
        return self._first([option.read for option in self.options], value)

    def write(self, value: Any) -> Any:
        if self.nullable and (value is None or (isinstance(value, float) and not isfinite(value))):
            return None
        return self._first([option.write for option in self.options], value)

    def _first(self, changes: list[Callable[[Any], Any]], value: Any) -> Any:
        inside = None
        for change in changes:
            try:
                return change(value)
            except MismatchError as error:
                inside = error if error.path else inside  # what is wrong inside says more than what it is not
        raise inside or MismatchError(self.rule, value)


@dataclass(frozen=True, slots=True)
class _List:
    item: Codec
    length: Length

    @property
    def rule(self) -> str:
        return f"be a list of {self.length.least} to {self.length.most}"

    def read(self, value: Any) -> tuple[Any, ...]:
        if type(value) is not list or not self.length.least <= len(value) <= self.length.most:
            raise MismatchError(self.rule, value)
        return tuple(_each(self.item.read, value))

    def write(self, value: Any) -> list[Any]:
        return [*_each(self.item.write, value)]


def _each(change: Callable[[Any], Any], values: Iterable[Any]) -> Iterable[Any]:
    for index, value in enumerate(values):
        try:
            yield change(value)
        except MismatchError as error:
            raise error.within(f"[{index}]") from None


@dataclass(frozen=True, slots=True)
class _Fixed:
    items: tuple[Codec, ...]

    @property
    def rule(self) -> str:
        return "be [" + ", ".join(item.rule.removeprefix("be ") for item in self.items) + "]"

    def read(self, value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(self.items):
            raise MismatchError(self.rule, value)
        return tuple(_each(lambda pair: pair[0].read(pair[1]), zip(self.items, value, strict=True)))

    def write(self, value: Any) -> list[Any]:
        return [*_each(lambda pair: pair[0].write(pair[1]), zip(self.items, value, strict=True))]


_DECIMAL = re.compile("0|[1-9][0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class _Table:
    """An object of JSON as a dict; keys that are numbers are written in decimal."""

    key: Codec
    value: Codec
    length: Length

    @property
    def rule(self) -> str:
        return f"be an object of {self.length.least} to {self.length.most} entries"

    def read(self, value: Any) -> dict[Any, Any]:
        if type(value) is not dict or not self.length.least <= len(value) <= self.length.most:
            raise MismatchError(self.rule, value)
        found = {}
        for key, item in value.items():
            try:
                number = isinstance(self.key, Number) and type(key) is str and _DECIMAL.fullmatch(key)
                name = self.key.read(int(key) if number else key)
            except MismatchError as error:
                raise MismatchError(f"have keys that are {error.rule.removeprefix('be ')}", key) from None
            try:
                found[name] = self.value.read(item)
            except MismatchError as error:
                raise error.within(f"[{name!r:.40}]") from None
        return found

    def write(self, value: Any) -> dict[str, Any]:
        return {str(self.key.write(key)): self.value.write(item) for key, item in value.items()}


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


class _Record:
    """A dataclass as an object of JSON; ``kind``, where the class has one, is the object's first entry."""

    def __init__(self, cls: type) -> None:
        hints = get_type_hints(cls, include_extras=True)
        self._cls = cls
        self._kind: str | None = vars(cls).get("kind")
        own = {each.name: each for each in fields(cls)}
        first: tuple[str, ...] = vars(cls).get("first", ())
        ordered = [*first, *(name for name in own if name not in first)]
        self._codecs = {name: codec_of(hints[name]) for name in ordered}
        self._required = {
            name for name, each in own.items() if each.default is MISSING and each.default_factory is MISSING
        }
        self._omitted = {name: _default(own[name]) for name in own if OmitDefault() in get_args(hints[name])}

    @property
    def rule(self) -> str:
        return "be an object" + (f" of the kind {self._kind!r}" if self._kind else "")

    def read(self, value: Any) -> Any:
        if type(value) is not dict:
            raise MismatchError(self.rule, value)
        if self._kind is not None and value.get("kind") != self._kind:
            raise MismatchError(f"be {self._kind!r}", value.get("kind", NOTHING)).within("kind")
        found = {}
        for name, codec in self._codecs.items():
            if name in value:
                try:
                    found[name] = codec.read(value[name])
                except MismatchError as error:
                    raise error.within(name) from None
            elif name in self._required:
                raise MismatchError(codec.rule, NOTHING).within(name)
        if len(found) + (self._kind is not None) < len(value):
            stray = next(name for name in value if name not in found and (name != "kind" or self._kind is None))
            rule = f"be left out: {self._cls.__name__} has no such field"
            raise MismatchError(rule, value[stray]).within(printable(f"{stray!s:.40}"))
        try:
            return self._cls(**found)
        except ValueError as error:
            raise MismatchError(str(error), value) from error

    def write(self, value: Any) -> dict[str, Any]:
        if type(value) is not self._cls:
            raise MismatchError(self.rule, value)
        plain: dict[str, Any] = {} if self._kind is None else {"kind": self._kind}
        for name, codec in self._codecs.items():
            entry = getattr(value, name)
            if name in self._omitted and entry == self._omitted[name]:
                continue
            try:
                plain[name] = codec.write(entry)
            except MismatchError as error:
                raise error.within(name) from None
        return plain
