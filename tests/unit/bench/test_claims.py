"""Claims say whether they hold; timing is in turn and leaves the warm-up out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedzo.bench.claims import (
    Claims,
    check_alike,
    kept_results,
    measured_in,
    metric_lines,
    number,
    ran_with,
    wanted,
    with_range,
)
from fedzo.bench.measure import interleaved


@pytest.mark.parametrize(
    ("bounds", "target", "within", "holds", "told"),
    [
        ({}, None, None, True, ""),
        ({"at_most": 2.0}, 2.0, "<=", True, "<= 2"),
        ({"at_most": 1.9}, 1.9, "<=", False, "<= 1.9"),
        ({"at_least": 2.0}, 2.0, ">=", True, ">= 2"),
        ({"at_least": 2.1}, 2.1, ">=", False, ">= 2.1"),
        ({"near": (1.9, 0.11)}, 1.9, 0.11, True, "1.9 +- 0.11"),
        ({"near": (1.9, 0.09)}, 1.9, 0.09, False, "1.9 +- 0.09"),
    ],
)
def test_a_claim_holds_within_its_bound(
    bounds: dict[str, Any], target: float | None, within: str | float | None, holds: bool, told: str, tmp_path: Path
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
        "within": within,
        "holds": holds,
        "command": "python it.py",
        "seeds": [3],
        "environment": {"fedzo": "1"},
    }
    assert wanted(row) == told


def test_a_row_without_a_value_tells_its_target_and_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims(command="python it.py", environment={"fedzo": "1"})

    claims.add("a ratio", None, "ratio", at_most=1.05)
    claims.show()

    (row,) = claims.rows
    assert (row["value"], row["holds"], row["target"], row["within"]) == (None, None, 1.05, "<=")
    assert row["environment"] == {}, "of a process that has measured nothing"
    assert capsys.readouterr().out == "a ratio: not measured (<= 1.05)\n"
    with pytest.raises(ValueError, match="each claim must be made once"):
        claims.add("a ratio", 1.0, "ratio")


def test_a_claim_has_one_target() -> None:
    with pytest.raises(ValueError, match="'a ratio' must have one target, got 2"):
        Claims(command="", environment={}).add("a ratio", 1.0, "ratio", at_least=0.5, at_most=2.0)


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
    assert float(number(told)) == told
    assert row["holds"] == (told <= bounds.get("at_most", told) and told >= bounds.get("at_least", told))


def test_kept_results_tell_what_they_were_measured_with() -> None:
    first = {"environment": {"git_commit": "a", "packages": {"torch": "2"}, "command": ["one"]}}
    later = {"environment": {"git_commit": "b", "packages": {"torch": "2"}, "command": ["two"]}}

    assert measured_in([first]) == {"git_commit": "a", "packages": {"torch": "2"}}
    assert measured_in([first, later, first]) == {"git_commit": ["a", "b"], "packages": {"torch": "2"}}
    assert measured_in([first, {}]) == {"git_commit": "a", "packages": {"torch": "2"}, "without_environment": 1}


def test_results_of_one_claim_have_the_same_settings() -> None:
    """Each group by itself, and no result that does not tell: those are older than the field."""

    def result(settings: Any) -> dict[str, Any]:
        return {"environment": {"git_commit": f"of {settings}", "settings": settings}}

    old: dict[str, Any] = {"environment": {"git_commit": "old"}}
    refusal = (
        r'results of one claim must have the same settings, got \["lr=1"\] \(commit of .*\) and \["lr=2"\] '
        r"\(commit of .*\)\. Remove the kept results, and the run folders, of all but one of them"
    )

    check_alike([{}, old, result(["lr=1"]), result(["lr=1"])])
    with pytest.raises(ValueError, match=refusal):
        check_alike([result(["lr=1"]), old, result(["lr=2"])])
    with pytest.raises(ValueError, match=refusal):
        measured_in([old], [result(["lr=1"]), result(["lr=2"])])
    told = measured_in([old, result("a")], [result("b")])
    assert told == {"git_commit": ["old", "of a", "of b"], "settings": [None, "a", "b"]}


def test_runs_are_alike_whatever_their_seed_and_what_the_script_varies(tmp_path: Path) -> None:
    agreed = {"seed": 0, "artifact": "ab", "fl": {"rounds": 3, "lr": 1.0}, "task": {"name": "a"}}

    def settings(changed: dict[str, Any], *varied: str) -> Any:
        (tmp_path / "run.json").write_text(json.dumps(agreed | changed))
        own = {"run_id": "ab", "config_hash": "cd", "command": ["fedzo", "/me"]}
        (tmp_path / "environment.json").write_text(json.dumps({"threads": 1, **own}))
        told = ran_with(tmp_path, *varied)
        assert {**told, "settings": ""} == {"threads": 1, "settings": ""}
        return told["settings"]

    plain = settings({})
    assert settings({"seed": 1, "artifact": "of seed 1"}) == plain
    assert settings({"fl": {"rounds": 4, "lr": 1.0}}) != plain
    assert settings({"task": {"name": "b"}}) != plain
    varied = ("task", "fl.lr", "fl.num_flagged")  # a key that only some plugins have
    assert settings({"task": {"name": "b"}, "fl": {"rounds": 3, "lr": 2.0}}, *varied) == settings({}, *varied)
    assert settings({"fl": {"rounds": 4, "lr": 1.0}}, *varied) != settings({}, *varied)


def test_the_lines_of_a_run_are_read_in_order_all_or_those_of_a_kind(tmp_path: Path) -> None:
    told = [
        {"kind": "setup"},
        {"kind": "round", "round": 0},
        {"kind": "score", "text": "\u00fc"},
        {"kind": "round", "round": 1},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")

    assert metric_lines(tmp_path) == told
    assert metric_lines(tmp_path, "round") == [told[1], told[3]]
    assert metric_lines(tmp_path, "summary") == []


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
    claims.add_mean("with a target", [1.0, 2.0, 3.0], "points", at_least=2.5)

    assert [(row["target"], row["within"], row["holds"]) for row in claims.rows[2:]] == [
        (None, None, True),
        (2.5, ">=", False),
    ]
    assert [(row["value"], row["unit"]) for row in claims.rows] == [
        (2.0, "points +- 2.5"),
        (2.0, "+- 2.5"),
        (1.0, "points"),
        (2.0, "points +- 2.5"),
    ]


@pytest.mark.parametrize(
    ("unit", "values", "told"),
    [
        ("ratio", (0.912746, 0.932684), "ratio (0.9127 to 0.9327)"),
        ("", [29.7, 65.49, 27.93], "(27.93 to 65.49)"),
        ("bytes", [458744, 458640, 458640], "bytes (458,600 to 458,700)"),
        ("s", [110.0, 110.001], "s"),  # one number, as it is written
        ("s", [110.0], "s"),
    ],
)
def test_a_unit_tells_what_values_lie_between(unit: str, values: list[float], told: str) -> None:
    assert with_range(unit, values) == told


def test_kept_results_are_those_of_a_file_once_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert kept_results(file, []) == []

    file.write_text('{"a": [1.5]}\n', encoding="utf-8")

    assert kept_results(file, {}) == {"a": [1.5]}
