"""The texts of a run folder beside its logs: written whole, read with care."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from fedzo.errors import RunFolderError
from fedzo.records.folder import ENVIRONMENT, OVERRIDES, raised_as, read_file, replace_file
from fedzo.records.lines import RESTORE

_MAX_OPEN = 100  # brackets; those of a configuration are a few


def write_whole(file: Path, text: str) -> None:
    """Write a file of a run folder to the disk: all of it, or what was there stays. One that says so is left alone.

    Raises:
        RunFolderError: It cannot be written, or is a link.
    """
    with raised_as(RunFolderError, f"run folder {file.parent}: {file.name} must be writable", "Choose another folder."):
        if not (file.exists() and read_file(file.parent, file.name) == text.encode()):
            replace_file(file, text, durable=True)


def read_text(run_dir: Path, name: str, remedy: str) -> str:
    """The text of a file that every run folder has; ``remedy``: what to do where it is missing.

    Raises:
        RunFolderError: It is missing, a link, or cannot be read.
    """
    rule = f"{run_dir / name}: it must be a readable text"
    with raised_as(RunFolderError, rule, RESTORE):
        try:
            return read_file(run_dir, name).decode()
        except FileNotFoundError as error:
            raise RunFolderError(f"{run_dir}: not a run folder (no {name}). {remedy}") from error
        except UnicodeDecodeError as error:
            raise RunFolderError(f"{rule}, got 'other bytes'. {RESTORE}") from error


def read_environment(run_dir: Path) -> dict[str, Any]:
    """What ``environment.json`` tells; nothing where the file is not there.

    Raises:
        RunFolderError: The file holds something else.
    """
    return read_mapping(run_dir / ENVIRONMENT, of_environment)[1]


def read_overrides(run_dir: Path) -> list[str]:
    """The overrides of the command line that began a run; none where the file is not there.

    Raises:
        RunFolderError: The file holds something else.
    """
    path = run_dir / OVERRIDES
    if not path.exists():
        return []
    items: list[str] = _read_value(path, lambda text: of_yaml(text) or [], list)[1]
    if not all(isinstance(item, str) for item in items):
        raise RunFolderError(f"{path}: must hold a list of texts such as fl.rounds=3. Restore the file from a copy.")
    return items


def read_mapping(path: Path, parse: Callable[[str], Any]) -> tuple[str, dict[str, Any], list[str]]:
    """A file's text, its values, and a note where it is not there; ``parse`` makes values of a text.

    Raises:
        RunFolderError: The file holds something else, or cannot be read.
    """
    if not path.is_file():
        return "", {}, [f"{path.name} is missing from the run folder."]
    return *_read_value(path, parse, dict), []


def of_yaml(text: str) -> Any:
    """The values of a YAML text, whose reader takes time by the square of how many brackets are open at once.

    A few aliases, each of two of the one before, make values that fill the memory; fedzo writes none.
    """
    steps = (1 if sign in "[{" else -1 for sign in text if sign in "[]{}")
    if max(accumulate(steps), default=0) > _MAX_OPEN:
        raise ValueError("too many brackets inside one another")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("an alias (*name)")
    return yaml.safe_load(text)


def of_environment(text: str) -> Any:
    """The values of a text of JSON; parts of it by which a run is compared are what fedzo writes there."""
    told = json.loads(text)
    if isinstance(told, dict):
        if not isinstance(told.get("packages", {}), dict):
            raise ValueError("packages that are no mapping")
        later = told.get("later", [])
        if not (isinstance(later, list) and all(isinstance(each, dict) for each in later)):
            raise ValueError("a value of later that is no list of mappings")
    return told


def _read_value(path: Path, parse: Callable[[str], Any], kind: type) -> tuple[str, Any]:
    try:
        text = read_file(path.parent, path.name).decode()
        value = parse(text)
        if not isinstance(value, kind):
            raise ValueError(f"a {type(value).__name__}")
    except RunFolderError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = "a mapping" if kind is dict else f"a {kind.__name__}"
        without = "go on" if path.name == ENVIRONMENT else "report"
        raise RunFolderError(
            f"{path}: must hold {what}, got {str(error)[:160]}. Restore the file, or delete it to {without} without it."
        ) from error
    return text, value
