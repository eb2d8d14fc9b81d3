"""Trainer plugins: each is a space with the step sizes that suit it (``docs/how-to-add-a-trainer.md``)."""

from fedzo.trainers import adapters, meerkat, mezo, norms, tables
from fedzo.trainers.base import (
    TRAINERS,
    Built,
    InputsConfig,
    Prepared,
    Trainer,
    TrainerConfig,
    TrainerContext,
    TrainerTraits,
    named_with,
)

__all__ = [
    "adapters",
    "meerkat",
    "mezo",
    "norms",
    "tables",
    "TRAINERS",
    "Built",
    "InputsConfig",
    "Prepared",
    "Trainer",
    "TrainerConfig",
    "TrainerContext",
    "TrainerTraits",
    "named_with",
]
