"""What a trainer plugin is: its config, the traits that other parts read, and its work on server and clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedzo.errors import Problem, at_least, not_negative, positive, problem
from fedzo.registry import PluginConfig, Registry
from fedzo.system import OnProgress, no_progress
from fedzo.trainers.artifacts import ARTIFACTS, EMPTY, Artifact, ArtifactStore

if TYPE_CHECKING:
    import torch

    from fedzo.config.schema import RunSettings
    from fedzo.models.loaded import LoadedModel
    from fedzo.zo.config import Distribution
    from fedzo.zo.spaces.base import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTraits:
    """What the rules on other parts of a run must know of a trainer.

    Attributes:
        trains_base_weights: Whether dense weights of the model itself are trained: nobody may pack them, and a backward
            pass has a gradient of each. Tables of a sketch are none.
        float32_master: Whether the trained values are held in float32 whatever the model's dtype. Without it they are
            the model's weights themselves, in its dtype, and too many for float32 vectors beside them.
        cannot_compile: Why its forwards cannot go through ``torch.compile``, as half a sentence; empty where they can.
        cannot_train_dense: Why it cannot train a model of dense layers, as half a sentence; empty where it can.
        cannot_train_sketch: Why it cannot train a sketch (``fedzo.models.sketched``), in the same way.
        gradient: Whether ``prepare`` can find a gradient of the trained values, for GradIP.
        gradient_setting: Which of its settings makes it find one, if one must.
        rounding_setting: Which of its settings rounds 16-bit trained values at random, if one does.
    """

    trains_base_weights: bool = True
    float32_master: bool = True
    cannot_compile: str = ""
    cannot_train_dense: str = ""
    cannot_train_sketch: str = ""
    gradient: bool = False
    gradient_setting: str = ""
    rounding_setting: str = ""


@dataclass(kw_only=True, slots=True)
class InputsConfig:
    """Files for the trainer. Only what the trainer makes from them is sent to clients."""

    artifact: str | None = None
    """An artifact made beforehand, instead of at the start of the run: for ``trainer=meerkat`` a mask of
    ``fedzo mask``."""
    calibration: str | None = None
    """Text without labels to prepare the trainer on (``trainer.calibration=file``): a text file, one document a line,
    or a table with a ``text`` column."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig(PluginConfig):
    """Which numbers are trained, and the step sizes that suit them."""

    lr: float = 1e-4
    """Learning rate suited to this trainer; default of ``server_optimizer.lr``."""
    eps: float = 1e-3
    """Probe size suited to this trainer; default of ``estimator.eps``."""

    @property
    def traits(self) -> TrainerTraits:
        """What other parts of a run must know of this trainer."""
        return TrainerTraits()

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from not_negative("trainer.lr", self.lr, "0 trains nothing.")
        yield from positive("trainer.eps", self.eps, "1e-3 is usual.")

    def input_problems(self, inputs: InputsConfig, run: RunSettings) -> Iterator[Problem]:
        """Broken rules on the files that a launch gives. A trainer that takes some replaces this."""
        for each in fields(inputs):
            if (path := getattr(inputs, each.name)) is not None:
                yield problem(
                    f"inputs.{each.name}", "be null for this trainer, which takes no such file", path, "Leave it out."
                )

    def recipe_of(self, artifact: Path) -> TrainerConfig:
        """This config as it would be if the given artifact had been made by it, for the peers to know.

        Raises:
            ConfigError: The file is no artifact of this trainer.
        """
        return self

    def for_timing(self) -> TrainerConfig:
        """The trainer for whoever only times its steps: where it learns from data what to train, it draws lots."""
        return self


@dataclass(kw_only=True, slots=True)
class LayeredConfig(TrainerConfig):
    """A trainer that can freeze the lower blocks of the model."""

    first_layer: int = 0
    """Index of the first block with trained values; 0 trains all. In most models the blocks below then run once a step
    (``model.reuse_lower_layers``)."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("trainer.first_layer", self.first_layer, 0, "0 trains all blocks.")


@dataclass(frozen=True, slots=True)
class TrainerContext:
    """What a trainer may use to prepare itself on the server.

    Attributes:
        folder: The run folder; what is prepared is kept there and found again by a resumed run.
        seed: The run seed.
        texts: Gives the prompts of all clients' training rows, in a simulation. Where clients have rows of their own it
            raises a ``ConfigError``, and where steps are only timed (``TrainerConfig.for_timing``) it gives none.
        advance: Progress of long work.
        inputs: Files that the user gave.
        resumed: Whether an earlier start of this run prepared it here. Else a file in the folder is of other settings.
    """

    folder: Path
    seed: int
    texts: Callable[[], list[str]]
    advance: OnProgress = no_progress
    inputs: InputsConfig = field(default_factory=InputsConfig)
    resumed: bool = True

    @property
    def artifacts(self) -> ArtifactStore:
        """Where what clients need is put."""
        return ArtifactStore(self.folder / ARTIFACTS)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a trainer made on the server before the first round.

    Attributes:
        artifact: What a client needs beside the model to build the space, kept with ``TrainerContext.artifacts``.
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

    @classmethod
    def of(cls, space: Space, save: Callable[[Path], None] | None = None) -> Built:
        """A space at its base values, which are remembered: the reset puts them back."""
        base = space.values()
        return cls(space, lambda: space.load(base), save)


class Trainer(Protocol):
    """What a trainer plugin offers."""

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        """Once, on the server: what clients need beside the model, and what the server keeps."""
        ...

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """On every peer: the space, from the model and the artifact of ``prepare``."""
        ...


TRAINERS: Registry[Trainer] = Registry("trainer", base=TrainerConfig)
"""Factories ``(config) -> Trainer``."""


def named_with(able: Callable[[TrainerTraits], bool]) -> dict[str, TrainerTraits]:
    """The registered trainers whose traits, by their default settings, are such; by ``trainer=NAME``, for messages.

    A trainer without defaults for all its keys is left out.
    """
    known: dict[str, TrainerTraits] = {}
    for name, config_class in TRAINERS:
        with suppress(Exception):  # somebody else's code, which this run need not use: whatever it raises
            known[f"trainer={name}"] = config_class().traits
    return {name: traits for name, traits in known.items() if able(traits)}
