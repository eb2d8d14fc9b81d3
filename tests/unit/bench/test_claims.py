"""Claims say whether they hold; timing is in turn and leaves the warm-up out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedzo.bench.claims import Claims, measured_in
from fedzo.bench.measure import interleaved


@pytest.mark.parametrize(
    ("bounds", "target", "holds"),
    [
        ({}, None, True),
        ({"at_most": 2.0}, 2.0, True),
        ({"at_most": 1.9}, 1.9, False),
        ({"at_least": 2.0}, 2.0, True),
        ({"at_least": 2.1}, 2.1, False),
        ({"near": (1.9, 0.11)}, 1.9, True),
        ({"near": (1.9, 0.09)}, 1.9, False),
    ],
)
def test_a_claim_holds_within_its_bound(
    bounds: dict[str, Any], target: float | None, holds: bool, tmp_path: Path
) -> None:
    claims = Claims(command="python it.py", seeds=[3], environment={"fedzo": "1"})

    claims.add("a ratio", 2.00001 if "at_least" in bounds else 1.99999, "ratio", **bounds)
    claims.write(tmp_path / "claims.json")

    (row,) = json.loads((tmp_path / "claims.json").read_text())
    assert row == {
        "claim": "a ratio",
        "value": 2.0,
        "unit": "ratio",
        "target": target,
        "holds": holds,
        "command": "python it.py",
        "seeds": [3],
        "environment": {"fedzo": "1"},
    }


@pytest.mark.parametrize(
    ("value", "bounds", "told"),
    [
        (1.10014, {"at_most": 1.1}, 1.1001),
        (1.1000000001, {"at_most": 1.1}, 1.1000000001),
        (0.89996, {"at_least": 0.9}, 0.89996),
        (1.09996, {"at_most": 1.1}, 1.1),  # which holds, too
        (123456.0, {}, 123500.0),
    ],
)
def test_a_value_is_told_to_digits_that_leave_its_verdict(value: float, bounds: dict[str, float], told: float) -> None:
    claims = Claims(command="python it.py", environment={})

    claims.add("a ratio", value, "ratio", **bounds)

    (row,) = claims.rows
    assert row["value"] == told
    assert row["holds"] == (told <= bounds.get("at_most", told) and told >= bounds.get("at_least", told))


def test_kept_results_tell_what_they_were_measured_with() -> None:
    first = {"environment": {"git_commit": "a", "packages": {"torch": "2"}, "command": ["one"]}}
    later = {"environment": {"git_commit": "b", "packages": {"torch": "2"}, "command": ["two"]}}

    assert measured_in([first]) == {"git_commit": "a", "packages": {"torch": "2"}}
    assert measured_in([first, later, first]) == {"git_commit": ["a", "b"], "packages": {"torch": "2"}}
    assert measured_in([first, {}]) == {"git_commit": "a", "packages": {"torch": "2"}, "without_environment": 1}


def test_a_script_replaces_its_own_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    for command, name in (
        ("python a.py --seeds 0", "old"),
        ("python b.py", "other"),
        ("python a.py --seeds 0 1", "new"),
    ):
        claims = Claims(command=command, environment={})
        claims.add(name, 1.0, "s")
        claims.write(path)

    assert [row["claim"] for row in json.loads(path.read_text())] == ["other", "new"]


def test_a_value_that_is_not_a_number_holds_no_target() -> None:
    claims = Claims(command="", environment={})

    claims.add("a ratio", float("nan"), "ratio", at_most=1.0)

    assert not claims.rows[0]["holds"]


def test_a_claim_is_made_once() -> None:
    claims = Claims(command="", environment={})
    claims.add("a ratio", 1.0, "ratio")

    with pytest.raises(ValueError, match="each claim must be made once, got 'a ratio' twice"):
        claims.add("a ratio", 2.0, "ratio")


def test_pieces_are_timed_in_turn_after_two_rounds() -> None:
    calls: list[str] = []
    heard: list[tuple[int, int]] = []

    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=3,
        on_repeat=lambda done, total: heard.append((done, total)),
    )

    assert "".join(calls) == "ab" * 5
    assert {name: len(spent) for name, spent in seconds.items()} == {"a": 3, "b": 3}
    assert heard[-1] == (3, 3)


def test_a_mean_over_seeds_tells_its_half_width_where_there_are_several() -> None:
    claims = Claims(command="python it.py", environment={})

    claims.add_mean("of three", [1.0, 2.0, 3.0], "points")
    claims.add_mean("without a unit", [1.0, 2.0, 3.0], "")
    claims.add_mean("of one", [1.0], "points")

    assert [(row["value"], row["unit"]) for row in claims.rows] == [
        (2.0, "points +- 2.5"),
        (2.0, "+- 2.5"),
        (1.0, "points"),
    ]
