"""The rows of an experiment's ``claims.json``: every figure that the docs state, by the run that measured it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedzo.environment import environment


def measured_with() -> dict[str, Any]:
    """Versions, machine, commit and threads of this process."""
    return {
        **environment(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@dataclass(kw_only=True, slots=True)
class Claims:
    """Claims that one command measures.

    Attributes:
        command: Repeats the measurement from a fresh clone.
        seeds: Run seeds that the values are over.
        environment: What they were measured with.
        rows: What ``add`` has gathered.
    """

    command: str
    seeds: list[int] = field(default_factory=lambda: [0])
    environment: dict[str, Any] = field(default_factory=measured_with)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, claim: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Add a value, to four digits; with a bound as its target if there is one."""
        holds = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        self.rows.append(
            {
                "claim": claim,
                "value": float(f"{value:.4g}"),
                "unit": unit,
                "target": at_least if at_most is None else at_most,
                "holds": holds,
                "command": self.command,
                "seeds": self.seeds,
                "environment": self.environment,
            }
        )

    def write(self, path: Path) -> None:
        """Write the rows in place of those that were there."""
        path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print one line a claim."""
        for row in self.rows:
            target = "" if row["target"] is None else f" (target {row['target']:g})"
            print(f"{row['claim']}: {row['value']:g} {row['unit']}{target}")
