"""Command-line overrides before Hydra sees them: ``model=<name or folder>`` and ``--config-dir``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, ValueType
from hydra.errors import HydraException

from fedzo.config.plugins import conf_dir
from fedzo.errors import ConfigError


def rewrite_model(overrides: Sequence[str], options: Sequence[str]) -> list[str]:
    """Turn ``model=<hub name or local folder>`` into ``model=hf model.name=...``; sweeps ``model=a,b`` too.

    Args:
        overrides: Hydra overrides as typed.
        options: The known options of the group ``model``, which stay as they are.

    Raises:
        ConfigError: a sweep mixes options and names.
    """
    rewritten = []
    for text in overrides:
        key, equals, value = text.partition("=")
        names = _choices(text, value) if key == "model" and equals else []
        unknown = [name for name in names if name not in options]
        if not unknown:
            rewritten.append(text)
        elif len(unknown) < len(names):
            raise ConfigError(
                f"{text}: a sweep over models must hold either options of the group ({', '.join(options)}) or names, "
                f"got both. Write model=hf model.name=<name>,<name>."
            )
        else:
            rewritten += ["model=hf", "model.name=" + ",".join(quoted(name) for name in names)]
    return rewritten


def _choices(text: str, value: str) -> list[str]:
    """The values of a choice; a value outside Hydra's grammar (a space, ``~``) is one name as it stands."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [value]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP or override.value() is None:  # over the options; no choice
        return []
    if override.is_choice_sweep():
        return [_text(each) for each in override.sweep_iterator()]
    chosen = override.value()
    return [value if isinstance(chosen, bool | int | float) else _text(chosen)]  # of 1e5 Hydra makes another text


def _text(value: object) -> str:
    return value.text if isinstance(value, QuotedString) else str(value)


def quoted(name: str) -> str:
    """A text as one value of Hydra's grammar."""
    return QuotedString(name, Quote.single).with_quotes()


def in_shell(key: str, value: str) -> str:
    """An override whose value is one text, as a shell must be given it: with the quotes that it and Hydra need."""
    plain = f"{key}={value}"
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII) and OverridesParser.create().parse_override(plain).value() == value:
        return plain  # of 2024_12_01 Hydra would make a number
    inner = f'{key}="{value}"' if "'" in value and not {'"', "\\"} & {*value} else f"{key}={quoted(value)}"
    return shlex.quote(inner) if "!" in inner else '"' + re.sub(r'(["\\$`])', r"\\\1", inner) + '"'


def with_config_dir(overrides: Sequence[str], folder: str | None) -> list[str]:
    """Add a folder of the user's own YAML files to Hydra's search path, behind fedzo's own.

    Raises:
        ConfigError: The folder does not exist, or a file in it would be hidden by one of fedzo's, ``config.yaml`` too.
    """
    if folder is None:
        return list(overrides)
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"--config-dir must name a folder of YAML files, got {folder!r}. Check the path.")
    for own in sorted(conf_dir().rglob("*.yaml")):
        relative = own.relative_to(conf_dir())
        theirs = path / relative
        if theirs.is_file() and theirs.read_bytes() != own.read_bytes():
            raise ConfigError(f"{theirs}: {_hidden(relative)}")
    return [*overrides, f"hydra.searchpath=[{quoted(f'file://{path}')}]"]


def _hidden(file: Path) -> str:
    """Why a user's file would not be read, and what to do."""
    group, name = file.parent.as_posix(), file.stem
    if group == ".":
        return (
            f"a folder of --config-dir must not hold {file.name}, since every run begins with fedzo's own. Make yours "
            "an experiment: call it experiment/mine.yaml, begin it with the line `# @package _global_`, and write "
            "experiment=mine."
        )
    return (
        f"a file of --config-dir must have a name of its own, but {group}={name} would take fedzo's {file.as_posix()}. "
        f"Rename yours, and write {group}=my_{name}."
    )
