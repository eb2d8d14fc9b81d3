"""What a stage may change of a row."""

from __future__ import annotations

from typing import Any

import pytest

from fedzo.data.preprocess import OnProgress, preprocess
from fedzo.data.preprocess.stage import Identity
from fedzo.errors import ConfigError, PluginError

ROWS: list[dict[str, Any]] = [{"text": "a", "label": 1, "score": float("nan"), "more": [float("nan"), {"x": 1}]}]


class Changes:
    """Gives each row other columns."""

    column: str | None = "text"

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: OnProgress) -> list[dict[str, Any]]:
        return [{**row, **self.columns} for row in rows]

    def summary(self, client: int) -> dict[str, float]:
        return {}


def test_a_number_that_is_none_is_left_alone_where_it_is_left_alone() -> None:
    """NaN differs from itself, and pandas writes it for what is missing."""
    assert preprocess(ROWS, {"identity": Identity(), "changes": Changes(text="b")}, client=0) == [
        {**ROWS[0], "text": "b"}
    ]


@pytest.mark.parametrize(("key", "value"), [("label", 2), ("score", 0.0), ("new", 1), ("more", [])])
def test_another_column_is_not_its_own(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"all columns but 'text', got another {key} in row 0"):
        preprocess(ROWS, {"changes": Changes(**{key: value})}, client=0)


def test_a_stage_that_gives_no_rows_is_named() -> None:
    class Forgets(Changes):
        def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: OnProgress) -> Any:
            return None

    with pytest.raises(PluginError, match=r"Forgets\.apply must give a builtins\.list, got None \(NoneType\)"):
        preprocess(ROWS, {"forgets": Forgets()}, client=0)
