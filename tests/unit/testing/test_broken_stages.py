"""The check of stages refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from fedzo.data.files import Row
from fedzo.testing import check_stage

ROWS: list[Row] = [{"text": f"Review {i}", "label": i} for i in range(6)]


class Upper:
    """The text in capitals."""

    column: str | None = "text"

    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return [{**row, "text": self.text(row["text"], client)} for row in rows]

    def text(self, text: str, client: int) -> str:
        return text.upper()


class InPlace(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        for row in rows:
            row["text"] = row["text"].upper()
        return rows


class DropsARow(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return super().apply(rows, client=client)[1:]


class Sorts(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return sorted(super().apply(rows, client=client), key=lambda row: -row["label"])


class Relabels(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return [{**row, "label": 0} for row in super().apply(rows, client=client)]


class AddsAColumn(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return [{**row, "original": row["text"]} for row in super().apply(rows, client=client)]


class LosesTheText(Upper):
    def text(self, text: str, client: int) -> Any:
        return None


class CountsItsCalls(Upper):
    def __init__(self) -> None:
        self.calls = 0

    def text(self, text: str, client: int) -> str:
        self.calls += 1
        return f"{text} {self.calls}"


class KnowsClientsByTurn(Upper):
    """A client is what it was first asked as."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def text(self, text: str, client: int) -> str:
        return f"{text} of site {self.seen.setdefault(client, len(self.seen))}"


class Shuffles(Upper):
    def text(self, text: str, client: int) -> str:
        return "".join(random.sample(text, len(text)))


class NeedsRows(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return super().apply(rows, client=client) if rows else [{"text": "", "label": 0}]


class OtherColumn(Upper):
    column = "prompt"


def test_without_a_fault_it_passes() -> None:
    check_stage(Upper, ROWS)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (InPlace, r"apply must not change the rows that it is given"),
        (DropsARow, r"apply must give as many rows as it gets, 6, got 5"),
        (Sorts, r"apply must keep the order and change nothing but 'text'; row 0 differs in \['label'\]"),
        (Relabels, r"apply must keep the order and change nothing but 'text'; row 1 differs in \['label'\]"),
        (AddsAColumn, r"change nothing but 'text'; row 0 differs in \['original'\]"),
        (LosesTheText, r"apply must keep the type of 'text', str; row 0 got NoneType"),
        (
            CountsItsCalls,
            r"the result for the same rows of the same client must not depend on what the stage did before",
        ),
        (KnowsClientsByTurn, r"the result for the same rows of the same client of a new stage must be the same"),
        (Shuffles, r"must not depend on what the stage did before|global generators must be left alone"),
        (NeedsRows, r"no rows must give no rows"),
        (OtherColumn, r"change nothing but 'prompt'; row 0 differs in \['text'\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_stages(make: Callable[[], Upper], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_stage(make, ROWS)
