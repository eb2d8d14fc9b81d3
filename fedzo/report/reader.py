"""Typed access to a record of ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedzo.errors import RunFolderError


@dataclass(frozen=True, slots=True)
class Reader:
    """Typed access to one record; every complaint names the place."""

    record: dict[str, Any]
    where: str

    def fail(self, key: str, must: str) -> RunFolderError:
        got = repr(self.record[key])[:80] if key in self.record else "nothing"
        return RunFolderError(
            f"{self.where}: {key} must be {must}, got {got}. The file was not written by this version of fedzo "
            "or was edited; restore it from the run or run again."
        )

    def optional(self, key: str) -> float | None:
        value = self.record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.fail(key, "a number or null")
        return value

    def number(self, key: str) -> float:
        value = self.optional(key)
        if value is None:
            raise self.fail(key, "a number")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.optional(key) if default is None else self.record.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, "a whole number")
        return value

    def optional_whole(self, key: str) -> int | None:
        return None if self.record.get(key) is None else self.whole(key)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.record.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "a text")
        return value

    def each(self, key: str) -> list[Reader]:
        rows = self.record.get(key) or []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.fail(key, "a list of objects")
        return [Reader(row, f"{self.where}, {key}[{index}]") for index, row in enumerate(rows)]

    def inner(self, key: str) -> Reader | None:
        value = self.record.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "an object or null")
        return None if value is None else Reader(value, f"{self.where}, {key}")

    def truth(self, key: str, default: bool | None = None) -> bool:
        value = self.record.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def series(self, key: str) -> tuple[float | None, ...]:
        found = self.record.get(key)
        if not isinstance(found, list) or any(
            value is not None and (isinstance(value, bool) or not isinstance(value, int | float)) for value in found
        ):
            raise self.fail(key, "a list of numbers and nulls")
        return tuple(found)

    def span(self, key: str) -> tuple[int, int]:
        found = self.record.get(key)
        if not isinstance(found, list) or len(found) != 2 or any(type(end) is not int for end in found):
            raise self.fail(key, "[first, end] in whole numbers")
        return found[0], found[1]

    def clients(self, key: str) -> tuple[int, ...]:
        found = self.record.get(key) or []
        if not isinstance(found, list) or any(not isinstance(client, int) for client in found):
            raise self.fail(key, "a list of clients")
        return tuple(found)

    def reasons(self, key: str) -> dict[int, str]:
        found = self.record.get(key) or {}
        if not isinstance(found, dict) or not all(
            client.isdecimal() and isinstance(reason, str) for client, reason in found.items()
        ):
            raise self.fail(key, "an object of client and reason")
        return {int(client): reason for client, reason in found.items()}

    def tallies(self, key: str) -> dict[str, tuple[int, int]]:
        value = self.record.get(key) or {}
        if not isinstance(value, dict) or not all(
            isinstance(row, list) and len(row) == 2 and all(isinstance(n, int) for n in row) for row in value.values()
        ):
            raise self.fail(key, "an object of [correct, total]")
        return {str(label): (row[0], row[1]) for label, row in value.items()}
