"""Trainer plugins: each is a space with the step sizes that suit it (``docs/how-to-add-a-trainer.md``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedzo.registry import Registry
from fedzo.trainers.artifacts import ARTIFACTS, EMPTY, Artifact, ArtifactStore
from fedzo.trainers.config import (
    Ia3TrainerConfig,
    LoraTrainerConfig,
    MeerkatConfig,
    MezoConfig,
    PrefixTrainerConfig,
    PromptTrainerConfig,
    TrainerConfig,
)

if TYPE_CHECKING:
    import torch

    from fedzo.models.load import LoadedModel
    from fedzo.zo.config import Distribution
    from fedzo.zo.spaces.base import Space

Advance = Callable[[int, int], None]
"""Progress: (done, total)."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """What a trainer may use to prepare itself on the server.

    Attributes:
        folder: The run folder; what is prepared is kept there and found again by a resumed run.
        seed: The run seed.
        texts: Gives the unlabelled calibration documents.
        advance: Progress of long work.
    """

    folder: Path
    seed: int
    texts: Callable[[], list[str]]
    advance: Advance

    @property
    def artifacts(self) -> ArtifactStore:
        """Where what clients need is put."""
        return ArtifactStore(self.folder / ARTIFACTS)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a trainer made on the server before the first round.

    Attributes:
        artifact: What a client needs beside the model to build the space, kept with ``Workplace.artifacts``.
        gradient: A gradient of the trained values, float32 [n] in wire order on the CPU, with which the server compares
            every local step (GradIP, ``fedzo.zo.virtual_path``). It stays on the server. None where there is none.
    """

    artifact: Artifact = EMPTY
    gradient: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """A space on a loaded model.

    Attributes:
        space: What is trained.
        reset: Brings the space back to the base weights.
        save: Writes what was trained into a new folder, where that is not the model itself (an adapter).
    """

    space: Space
    reset: Callable[[], None]
    save: Callable[[Path], None] | None = None


class Trainer(Protocol):
    """What a trainer plugin offers."""

    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        """Once, on the server: what clients need beside the model, and what the server keeps."""
        ...

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """On every peer: the space, from the model and the artifact of ``prepare``."""
        ...


TRAINERS: Registry[Trainer] = Registry("trainer", base=TrainerConfig)


@TRAINERS.register("meerkat", MeerkatConfig)
def meerkat(config: MeerkatConfig) -> Trainer:
    """A static 0.1 % mask with a float32 master."""
    from fedzo.trainers.meerkat import Meerkat

    return Meerkat(config)


@TRAINERS.register("mezo", MezoConfig)
def mezo(config: MezoConfig) -> Trainer:
    """All weights."""
    from fedzo.trainers.mezo import Mezo

    return Mezo(config)


@TRAINERS.register("lora", LoraTrainerConfig)
def lora(config: LoraTrainerConfig) -> Trainer:
    """Low-rank adapters."""
    from fedzo.trainers.adapters import lora_trainer

    return lora_trainer(config)


@TRAINERS.register("ia3", Ia3TrainerConfig)
def ia3(config: Ia3TrainerConfig) -> Trainer:
    """Learned rescaling of activations."""
    from fedzo.trainers.adapters import ia3_trainer

    return ia3_trainer(config)


@TRAINERS.register("prefix", PrefixTrainerConfig)
def prefix(config: PrefixTrainerConfig) -> Trainer:
    """Learned keys and values before every text."""
    from fedzo.trainers.adapters import prefix_trainer

    return prefix_trainer(config)


@TRAINERS.register("prompt", PromptTrainerConfig)
def prompt(config: PromptTrainerConfig) -> Trainer:
    """Learned embeddings before every text."""
    from fedzo.trainers.adapters import prompt_trainer

    return prompt_trainer(config)
