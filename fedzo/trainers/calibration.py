"""Calibration on text without labels: what trainers that learn from a gradient of the base model share.

The server alone calibrates. The gradient is one of the usual loss of the next token on windows of text, from which the
trained values are chosen (Meerkat's mask), or with which local steps are compared (GradIP).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedzo.data.embedded import imdb_texts
from fedzo.data.encode import opening
from fedzo.data.files import read_texts
from fedzo.errors import ConfigError, Problem, at_least, problem
from fedzo.masks.calibration import windows_from_texts
from fedzo.models.checks import check_ids, num_positions
from fedzo.trainers.base import InputsConfig, LayeredConfig, TrainerContext

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings
    from fedzo.models.loaded import LoadedModel


class CalibrationSource(StrEnum):
    """Source of the unlabelled calibration text."""

    imdb = "imdb"
    """The embedded data package's IMDB reviews, labels dropped."""
    train = "train"
    """The task's own training prompts."""
    file = "file"
    """The file ``inputs.calibration``."""


@dataclass(kw_only=True, slots=True)
class CalibratedConfig(LayeredConfig):
    """A trainer that the server prepares on text without labels."""

    calibration: CalibrationSource = CalibrationSource.imdb
    calibration_docs: int = 16
    """Number of calibration documents (100 x 512 tokens of C4 in SensZOQ's tool)."""
    calibration_tokens: int = 128
    """Length of each document's window in tokens."""

    @property
    def reads_text(self) -> bool:
        """Whether it is prepared on the text, as its settings are: those that find no gradient need none."""
        return self.traits.gradient or not self.traits.gradient_setting

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("trainer.calibration_docs", self.calibration_docs, 1, "It counts documents.")
        yield from at_least("trainer.calibration_tokens", self.calibration_tokens, 2, "The loss is of the next token.")

    def input_problems(self, inputs: InputsConfig, run: RunSettings) -> Iterator[Problem]:
        if self.reads_text and self.calibration is CalibrationSource.file and inputs.calibration is None:
            remedy = "Write inputs.calibration=<text file>, or choose another trainer.calibration."
            yield problem("inputs.calibration", "be given for trainer.calibration=file", None, remedy)
        if self.calibration is not CalibrationSource.file and inputs.calibration is not None:
            rule = f"be null for trainer.calibration={self.calibration}, which reads no file"
            remedy = "Write trainer.calibration=file, or leave it out."
            yield problem("inputs.calibration", rule, inputs.calibration, remedy)
        if self.reads_text and self.calibration is CalibrationSource.train and run.partition.traits.own_rows:
            rule = "be imdb or file for partition=own, where the server has no training rows"
            yield problem("trainer.calibration", rule, "train", "Choose another text.")


def calibration_windows(config: CalibratedConfig, loaded: LoadedModel, context: TrainerContext) -> list[torch.Tensor]:
    """Token ids, int64 [calibration_tokens], one window of each document.

    Raises:
        ConfigError: Windows are longer than the model's positions, too few documents are long enough, or the model has
            no row for a token.
    """
    longest = num_positions(loaded.model)
    if longest is not None and config.calibration_tokens > longest:
        raise ConfigError(
            f"trainer.calibration_tokens must be <= {longest}, the positions of {loaded.source!r}, got "
            f"{config.calibration_tokens}. Lower it."
        )

    def tokenize(text: str) -> list[int]:
        ids = list(loaded.tokenizer(text, verbose=False)["input_ids"])
        check_ids(loaded.model, ids, where="calibration text")
        return ids

    return windows_from_texts(
        _texts(config, context),
        tokenize=tokenize,
        num_docs=config.calibration_docs,
        num_tokens=config.calibration_tokens,
        seed=context.seed,
        opening=opening(loaded.tokenizer),
    )


def _texts(config: CalibratedConfig, context: TrainerContext) -> list[str]:
    if config.calibration is CalibrationSource.imdb:
        return imdb_texts()
    if config.calibration is CalibrationSource.train:
        return context.texts()
    return read_texts(Path(context.inputs.calibration or ""))
