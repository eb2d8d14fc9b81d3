"""What is wrong with a value, where, and how it is shown to a person."""

from __future__ import annotations

from reprlib import Repr

NOTHING = object()
"""Stands for a value that is not there."""
MOST_SHOWN = 80
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
    """A value in at most ``MOST_SHOWN`` characters, also where all of it would fill the memory."""
    return "nothing" if value is NOTHING else _SHORT.repr(value)[:MOST_SHOWN]


class _Short(Repr):
    """``reprlib`` makes the whole text of bytes and of long whole numbers before it cuts them."""

    def repr_str(self, value: str, level: int) -> str:
        return repr(value[:MOST_SHOWN])

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[:MOST_SHOWN])

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 256 else f"a whole number of {value.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxother = 3, 8, 8, MOST_SHOWN
