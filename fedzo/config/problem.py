"""How a broken rule of a configuration is reported."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Problem(NamedTuple):
    """One broken rule; ``key`` is the setting to change."""

    key: str
    text: str


def problem(key: str, rule: str, value: object, remedy: str) -> Problem:
    """The report that ``key`` must ``rule``, that it is ``value``, and what to do."""
    shown = repr(str(value)) if isinstance(value, StrEnum) else repr(value)
    return Problem(key, f"{key} must {rule}, got {shown}. {remedy}")
