"""Tables: the lookup tables of a sketch are trained, over codes that stay as they are.

SpaLLM (arXiv 2410.06364) trains them by backpropagation with AdamW (``estimator=backprop``). Training them by scalars
is ours.

The tables are float32 parameters of the model itself, so the space is that of the adapters. A step costs what inference
of the sketch costs, and nothing but the model has to travel: a peer's codes are checked by the base's digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedzo.errors import ConfigError, Problem
from fedzo.masks.sensitivity import WindowGradients, next_token_loss
from fedzo.models.blocks import parameters_from
from fedzo.models.sketched.table_file import GRADIENT, read_tables, write_tables
from fedzo.sketch import TableSpace, sketched_layers, tables_of
from fedzo.trainers.artifacts import Artifact
from fedzo.trainers.base import (
    TRAINERS,
    Built,
    InputsConfig,
    Prepared,
    TrainerConfig,
    TrainerContext,
    TrainerTraits,
)
from fedzo.trainers.calibration import CalibratedConfig, calibration_windows
from fedzo.zo.config import Distribution

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings
    from fedzo.models.loaded import LoadedModel

GRADIENT_FILE = "table_gradient.safetensors"
"""Of the run folder: the gradient that a resumed run goes on with."""


@dataclass(kw_only=True, slots=True)
class TablesConfig(CalibratedConfig):
    """Lookup tables of a sketched model; its codes stay fixed (SpaLLM, arXiv 2410.06364, which uses gradients)."""

    gradient: bool = True
    """Whether the server computes the gradient of the tables on calibration text, which GradIP needs."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(
            trains_base_weights=False,
            cannot_train_dense="a dense model has no tables",
            gradient=self.gradient,
            gradient_setting="trainer.gradient=true",
        )

    def input_problems(self, inputs: InputsConfig, run: RunSettings) -> Iterator[Problem]:
        if self.gradient:
            yield from CalibratedConfig.input_problems(self, inputs, run)
            inputs = replace(inputs, calibration=None)  # which it takes
        yield from TrainerConfig.input_problems(self, inputs, run)

    def for_timing(self) -> TablesConfig:
        return replace(self, gradient=False)


@TRAINERS.register("tables", TablesConfig)
@dataclass(frozen=True, slots=True)
class Tables:
    """The space of the tables of the sketched layers, in the order of ``named_parameters``."""

    config: TablesConfig

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        """Nothing beside the model is needed. The mean gradient on calibration text stays at the server."""
        trained = self._trained(loaded)
        if not self.config.gradient:
            return Prepared()
        kept = context.folder / GRADIENT_FILE
        if context.resumed and kept.exists():
            gradient = read_tables(kept, loaded, content=GRADIENT)
        else:
            gradient = self._gradient(loaded, context)
            write_tables(kept, gradient, base_digest=loaded.base_digest, content=GRADIENT)
        return Prepared(gradient=torch.cat([gradient[name].reshape(-1) for name in trained]))

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """The tables of ``loaded.model``; their base values are kept for the way back."""
        trained = {id(table) for table in self._trained(loaded).values()}
        layers = [layer for layer in sketched_layers(loaded.model).values() if id(layer.tables) in trained]
        return Built.of(TableSpace(layers, distribution=distribution))

    def _gradient(self, loaded: LoadedModel, context: TrainerContext) -> dict[str, torch.Tensor]:
        """The mean over windows, of all tables."""
        tables, windows = tables_of(loaded.model), calibration_windows(self.config, loaded, context)
        gradients = WindowGradients(loaded.model, windows, next_token_loss, context.advance)
        sums = gradients.sums(tables, squares=False).signed
        return {name: (sums[name] / len(windows)).view(table.shape).cpu() for name, table in tables.items()}

    def _trained(self, loaded: LoadedModel) -> dict[str, nn.Parameter]:
        if tables := tables_of(loaded.model):
            upper = parameters_from(loaded.model, self.config.first_layer)
            return {name: table for name, table in tables.items() if name in upper}
        raise ConfigError(
            f"trainer=tables: {loaded.source!r} must be a sketch, got a model of dense layers. Make one with "
            "`fedzo sketch --out FOLDER` and name that folder."
        )
