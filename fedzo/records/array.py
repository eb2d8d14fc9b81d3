"""Nested lists of numbers as arrays. Their entries are looked at all at once: a line holds tens of thousands."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.records.fields import Grid
from fedzo.records.mismatch import MismatchError


@dataclass(frozen=True, slots=True)
class ArrayCodec:
    """Reads and writes the arrays of one ``Grid``."""

    grid: Grid

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
