"""The errors a user can meet, and how a broken rule of a configuration is reported.

Each message says where, what must hold, what was got, and what to do.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple


class FedzoError(Exception):
    """Base of every error that fedzo raises on purpose."""


class ConfigError(FedzoError, ValueError):
    """The user's settings or files cannot be used; raised before any work is done."""


class PluginError(FedzoError, TypeError):
    """A plugin does not keep to what its kind promises."""


class ProtocolError(FedzoError, RuntimeError):
    """A peer sent something that cannot be used, or two peers do not hold the same state."""


class OtherVersionError(ProtocolError):
    """A peer runs another fedzo. The text names both versions, and holds nothing else of this machine."""


class NumericsError(FedzoError, ArithmeticError):
    """A computation left the finite numbers and there is nothing sound to continue with."""


class RunFolderError(FedzoError, OSError):
    """The run folder cannot be read or written."""


def printable(text: str, *, most: int = 400) -> str:
    r"""A text that holds words of another machine, as a log, a terminal or a report may show it: one line, no escapes.

    Example:
        >>> printable("all is well\n\x1b[2Jround 7: done")
        'all is well  [2Jround 7: done'
    """
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(character if character.isprintable() else " " for character in cut)


def without_escapes(text: object) -> str:
    """The lines of a text that may hold words of others, such as a file's name, as a terminal may show them."""
    return "\n".join(printable(line, most=1 << 20) for line in str(text).rstrip("\n").split("\n"))


def quoted(words: str) -> str:
    """Words of another machine, marked as such."""
    return '"' + printable(words.replace('"', "'"), most=300) + '"'


def shell(command: str, *arguments: object) -> str:
    """A command that a message gives, as it can be pasted: a folder's name may hold spaces.

    Example:
        >>> shell("fedzo resume", "runs/my run")
        "fedzo resume 'runs/my run'"
    """
    return f"{command} {shlex.join(map(str, arguments))}"


def some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def some_reasons(reasons: Sequence[str]) -> str:
    """The first eight, and how many more there are."""
    more = [f"and {len(reasons) - 8} more"] if len(reasons) > 8 else []
    return "; ".join([*reasons[:8], *more])


def listed(lines: Sequence[str]) -> str:
    """One text for all problems of a configuration."""
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems in the configuration:", *(f"  - {line}" for line in lines)])


class FolderInUseError(RunFolderError):
    """Another process writes to the run folder."""


class Problem(NamedTuple):
    """One broken rule; ``key`` is the setting to change."""

    key: str
    text: str


def problem(key: str, rule: str, value: object, remedy: str) -> Problem:
    """The report that ``key`` must ``rule``, that it is ``value``, and what to do."""
    shown = repr(str(value)) if isinstance(value, StrEnum) else repr(value)
    return Problem(key, f"{key} must {rule}, got {printable(shown)}. {remedy}")


def refuse(found: Iterable[Problem]) -> None:
    """Refuse a configuration that has problems.

    Raises:
        ConfigError: There are some; all of them in one text.
    """
    if texts := [each.text for each in found]:
        raise ConfigError(listed(texts))


def at_least(key: str, value: int, least: int, remedy: str) -> Iterator[Problem]:
    """A problem where a count is below ``least``."""
    if value < least:
        yield problem(key, f"be >= {least}", value, remedy)


def positive(key: str, value: float, remedy: str) -> Iterator[Problem]:
    """A problem where a number is not above 0."""
    if not (math.isfinite(value) and value > 0):
        yield problem(key, "be > 0 and finite", value, remedy)


def positive_float32(key: str, value: float, remedy: str) -> Iterator[Problem]:
    """A problem where a number is not above 0 in float32, as which it travels."""
    if not 2.0**-126 <= value < 2.0**128:
        yield problem(key, "be > 0 and finite in float32", value, remedy)


def not_negative(key: str, value: float, remedy: str) -> Iterator[Problem]:
    """A problem where a number is below 0."""
    if not (math.isfinite(value) and value >= 0):
        yield problem(key, "be >= 0 and finite", value, remedy)


def unsigned_64(key: str, value: int) -> Iterator[Problem]:
    """A problem where a seed does not fit 64 bits."""
    if not 0 <= value < 2**64:
        yield problem(key, "be an unsigned 64-bit integer (0 to 2**64 - 1)", value, "Choose a smaller seed.")


def share_below_1(key: str, value: float, remedy: str) -> Iterator[Problem]:
    """A problem where a share is not in [0, 1)."""
    if not 0 <= value < 1:
        yield problem(key, "be >= 0 and < 1", value, remedy)
