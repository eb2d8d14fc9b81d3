"""Arguments that several commands take, and what is made of them."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedzo.errors import ConfigError

if TYPE_CHECKING:
    from fedzo.config.schema import LaunchConfig

Handler = Callable[[Namespace], int | None]
"""Carries out a command; returns its exit code where that may be another than 0."""


class AddCommand(Protocol):
    """Adds a command to ``fedzo``."""

    def __call__(self, name: str, handler: Handler, summary: str, *, usage: str | None = None) -> ArgumentParser:
        """Return its parser, for what it takes."""


def add_run(parser: ArgumentParser) -> None:
    """RUN, the folder of a run."""
    parser.add_argument("run", metavar="RUN", help="run folder")


def run_folder(name: str) -> Path:
    """What RUN names, which must be there."""
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"RUN must be a folder that `fedzo train` made, found none at {name!r}. Check the path.")
    return folder


def add_rounds(parser: ArgumentParser, text: str) -> None:
    """``--rounds``, with ``text`` for its help."""
    parser.add_argument("--rounds", type=whole_number(0), help=text)


def add_overrides(parser: ArgumentParser) -> None:
    """Overrides of a run's settings, and ``--config-dir``."""
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own YAML files")
    parser.set_defaults(takes_overrides=True)


def load_config(arguments: Namespace, *, trains: bool = True) -> LaunchConfig:
    """The settings of a command that takes overrides.

    Args:
        arguments: Of the command.
        trains: Whether it trains; rules on what can be trained do not hold for a command that only uses a model.

    Raises:
        ConfigError: A setting is wrong.
    """
    from fedzo.config.load import load
    from fedzo.config.overrides import with_config_dir

    return load(with_config_dir(arguments.overrides, arguments.config_dir), trains=trains)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make what reads a number of a command line: plain decimal digits, no sign, space or underscore.

    Args:
        low: The least number, not below 0.
        high: The largest one; None for no bound.
    """
    rule = f">= {low}" if high is None else f"of {low} to {high}"

    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"[0-9]{1,20}", text) else -1  # Python refuses thousands of digits
        if number < low or (high is not None and number > high):
            raise ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return number

    return read


def total_rounds(text: str) -> int:
    """``fl.rounds=N``, the one setting of a run that can change."""
    key, _, number = text.partition("=")
    if key != "fl.rounds":
        raise ArgumentTypeError(
            f"a run keeps its settings: only fl.rounds=N can be given, to make it longer, got {text!r}"
        )
    return whole_number(1)(number)
