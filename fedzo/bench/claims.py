"""The rows of an experiment's ``claims.json``: every figure that the docs state, by the run that measured it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedzo.report.format import interval
from fedzo.system import environment


def measured_in(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What kept results were measured with: their ``environment``, where they keep one.

    A list has the values of those that differ, in order. ``without_environment`` counts results that keep none, as
    old ones do. The command of each run is left out.
    """
    results = list(results)
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
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        near: tuple[float, float] | None = None,
    ) -> None:
        """Add a value, to four digits or as many as tell it from its target.

        Args:
            claim: What is claimed.
            value: As it was measured.
            unit: Of the value.
            at_most: The target, if it is an upper bound.
            at_least: The target, if it is a lower bound.
            near: The target, and how far off it the value may be.

        Raises:
            ValueError: Another row says the same of another value.
        """
        if any(row["claim"] == claim for row in self.rows):
            raise ValueError(f"each claim must be made once, got {claim!r} twice")
        target = at_most if at_least is None else at_least
        if near is not None:
            target = near[0]

        def holds(value: float) -> bool:
            if near is not None:
                return abs(value - near[0]) <= near[1]
            return (at_most is None or value <= at_most) and (at_least is None or value >= at_least)

        rounded = (float(f"{value:.{digits}g}") for digits in range(4, 17))
        self.rows.append(
            {
                "claim": claim,
                "value": next((each for each in rounded if holds(each) == holds(value)), value),
                "unit": unit,
                "target": target,
                "holds": holds(value),
                "command": self.command,
                "seeds": self.seeds,
                "environment": self.environment,
            }
        )

    def add_mean(self, claim: str, values: Sequence[float], unit: str) -> None:
        """Add the mean over run seeds; its unit tells the half width of the 95 % interval, where there are several."""
        mean, half = interval(values)
        self.add(claim, mean, unit if math.isnan(half) else f"{unit} +- {half:.2g}".lstrip())

    def write(self, path: Path) -> None:
        """Write the rows in place of those of the same script, whatever its options; other scripts' stay."""
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        others = [row for row in known if row["command"].split()[:2] != self.command.split()[:2]]
        path.write_text(json.dumps([*others, *self.rows], indent=1) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print one line a claim."""
        for row in self.rows:
            target = "" if row["target"] is None else f" (target {row['target']:g})"
            print(f"{row['claim']}: {row['value']:g} {row['unit']}{target}")
