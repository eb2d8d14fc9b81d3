"""The generated tables of the pages are tables to whoever renders them, and say what their files say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)
PAGES = (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/*.md"))


@pytest.fixture(scope="module")
def tables(script: Callable[[Path], ModuleType]) -> Any:
    return script(ROOT / "docs" / "tables.py")


@pytest.mark.parametrize(
    ("name", "body"),
    [found.groups() for page in PAGES for found in TABLE.finditer(page.read_text(encoding="utf-8"))],
    ids=lambda value: value if value.startswith("experiments") else "",
)
def test_every_row_has_the_cells_of_its_head(name: str, body: str) -> None:
    """Between the marks of one file there may be several tables, with an empty line between them."""
    for table in body.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
        assert not lines or set(lines[1]) == set("|-")


def row(value: float, target: float | None, within: str | float | None = "<=", **changed: Any) -> Any:
    holds = target is None or (value <= target if within == "<=" else value >= target)
    told = {"claim": "a: b", "value": value, "target": target, "within": within, "holds": holds}
    return {**told, "unit": "", "command": "python experiments/x/y.py", **changed}


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (1.1001, "", "1.1001"),  # which a target of 1.1 misses
        (0.28185, "share", "28.185 %"),
        (0.07, "share", "7 %"),
        (123500.0, "tokens", "123500 tokens"),
        (1234567.0, "bytes", "1,234,567 bytes"),
        (7.617, "points +- 0.84", "7.617 points +- 0.84"),
        (0.825, "ratio (0.8136 to 0.8333)", "0.825 (0.8136 to 0.8333)"),
        (160.3, "s (152.8 to 188.7)", "160.3 s (152.8 to 188.7)"),
        (458600.0, "bytes (458,600 to 458,700)", "458,600 bytes (458,600 to 458,700)"),
    ],
)
def test_a_value_keeps_its_digits(tables: Any, value: float, unit: str, told: str) -> None:
    assert tables.amount(value, unit) == told


@pytest.mark.parametrize(
    ("target", "within", "unit", "told"),
    [
        (None, None, "s", ""),
        (1.05, "<=", "ratio", "<= 1.05"),
        (5, ">=", "points +- 0.84", ">= 5 points"),
        (0.05, "<=", "share", "<= 5 %"),
        (1.05, "<=", "ratio (0.9867 to 1.12)", "<= 1.05"),
        (3.89, 0.1167, "GB", "3.89 GB +- 0.1167 GB"),
    ],
)
def test_a_target_says_on_which_side_a_value_must_lie(
    tables: Any, target: float | None, within: str | float | None, unit: str, told: str
) -> None:
    assert tables.goal(row(1.0, target, within, unit=unit)) == told


def test_no_table_shows_a_missed_target_as_met(tables: Any) -> None:
    """1.1001 of at most 1.1 and 1.0504 of at most 1.05, which four digits would write as they write their target."""
    claim = row(1.1001, 1.1)
    (line,) = tables.claims([claim])[2:]
    (pivoted,) = tables.pivoted("y", "case")([claim])[2:]
    (sketch,) = [
        line
        for line in tables.sketches([row(1.1001, 1.1, claim="16 tokens: 4 bits, error", command="python x/quality.py")])
        if line.startswith("| 4 bits")
    ]
    (bench,) = tables.bench([row(1.0504, 1.05, claim="case: fedzo step / bare forwards, time")])[2:]

    assert line == "| a: b | 1.1001 | <= 1.1: **missed** |"
    assert pivoted == "| a | 1.1001, target <= 1.1 **missed** |"
    assert sketch == "| 4 bits | 1.1001, target <= 1.1 **missed** |"
    assert bench.startswith("| case | 1.0504 | <= 1.05, **missed** |")


def test_a_row_without_a_value_says_so_beside_its_target_and_is_neither_met_nor_missed(tables: Any) -> None:
    def unmeasured(claim: str, script: str) -> Any:
        made = {"claim": claim, "value": None, "holds": None, "target": 1.05, "within": "<="}
        return {**made, "unit": "s", "command": f"python experiments/x/{script}.py"}

    (line,) = tables.claims([unmeasured("a: b", "y")])[2:]
    (pivoted,) = tables.pivoted("y", "case")([unmeasured("a: b", "y")])[2:]
    sketches = tables.sketches([unmeasured("16 tokens: 4 bits, error", "quality")])

    assert line == "| a: b | not measured | <= 1.05 s |"
    assert pivoted == "| a | not measured, target <= 1.05 s |"
    assert "| 4 bits | not measured |" in sketches


def test_the_quickstart_takes_the_minutes_that_its_claim_tells(tables: Any) -> None:
    """A user waits for the whole command, not for what the run counts of itself."""
    folder = ROOT / "experiments" / "quickstart"
    results = json.loads((folder / "results.json").read_text())
    named = {each["claim"]: each["value"] for each in json.loads((folder / "claims.json").read_text())}

    *lines, _, last = tables.quickstart(results)

    minutes = [float(line.split("|")[-2]) for line in lines[2:]]
    assert median(minutes) == pytest.approx(named["the run alone, median of the seeds"], abs=0.051)
    (points,) = re.findall(r"\+(\d+\.\d) \+- (\d\.\d) points over seeds", last)
    of_seeds = [100 * (run["after"]["value"] - run["before"]["best_threshold_accuracy"]) for run in results["run"]]
    mean = sum(of_seeds) / 3
    error = (sum((each - mean) ** 2 for each in of_seeds) / 2 / 3) ** 0.5
    assert [float(each) for each in points] == pytest.approx([mean, 4.303 * error], abs=0.051)


def test_the_last_lines_of_the_quickstart_name_the_round_that_dev_scores_chose(tables: Any) -> None:
    """Its results are older than the dev score of a summary."""
    results = json.loads((ROOT / "experiments" / "quickstart" / "results.json").read_text())
    first = results["run"][0]

    assert tables.ending(results)[1] == (
        f"test, before -> after (best dev round {first['best_round']} of {first['rounds']}):"
    )


def test_what_a_step_costs_ranges_over_reliable_cases(tables: Any) -> None:
    """A case without a target is not reliable."""

    def step(case: str, value: float, target: float | None = 1.05, what: str = "time") -> Any:
        return row(value, target, claim=f"{case}: fedzo step / bare forwards, {what}")

    made = tables.ranges(
        [
            *(step("a-masked", 0.9803), step("a-masked", 1.001, what="peak memory"), step("b-lora", 0.949)),
            *(step("a-full", 1.228), step("b-full", 1.351), step("c-full", 1.109, None)),
            row(3.0, None, claim="a-full: MeZO walk / bare forwards, time"),
        ]
    )

    assert made == [
        "| trained | time | peak memory |",
        "|---|---|---|",
        "| a mask or an adapter | 0.949 to 0.980 | 1.001 to 1.001 |",
        "| all weights | 1.228 to 1.351 |  |",
    ]


def test_a_method_that_another_task_has_is_told_as_not_run(tables: Any) -> None:
    """At its place among the others, and only in a table that has measures of it."""

    def claim(case: str, value: float, unit: str) -> Any:
        return row(value, None, claim=case, unit=unit)

    rows = [
        claim("Rotten Tomatoes, the threshold alone: test accuracy", 74.0, "%"),
        claim("Rotten Tomatoes, MeZO, one site: test accuracy", 75.0, "% +- 2.1"),
        claim("Rotten Tomatoes, MeZO, one site: s to 0.70", 33.0, "(29 to 40)"),
        claim("Rotten Tomatoes, Meerkat: test accuracy", 76.0, "% +- 1.7"),
        claim("Rotten Tomatoes, Meerkat: s to 0.70", 30.0, ""),
        claim("SST-2, the threshold alone: test accuracy", 70.0, "%"),
        claim("SST-2, Meerkat: test accuracy", 73.0, "% +- 3.9"),
        claim("SST-2, Meerkat: s to 0.70", 144.0, "(100 to 150)"),
        claim("SST-2, Meerkat: bytes to 0.70", 458600.0, "bytes (458,600 to 458,700)"),
    ]

    assert tables.peers("SST-2", ("test ",))(rows) == [
        "| method | test accuracy |",
        "|---|---|",
        "| the threshold alone | 70 % |",
        "| MeZO, one site | not run |",
        "| Meerkat | 73 % +- 3.9 |",
    ]
    assert tables.peers("SST-2", ("s to", "bytes to"))(rows) == [
        "| method | s to 0.70 | bytes to 0.70 |",
        "|---|---|---|",
        "| MeZO, one site | not run |  |",
        "| Meerkat | 144 (100 to 150) | 458,600 bytes (458,600 to 458,700) |",
    ]
    assert tables.peers("Rotten Tomatoes", ("s to", "bytes to"))(rows) == [
        "| method | s to 0.70 |",
        "|---|---|",
        "| MeZO, one site | 33 (29 to 40) |",
        "| Meerkat | 30 |",
    ]
    assert tables.peers("AG News", ("test ",))(rows) == []


def test_the_table_of_steps_tells_the_quartiles_of_ours(tables: Any) -> None:
    timed = row(1.351, 1.25, claim="case: fedzo step / bare forwards, time", unit="ratio (1.332 to 1.416)")

    (line,) = tables.bench([timed])[2:]

    assert line.startswith("| case | 1.351 (1.332 to 1.416) | <= 1.25, **missed** |")
