"""The fields of a message as Flower's records, and back.

Every message is one ``ConfigRecord`` of plain numbers, strings and bytes. Long bytes follow in records of their own,
since Flower sends a record as a whole.

Nobody can work out the bytes of a record before it is sent. Flower keeps the parts of messages by their SHA-256, for
all senders of a run, and of a part that is new it believes whoever names it first which parts belong to it. Who names
it later with others is refused: a site that knew what others are about to send could shut them out. So each record has
a salt, which says nothing and is another one each time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedzo.errors import ProtocolError
from fedzo.trainers.artifacts import PIECE_BYTES

RECORD, PIECE, PIECE_NAME = "fedzo", "piece", "{} {:08}"
SALT, SALT_BYTES = "salt", 8


def in_pieces(value: bytes) -> list[ConfigRecord]:
    """Long bytes in records of their own, which messages may share."""
    return [_salted({PIECE: value[at : at + PIECE_BYTES]}) for at in range(0, len(value), PIECE_BYTES)]


def packed(fields: Mapping[str, Any], *, cut: Callable[[bytes], list[ConfigRecord]]) -> RecordDict:
    """Fields as Flower content, long bytes as ``cut`` gives them. Flower cannot count what is empty."""
    plain, pieces = dict[str, Any](), dict[str, ConfigRecord]()
    for name, value in fields.items():
        if isinstance(value, bytes) and len(value) > PIECE_BYTES:
            pieces |= {PIECE_NAME.format(name, number): piece for number, piece in enumerate(cut(value))}
        else:
            plain[name] = value
    return RecordDict({RECORD: _salted(plain), **pieces})


def salt_anew(content: RecordDict) -> None:
    """Before anything of it is sent again: who got it knows its bytes, and may have said something of their hashes."""
    for record in content.config_records.values():
        record[SALT] = secrets.token_bytes(SALT_BYTES)


def split(content: RecordDict, *, what: str) -> tuple[dict[str, Any], dict[str, ConfigRecord]]:
    """What the record of plain fields says, salt and all, and the records of pieces by name.

    Raises:
        ProtocolError: ``content`` is anything else; the text names ``what`` it should be.
    """
    pieces = {name: record for name, record in content.items() if isinstance(record, ConfigRecord)}
    if RECORD not in pieces or len(pieces) < len(content):
        told = f"expected one record {RECORD!r} and pieces of its fields, got {sorted(content)[:8]!r:.400}"
        raise ProtocolError(f"{what}: {told}")
    return dict(pieces.pop(RECORD)), pieces


def joined(plain: Mapping[str, Any], pieces: Mapping[str, ConfigRecord], *, what: str) -> dict[str, Any]:
    """All fields of what ``split`` gives, without any salt."""
    fields, long = _unsalted(plain, what=what), dict[str, list[bytes]]()
    for name in sorted(pieces):
        field, record = name.partition(" ")[0], _unsalted(pieces[name], what=what)
        found, piece = long.setdefault(field, []), record.pop(PIECE, None) or None
        if field in fields or name != PIECE_NAME.format(field, len(found)) or not isinstance(piece, bytes) or record:
            raise ProtocolError(f"{what}: record {name!r:.40} must be a field's next piece, but is not")
        found.append(piece)
    return fields | {field: b"".join(found) for field, found in long.items()}


def _salted(plain: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({**plain, SALT: secrets.token_bytes(SALT_BYTES)})


def _unsalted(record: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    plain = dict(record)
    salt = plain.pop(SALT, None)
    if not isinstance(salt, bytes) or len(salt) != SALT_BYTES:
        raise ProtocolError(f"{what}: each record must have a {SALT} of {SALT_BYTES} bytes, got {salt!r:.40}")
    return plain
