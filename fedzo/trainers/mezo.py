"""MeZO: every weight of the model is trained (arXiv 2305.17333)."""

from __future__ import annotations

from dataclasses import dataclass

from fedzo.models.load import LoadedModel
from fedzo.trainers import Built, Workplace
from fedzo.zo.config import Distribution
from fedzo.zo.space import FullSpace


@dataclass(frozen=True, slots=True)
class Mezo:
    """The full space; a model that has moved is brought back by reading its weights again."""

    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> bytes:
        """Nothing beside the model is needed."""
        return b""

    def build(self, loaded: LoadedModel, artifact: bytes, *, distribution: Distribution) -> Built:
        """The full space over ``loaded.model``."""
        return Built(FullSpace(loaded.model, distribution=distribution), loaded.reload_weights)
