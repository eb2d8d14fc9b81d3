"""A package of somebody else, with trainers that fedzo does not know. It lies on the path as an installed one does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedzo.errors import Problem, at_least
from fedzo.trainers import TRAINERS, Built, Prepared, TrainerConfig, TrainerContext, TrainerTraits
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.masked import MaskedSpace

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings
    from fedzo.models.loaded import LoadedModel


@dataclass(kw_only=True, slots=True)
class StripesConfig(TrainerConfig):
    """Every so many weights of the linear layers."""

    lr: float = 1e-3
    stride: int = 16
    """Distance of two trained weights."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(trains_base_weights=True, cannot_compile="its author says so")

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("trainer.stride", self.stride, 1, "1 trains them all.")


@TRAINERS.register("stripes", StripesConfig)
@dataclass(frozen=True, slots=True)
class Stripes:
    """A masked space without a mask to send."""

    config: StripesConfig

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        return Prepared()

    def build(self, loaded: LoadedModel, artifact: bytes, *, distribution: Distribution) -> Built:
        indices = {
            f"{name}.weight": torch.arange(0, module.weight.numel(), self.config.stride)
            for name, module in loaded.model.named_modules()
            if type(module) is nn.Linear and "lm_head" not in name
        }
        return Built.of(MaskedSpace(loaded.model, indices, distribution=distribution))


@dataclass(kw_only=True, slots=True)
class NarrowConfig(StripesConfig):
    """Stripes that would be held in the model's dtype."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(float32_master=False)


@TRAINERS.register("narrow", NarrowConfig)
def narrow(config: NarrowConfig) -> Stripes:
    return Stripes(config)
