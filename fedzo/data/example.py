"""A row as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one row.

    Attributes:
        prompt: Token ids of the prompt; never empty.
        candidates: Token ids of each answer that may follow it; one entry, the right answer, for generation and
            instruction.
        label: Index of the right candidate.
        reference: The right answer as text (generation, instruction).
    """

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    reference: str = ""
