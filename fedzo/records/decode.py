"""From JSON to a record and back. What is read is trusted in nothing: a bad value is an error that names its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, overload

from fedzo.errors import FedzoError
from fedzo.records.codec import codec_of
from fedzo.records.folder import raised_as, read_file
from fedzo.records.values import MismatchError

T = TypeVar("T")


def decode(kind: type[T], value: object, *, where: str, error: type[FedzoError], remedy: str = "") -> T:
    """A record of plain values; nothing but what its fields declare passes.

    Args:
        kind: The record's dataclass, or another hint that a field may have.
        value: Plain values, of JSON or of a ``ConfigRecord`` as a dict.
        where: Where they come from; begins the message.
        error: Raised for everything else.
        remedy: What to do; ends the message.
    """
    try:
        record: T = codec_of(kind).read(value)
    except MismatchError as mismatch:
        raise error(f"{where}: {mismatch}. {remedy}".rstrip()) from None
    return record


@overload
def decode_json(kind: type[T], text: str | bytes, *, where: str, error: type[FedzoError], remedy: str = "") -> T: ...
@overload
def decode_json(kind: Any, text: str | bytes, *, where: str, error: type[FedzoError], remedy: str = "") -> Any: ...
def decode_json(kind: Any, text: str | bytes, *, where: str, error: type[FedzoError], remedy: str = "") -> Any:
    """``decode`` of what a text of JSON holds."""
    value = parse_json(text, where=where, error=error, remedy=remedy)
    return decode(kind, value, where=where, error=error, remedy=remedy)


def read_record(kind: type[T], folder: Path, name: str, *, error: type[FedzoError], remedy: str = "") -> T | None:
    """The record in a file of a run folder; None where there is no such file.

    Args:
        kind: The record's dataclass.
        folder: The run folder.
        name: Of the file in it.
        error: Raised for a file that cannot be read or holds something else.
        remedy: What to do then; ends the message.

    Raises:
        RunFolderError: The file, or a folder on the way to it, is a link, or it is no regular file.
    """
    where = str(folder / name)
    with raised_as(error, f"{where}: it must be readable", remedy):
        try:
            text = read_file(folder, name)
        except FileNotFoundError:
            return None
    return decode_json(kind, text, where=where, error=error, remedy=remedy)


def encode(record: object) -> Any:
    """The inverse: plain values for JSON. A number that is not finite becomes null where its field knows null.

    Raises:
        ValueError: The record breaks a range of its own.
    """
    try:
        return codec_of(type(record)).write(record)
    except MismatchError as mismatch:
        raise ValueError(f"{type(record).__name__}: {mismatch}") from mismatch


def to_json(record: object, *, indent: int | None = None) -> str:
    """A record as JSON: one compact line, or with ``indent`` a text for people."""
    return json.dumps(encode(record), allow_nan=False, indent=indent, separators=(",", ":") if indent is None else None)


def canonical(value: object) -> bytes:
    """JSON as it is hashed: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_json(text: str | bytes, *, where: str, error: type[FedzoError], remedy: str = "") -> Any:
    """Plain values of JSON, and of nothing else: nan and infinity are none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:  # also text that is not UTF-8, and digits without end
        raise error(f"{where}: must be JSON, got {str(problem)[:120]}. {remedy}".rstrip()) from problem


def _refuse(name: str) -> None:
    raise ValueError(f"{name}, which is not JSON (unknown numbers are null)")
