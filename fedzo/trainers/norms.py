"""Norm tuning: the scales and shifts of the model's norms are trained (arXiv 2312.11420), by forwards here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedzo.models.blocks import norms_from
from fedzo.trainers.artifacts import Artifact
from fedzo.trainers.base import TRAINERS, Built, LayeredConfig, Prepared, TrainerContext, TrainerTraits
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.masked import MaskedSpace

if TYPE_CHECKING:
    from fedzo.models.loaded import LoadedModel


@dataclass(kw_only=True, slots=True)
class NormsConfig(LayeredConfig):
    """Norm tuning: scales and shifts of norms are trained (arXiv 2312.11420)."""

    first_layer: int = 0
    """Index of the first block whose norms are trained; those after the last block always are. With the number of
    blocks, only these are: a few hundred values, and ``model.lower_layers_cache_mb`` can cache all blocks."""
    lr: float = 1e-2
    eps: float = 1e-2

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(cannot_train_sketch="the norms of a sketch stay as they were when it was built")


@TRAINERS.register("norms", NormsConfig)
@dataclass(frozen=True, slots=True)
class Norms:
    """All values of the norms, with a float32 master."""

    config: NormsConfig

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        """Nothing beside the model is needed."""
        return Prepared()

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """The space over the norms of ``loaded.model``."""
        norms = norms_from(loaded.model, self.config.first_layer)
        places = {name: torch.arange(parameter.numel()) for name, parameter in norms.items()}
        return Built.of(MaskedSpace(loaded.model, places, distribution=distribution))
