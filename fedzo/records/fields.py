"""How a record's field declares its range: markers for ``typing.Annotated``, and the ranges that many records share.

``fedzo.records.codec`` reads them. A number, text, list or table without one is an error of the programmer.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Within:
    """A number's range, both ends included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Length:
    """How long a text, a list or a table is: characters, bytes or entries, both ends included."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Matching:
    """A text that the pattern matches as a whole; ``says`` tells a person."""

    pattern: re.Pattern[str]
    says: str


@dataclass(frozen=True, slots=True)
class ArrayShape:
    """An array: nested lists of equal lengths in JSON.

    Attributes:
        dtype: ``float32``, ``float64`` or ``bool``.
        most: The longest that each axis may be; the shortest is 1.
        unknown: Whether a number may be unknown: null in JSON, nan in the array.
    """

    dtype: Literal["float32", "float64", "bool"]
    most: tuple[int, ...]
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class OmitDefault:
    """A field that is left out where it has its default."""


MAX_ROUNDS, MAX_STEPS, MAX_OWNERS = 0xFFFFFFFF, 0xFFFF, 0x7FFF
"""The most rounds, steps (and probes), and owners, that a record of the log can count."""
MAX_CLIENTS = 1 << 20
"""The most clients that a line tells of."""
MAX_TEXT = 1000
"""The longest text that a peer's words or a file bring along, in characters."""
_LARGEST = sys.float_info.max

Client = Annotated[int, Within(0, 0xFFFFFFFD)]
"""A client's index; the two numbers above it stand for all clients and for a pool of directions."""
RoundNumber = Annotated[int, Within(0, MAX_ROUNDS)]
"""A round, from 0, or how many are done."""
Steps = Annotated[int, Within(1, MAX_STEPS)]
Count = Annotated[int, Within(0, 1 << 53)]
"""Bytes, rows or weights."""
Check = Annotated[int, Within(0, 0xFFFFFFFF)]
"""A 32-bit check of trained values."""
Real = Annotated[float, Within(-_LARGEST, _LARGEST)]
"""Any finite number."""
Magnitude = Annotated[float, Within(0.0, _LARGEST)]
MAX_READING = 1e15
Reading = Annotated[float, Within(-MAX_READING, MAX_READING)]
"""What an evaluator reads off a model: so far from the largest float that no mean or sum overflows."""
Seconds = Annotated[float, Within(0.0, 1e12)]
Share = Annotated[float, Within(0.0, 1.0)]
LearningRate = Annotated[float, Within(0.0, float(np.finfo(np.float32).max))]
HASH = re.compile("[0-9a-f]{64}")
"""A SHA-256, written in hexadecimal."""
Hash = Annotated[str, Matching(HASH, "64 hexadecimal digits")]
HashOrEmpty = Annotated[str, Matching(re.compile(f"{HASH.pattern}|"), "64 hexadecimal digits")]
Name = Annotated[str, Length(1, 200)]
PluginName = Annotated[str, Matching(re.compile("[A-Za-z_][A-Za-z0-9_-]{0,99}"), "a plugin's name")]
Words = Annotated[str, Length(0, MAX_TEXT)]
Clients = Annotated[tuple[Client, ...], Length(0, MAX_CLIENTS)]
Series = Annotated[tuple[Real | None, ...], Length(1, MAX_STEPS)]
"""One number a local step; None where unknown."""
LabelCounts = Annotated[dict[Annotated[str, Length(0, 200)], Count], Length(0, 1 << 16)]
"""Rows by label."""
Figures = Annotated[
    dict[Annotated[str, Matching(re.compile("[A-Za-z0-9_. -]{1,161}"), "letters, digits, spaces and _ . -")], Real],
    Length(0, 64),
]
"""What preprocess stages tell of a client's rows, by name."""
Scalars = Annotated[npt.NDArray[np.float32], ArrayShape("float32", (MAX_STEPS, MAX_STEPS))]
"""One number a step and probe, [T, P]."""
MeasuredScalars = Annotated[npt.NDArray[np.float32], ArrayShape("float32", (MAX_STEPS, MAX_STEPS), unknown=True)]
"""As ``Scalars``; nan where nothing finite was measured."""
MeasuredSteps = Annotated[npt.NDArray[np.float32], ArrayShape("float32", (MAX_STEPS,), unknown=True)]
"""One number a local step, [T]; nan where nothing finite was measured."""
Flags = Annotated[npt.NDArray[np.bool_], ArrayShape("bool", (MAX_STEPS, MAX_STEPS))]
Columns = Annotated[npt.NDArray[np.float32], ArrayShape("float32", (MAX_STEPS, MAX_STEPS, MAX_OWNERS))]
"""One number a step, probe and owner, [T, P, owners]."""
Products = Annotated[npt.NDArray[np.float64], ArrayShape("float64", (MAX_STEPS, MAX_STEPS, MAX_OWNERS), unknown=True)]
"""Inner products by step, probe and owner (or 1 for all of them); nan where not finite."""
