"""The rows of an experiment's ``claims.json``: every figure that the docs state, by the run that measured it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from fedzo.records.folder import ENVIRONMENT, METRICS, RUN_FILE
from fedzo.report.format import interval
from fedzo.system import environment

Result = Mapping[str, Any]
NOT_MEASURED = "not measured"
"""What stands in the place of a value that nothing has measured yet."""


def ran_with(run_dir: Path, *varied: str) -> dict[str, Any]:
    """The environment of a run, for ``measured_in``, with its ``settings``: a digest of what its peers agreed on.

    Args:
        run_dir: The run folder.
        varied: Dotted keys that the script varies on purpose, beside the run seed and the artifact that may follow
            from it, and keys that follow from these, as ``server_optimizer.lr`` from ``trainer.lr``. A key that a
            later fedzo adds makes its runs unlike those before.
    """
    agreed = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    for key in ("seed", "artifact", *varied):
        *sections, name = key.split(".")
        reduce(getitem, sections, agreed).pop(name, None)
    digest = hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()
    told: dict[str, Any] = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    own = ("command", "config_hash", "run_id")  # of this run alone; a command's words may hold paths of the machine
    return {**{key: value for key, value in told.items() if key not in own}, "settings": digest[:12]}


def kept_results(path: Path, default: Any) -> Any:
    """What earlier calls of a script have measured and kept in a file of JSON, or ``default`` before the first one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def metric_lines(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What a run told, in order: the lines of one kind, or all of them."""
    lines = map(json.loads, (run_dir / METRICS).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if kind in (None, line["kind"])]


def check_alike(results: Iterable[Result]) -> None:
    """Refuse results of one claim that were measured with different settings, such as kept ones of an older script.

    Settings are whatever the ``environment`` of a result has under ``settings``: all that must be alike. Results that
    tell none, as old ones do, are not compared.

    Raises:
        ValueError: Their settings differ.
    """
    told: dict[str, str] = {}
    for each in (result["environment"] for result in results if "settings" in result.get("environment", {})):
        told.setdefault(json.dumps(each["settings"], sort_keys=True), str(each.get("git_commit")))
    if len(told) > 1:
        got = " and ".join(f"{settings} (commit {commit})" for settings, commit in told.items())
        remedy = "Remove the kept results, and the run folders, of all but one of them, and start the script again."
        raise ValueError(f"results of one claim must have the same settings, got {got}. {remedy}")


def measured_in(*groups: Iterable[Result]) -> dict[str, Any]:
    """What kept results were measured with: their ``environment``, where they keep one.

    A list has the values of those that differ, in order. ``without_environment`` counts results that keep none, as
    old ones do. The command of each run is left out.

    Args:
        groups: Results whose settings must be alike, each group by itself.

    Raises:
        ValueError: The settings of a group differ.
    """
    parts = [list(group) for group in groups]
    for part in parts:
        check_alike(part)
    results = [result for part in parts for result in part]
    kept = [result["environment"] for result in results if "environment" in result]
    told: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in kept for key in each if key != "command"):
        values: list[Any] = []
        for each in kept:
            if each.get(key) not in values:
                values.append(each.get(key))
        told[key] = values[0] if len(values) == 1 else values
    if without := len(results) - len(kept):
        told["without_environment"] = without
    return told


@dataclass(kw_only=True, slots=True)
class Claims:
    """Claims that one command measures.

    Attributes:
        command: Repeats the measurement from a fresh clone.
        seeds: Run seeds that the values are over.
        environment: What they were measured with: this process, or ``measured_in`` the results that were kept.
        rows: What ``add`` has gathered.
    """

    command: str
    seeds: list[int] = field(default_factory=lambda: [0])
    environment: dict[str, Any] = field(default_factory=environment)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        claim: str,
        value: float | None,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        near: tuple[float, float] | None = None,
    ) -> None:
        """Add a value, to four digits or as many as tell it from its target.

        The row has the target and, as ``within``, what it means: "<=", ">=", or how far off it the value may be.

        Args:
            claim: What is claimed.
            value: As it was measured; None where nothing was. The row then tells the target and claims nothing: neither
                its value nor ``holds`` is known.
            unit: Of the value.
            at_most: The target, if it is an upper bound.
            at_least: The target, if it is a lower bound.
            near: The target, and how far off it the value may be.

        Raises:
            ValueError: Another row says the same of another value, or there are several targets.
        """
        if any(row["claim"] == claim for row in self.rows):
            raise ValueError(f"each claim must be made once, got {claim!r} twice")
        given: tuple[tuple[float | None, str | float], ...] = ((at_most, "<="), (at_least, ">="), near or (None, 0.0))
        bounds = [(target, within) for target, within in given if target is not None]
        if len(bounds) > 1:
            raise ValueError(f"{claim!r} must have one target, got {len(bounds)}")
        target, within = bounds[0] if bounds else (None, None)
        self.rows.append(
            {
                "claim": claim,
                "value": None if value is None else _rounded(value, target, within),
                "unit": unit,
                "target": target,
                "within": within,
                "holds": None if value is None else _holds(value, target, within),
                "command": self.command,
                "seeds": self.seeds,
                "environment": {} if value is None else self.environment,
            }
        )

    def add_mean(self, claim: str, values: Sequence[float], unit: str, *, at_least: float | None = None) -> None:
        """Add the mean over run seeds; its unit tells the half width of the 95 % interval, where there are several."""
        mean, half = interval(values)
        self.add(claim, mean, unit if math.isnan(half) else f"{unit} +- {half:.2g}".lstrip(), at_least=at_least)

    def write(self, path: Path) -> None:
        """Write the rows in place of those of the same script, whatever its options; other scripts' stay."""
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        others = [row for row in known if row["command"].split()[:2] != self.command.split()[:2]]
        path.write_text(json.dumps([*others, *self.rows], indent=1) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print one line a claim."""
        for row in self.rows:
            value = NOT_MEASURED if row["value"] is None else f"{number(row['value'])} {row['unit']}"
            print(f"{row['claim']}: {value}{f' ({wanted(row)})' if wanted(row) else ''}")


def _rounded(value: float, target: float | None, within: str | float | None) -> float:
    """To four digits, or as many as tell it from its target."""
    holds = _holds(value, target, within)
    rounded = (float(f"{value:.{digits}g}") for digits in range(4, 17))
    return next((each for each in rounded if _holds(each, target, within) == holds), value)


def _holds(value: float, target: float | None, within: str | float | None) -> bool:
    if target is None or within is None:
        return True
    if isinstance(within, str):
        return value <= target if within == "<=" else value >= target
    return abs(value - target) <= within


def number(value: float) -> str:
    """A number of a row with all of its digits, which were rounded when it was added."""
    return f"{value:.15g}"


def with_range(unit: str, values: Sequence[float]) -> str:
    """A unit that tells in brackets what values lie between, such as quartiles, or the runs behind a median.

    Args:
        unit: Of each of them.
        values: At least one; where all of them are one number, the unit tells no more.
    """
    low, high = (float(f"{end:.4g}") for end in (min(values), max(values)))
    if low == high:
        return unit
    ends = (f"{end:,.0f}" if unit == "bytes" else number(end) for end in (low, high))
    return f"{unit} ({' to '.join(ends)})".lstrip()


def wanted(row: Result, shown: Callable[[float], str] = number) -> str:
    """What a row's target says: ``<= 1.05``, ``>= 5``, ``3.89 +- 0.12``; nothing where it has none.

    Args:
        row: Of a ``claims.json``.
        shown: How numbers are written.
    """
    if row["target"] is None:
        return ""
    target, within = shown(row["target"]), row["within"]
    return f"{within} {target}" if isinstance(within, str) else f"{target} +- {shown(within)}"
