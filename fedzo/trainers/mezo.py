"""MeZO: every weight of the model is trained (arXiv 2305.17333)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedzo.models.available import available_memory_bytes
from fedzo.models.blocks import parameters_from
from fedzo.models.memory import weights_bytes
from fedzo.trainers.artifacts import Artifact
from fedzo.trainers.base import TRAINERS, Built, LayeredConfig, Prepared, TrainerContext, TrainerTraits
from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.rounding import is_rounded
from fedzo.zo.spaces.full import FullSpace

if TYPE_CHECKING:
    from fedzo.models.loaded import LoadedModel

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class MezoConfig(LayeredConfig):
    """MeZO: all weights are trained (arXiv 2305.17333)."""

    lr: float = 1e-6
    """Learning rate; ``server_optimizer.lr`` defaults to it. The default is MeZO's, for runs of 20,000 steps. A run of
    a few hundred rounds needs a larger one: in 200 steps on SST-2 and AG News, ``experiments/meerkat`` found 6.4e-5
    best. Tune it."""
    rounding: Rounding = Rounding.nearest
    """How steps are rounded where ``model.dtype`` has 16 bits."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(
            float32_master=False,
            cannot_train_sketch="it would train tables, embeddings and norms together, at one learning rate",
            cannot_compile="its probes hand each operation a perturbed weight, made by kernels outside of torch, which "
            "cannot be traced",
            rounding_setting="" if self.rounding is Rounding.nearest else f"trainer.rounding={self.rounding}",
        )


@TRAINERS.register("mezo", MezoConfig)
@dataclass(frozen=True, slots=True)
class Mezo:
    """The full space; a model that has moved is brought back by reading its weights again."""

    config: MezoConfig

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        """Nothing beside the model is needed."""
        return Prepared()

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """The full space over ``loaded.model``, or its blocks from ``first_layer`` on, in the dtype of the weights.

        What no text passes, such as towers for images or sound, stays as it is: a step would move it at random.
        Warns where 16-bit weights are rounded to nearest, which loses small steps.
        """
        trained = parameters_from(loaded.model, self.config.first_layer)
        narrow = sorted({str(p.dtype).removeprefix("torch.") for p in trained.values() if is_rounded(p.dtype)})
        if narrow and self.config.rounding is Rounding.nearest:
            log.warning(
                "trainer=mezo: weights are held in %s, where rounding loses steps below half a unit in the last place "
                "(ulp). Write trainer.rounding=stochastic, or model.dtype=float32.",
                " and ".join(narrow),
            )
        _warn_of_second_model(loaded)
        space = FullSpace(loaded.model, parameters=trained, distribution=distribution, rounding=self.config.rounding)
        return Built(space, loaded.reload_weights)


def _warn_of_second_model(loaded: LoadedModel) -> None:
    """Say so where the way back to an earlier round will not find the memory that it takes."""
    needed, free = weights_bytes(loaded.model), available_memory_bytes(torch.device("cpu"))
    if loaded.reads_whole and needed > free:
        log.warning(
            "trainer=mezo: to return to an earlier round, %r is read again whole. This takes %.0f MiB beside the "
            "loaded model, and %.0f MiB are free. Free some, or train a mask or an adapter. Save a GGUF file as "
            "safetensors, which are read weight by weight.",
            loaded.source,
            needed / 2**20,
            free / 2**20,
        )
