"""Choices of a user that the maths shares: the law of a direction, and how a step rounds."""

from __future__ import annotations

from enum import StrEnum


class Distribution(StrEnum):
    """Law of a direction's coordinates (``docs/explanation-randomness.md``)."""

    gaussian = "gaussian"
    rademacher = "rademacher"


class Rounding(StrEnum):
    """How an updated weight is rounded where the model holds 16-bit weights and there is no float32 master."""

    nearest = "nearest"
    """To the nearest value. A step of less than half a unit in the last place (ulp) changes nothing."""
    stochastic = "stochastic"
    """Up or down with probabilities that keep the mean, drawn from the run seed. Small steps add up."""
