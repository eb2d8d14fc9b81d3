"""Rows of claims.json, which the experiments of this folder share: each replaces those of its own command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedzo.environment import environment

CLAIMS = Path(__file__).parent / "claims.json"


def row(claim: str, value: float, unit: str, *, command: str, seeds: list[int], **judged: Any) -> dict[str, Any]:
    """One claim; ``target`` and ``holds`` where there is something to reach."""
    row = {"claim": claim, "value": float(f"{value:.4g}"), "unit": unit, "target": None, "holds": True, **judged}
    return {**row, "command": command, "seeds": seeds, "environment": environment()}


def write(rows: list[dict[str, Any]], *, command: str) -> None:
    kept = json.loads(CLAIMS.read_text()) if CLAIMS.exists() else []
    kept = [old for old in kept if old["command"].split()[1] != command.split()[1]]
    CLAIMS.write_text(json.dumps(kept + rows, indent=1) + "\n")


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, JASA 22, 1927)."""
    z, share = 1.959964, hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
