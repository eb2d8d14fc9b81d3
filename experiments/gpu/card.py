"""What the pieces of this experiment share: the device, what a case is, and how rows are made of what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fedzo.bench.claims import Claims

DEVICE = torch.device("cuda", 0)
Result = dict[str, Any]
Figure = tuple[str, float, str]
"""What was measured, its value, and the unit of the value."""


class Goal(NamedTuple):
    """What a figure has to reach.

    Attributes:
        at_most: The upper bound, on an H200; None where there is none.
        unit: Of the figure.
        elsewhere: The bound on other cards, whose memory is slower, if it is another one there.
        near: In place of a bound: a value, and how far off it the figure may be.
    """

    at_most: float | None = None
    unit: str = "ratio"
    elsewhere: float | None = None
    near: tuple[float, float] | None = None

    def bound(self, card: str) -> float | None:
        """The upper bound on a card of this name."""
        return self.at_most if self.elsewhere is None or "H200" in card else self.elsewhere


class Case(NamedTuple):
    """One file of results.

    Attributes:
        measure: Makes its content, as plain JSON values.
        figures: What follows from that content.
        goals: By the names of figures: those that must be there, or else their rows say that they were not measured.
    """

    measure: Callable[[], Result]
    figures: Callable[[Result], Iterable[Figure]]
    goals: Mapping[str, Goal]


def rows_of(name: str, case: Case, result: Result | None) -> list[dict[str, Any]]:
    """The rows of a case: its figures, which name the card, and then its goals that have no figure."""
    card, told = ("", {}) if result is None else (result["device_name"], result["environment"])
    claims = Claims(command=f"python experiments/gpu/run.py {name}", environment=told)
    figures = [] if result is None else list(case.figures(result))
    for what, value, unit in figures:
        goal = case.goals.get(what, Goal())
        claims.add(f"{card}: {what}", value, unit, at_most=goal.bound(card), near=goal.near)
    measured = {what for what, _, _ in figures}
    for what, goal in case.goals.items():
        if what not in measured:
            claims.add(what, None, goal.unit, at_most=goal.at_most, near=goal.near)
    return claims.rows


def name_of(dtype: torch.dtype) -> str:
    """As results and rows write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def finish() -> None:
    """Wait until the card has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def held_bytes() -> int:
    """Bytes of the card that tensors of this process take; 0 on a CPU, which does not tell."""
    return int(torch.cuda.memory_allocated(DEVICE)) if DEVICE.type == "cuda" else 0
