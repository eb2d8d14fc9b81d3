"""The check of stages refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest

from fedzo.data.files import Row
from fedzo.data.preprocess import OnProgress
from fedzo.testing import check_stage

ROWS: list[Row] = [{"text": f"Review {i}", "label": i} for i in range(6)]


class Upper:
    """The text in capitals."""

    column: str | None = "text"

    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        made: list[Row] = []
        for row in rows:
            on_progress(len(made), len(rows))
            made.append({**row, "text": self.text(row["text"], client)})
        return made

    def summary(self, client: int) -> Mapping[str, Any]:
        return {"in capitals": 3, "share": 0.5}

    def text(self, text: str, client: int) -> str:
        return text.upper()


class InPlace(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        for row in rows:
            row["text"] = row["text"].upper()
        return rows


class DropsARow(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        return super().apply(rows, client=client, on_progress=on_progress)[1:]


class Yields(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> Any:
        return iter(super().apply(rows, client=client, on_progress=on_progress))


class Sorts(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        return sorted(super().apply(rows, client=client, on_progress=on_progress), key=lambda row: -row["label"])


class Relabels(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        return [{**row, "label": 0} for row in super().apply(rows, client=client, on_progress=on_progress)]


class AddsAColumn(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        return [{**row, "original": row["text"]} for row in super().apply(rows, client=client, on_progress=on_progress)]


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
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        return super().apply(rows, client=client, on_progress=on_progress) if rows else [{"text": "", "label": 0}]


class OtherColumn(Upper):
    column = "prompt"


class CountsCharacters(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        on_progress(3, sum(len(row["text"]) for row in rows))
        return super().apply(rows, client=client, on_progress=on_progress)


class CountsOn(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        on_progress(len(rows) + 1, len(rows))
        return super().apply(rows, client=client, on_progress=on_progress)


class GoesOn(Upper):
    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        with suppress(Exception):
            on_progress(0, len(rows))
        return super().apply(rows, client=client, on_progress=lambda done, total: None)


class TellsARow(Upper):
    def summary(self, client: int) -> Mapping[str, Any]:
        return {"Review 3": 1}


class TellsText(Upper):
    def summary(self, client: int) -> Mapping[str, Any]:
        return {"first": "Review 3"}


class TellsNothingFinite(Upper):
    def summary(self, client: int) -> Mapping[str, Any]:
        return {"share": float("nan")}


def test_without_a_fault_it_passes() -> None:
    check_stage(Upper, ROWS)
    check_stage(Upper, [{**row, "score": float("nan")} for row in ROWS])  # which it leaves as it is


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (InPlace, r"apply must not change the rows that it is given"),
        (DropsARow, r"a stage must give as many rows as it got \(6\), got 5"),
        (Yields, r"Yields\.apply must give a builtins\.list, got"),
        (Sorts, r"must keep the order of the rows and all columns but 'text', got another label in row 0"),
        (Relabels, r"must keep the order of the rows and all columns but 'text', got another label in row 1"),
        (AddsAColumn, r"all columns but 'text', got another original in row 0"),
        (LosesTheText, r"apply must keep the type of 'text', str; row 0 got NoneType"),
        (
            CountsItsCalls,
            r"the result for the same rows of the same client must not depend on what the stage did before",
        ),
        (KnowsClientsByTurn, r"the result for the same rows of the same client of a new stage must be the same"),
        (Shuffles, r"must not depend on what the stage did before|global generators must be left alone"),
        (NeedsRows, r"no rows must give no rows"),
        (OtherColumn, r"all columns but 'prompt', got another text in row 0"),
        (CountsCharacters, r"on_progress must be called with all rows, 6, got 48"),
        (CountsOn, r"on_progress must be called with rows done of 6, got 7"),
        (GoesOn, r"apply must let pass what on_progress raises"),
        (TellsARow, r"a summary must hold finite numbers by names of at most 60 of .*, got 'Review 3': 1"),
        (TellsText, r"a summary must hold finite numbers .*, got 'first': 'Review 3'"),
        (TellsNothingFinite, r"a summary must hold finite numbers .*, got 'share': nan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_stages(make: Callable[[], Upper], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_stage(make, ROWS)
