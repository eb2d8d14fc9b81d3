"""The check of trainers refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.models.loaded import LoadedModel
from fedzo.testing import check_trainer
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.trainers import Built, InputsConfig, Prepared, TrainerContext
from fedzo.trainers.artifacts import Artifact
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.spaces.dense import DenseSpace


class Norms:
    """The one-dimensional weights, from a seed of 4 bytes."""

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        return Prepared(context.artifacts.put(context.seed.to_bytes(4, "little")))

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        if artifact.size != 4:
            raise ConfigError(f"the artifact must be a seed of 4 bytes, got {artifact.size}")
        return self.built(loaded, int.from_bytes(artifact.read(), "little"), distribution)

    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        weights = [weight for weight in loaded.model.parameters() if weight.dim() == 1]
        space = DenseSpace(weights, distribution=distribution)
        base = direction(seed, space.size)
        space.load(base)
        return Built(space, lambda: space.load(base))


class TakesAFile(Norms):
    """The seed is in a file of the user's."""

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        assert context.inputs.artifact is not None
        return Prepared(context.artifacts.put(Path(context.inputs.artifact).read_bytes()))


class BuildsFromMemory(Norms):
    kept = 0

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        self.kept = context.seed
        return super().prepare(loaded, context)

    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return super().built(loaded, self.kept or id(self) % 2**32, distribution)


class DrawsItsStart(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        with torch.random.fork_rng():
            return super().built(loaded, int(torch.randint(2**31, ())), distribution)


class ReadsWhatIsThere(Norms):
    """A file of an earlier start with other settings, too."""

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        kept = context.folder / "kept"
        if not kept.exists():
            kept.write_bytes(context.seed.to_bytes(4, "little"))
        return Prepared(context.artifacts.put(kept.read_bytes()))


class PreparesAnew(Norms):
    calls = 0

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        PreparesAnew.calls += 1
        return Prepared(context.artifacts.put((context.seed + self.calls).to_bytes(4, "little")))


class TrainsWhilePreparing(Norms):
    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        next(loaded.model.parameters()).data.mul_(1.5)
        return super().prepare(loaded, context)


class ForgetsToReset(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return replace(super().built(loaded, seed, distribution), reset=lambda: None)


class ResetsToWhatItLoaded(Norms):
    """Steps in place of a copy."""

    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        built = super().built(loaded, seed, distribution)
        return replace(built, reset=lambda: built.space.step(-0.25, 3))


class TakesAnything(Norms):
    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        return self.built(loaded, int.from_bytes(artifact.read()[:4], "little"), distribution)


class RaisesWhatPythonRaises(Norms):
    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        return self.built(loaded, sum(artifact.read()[i] << 8 * i for i in range(4)), distribution)


class SpoilsTheModelFirst(Norms):
    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        if artifact.size != 4:
            next(loaded.model.parameters()).data.zero_()
        return super().build(loaded, artifact, distribution=distribution)


class SavesNothing(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return replace(super().built(loaded, seed, distribution), save=Path.mkdir)


class IgnoresTheLaw(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return super().built(loaded, seed, Distribution.gaussian)


class GivesADoubleGradient(Norms):
    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        return replace(super().prepare(loaded, context), gradient=torch.ones(3, dtype=torch.float64))


def test_without_a_fault_it_passes() -> None:
    check_trainer(Norms, lambda: tiny_loaded("opt"))


def test_a_trainer_gets_the_files_that_the_user_gave(tmp_path: Path) -> None:
    file = tmp_path / "seed"
    file.write_bytes((5).to_bytes(4, "little"))

    check_trainer(TakesAFile, inputs=InputsConfig(artifact=str(file)))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (BuildsFromMemory, r"two peers must build the same values from one artifact"),
        (DrawsItsStart, r"two peers must build the same values from one artifact"),
        (ReadsWhatIsThere, r"must read no file of its folder where context\.resumed is false"),
        (PreparesAnew, r"prepare called again in its folder must give the same artifact"),
        (TrainsWhilePreparing, r"prepare must leave the model as it was: 1 of \d+ tensors differ"),
        (GivesADoubleGradient, r"prepare's gradient must be float32 \[160\] on the CPU, got torch\.float64 \[3\]"),
        (ForgetsToReset, r"reset must bring the base values back"),
        (ResetsToWhatItLoaded, r"reset must bring the base values back"),
        (TakesAnything, r"build must refuse an artifact that is empty by a FedzoError, but it took it"),
        (RaisesWhatPythonRaises, r"refuse an artifact that is empty by a FedzoError.*it raised IndexError"),
        (SpoilsTheModelFirst, r"after an artifact that is empty was refused, the model: 1 of \d+ tensors differ"),
        (SavesNothing, r"save must write what was trained into the folder it is given"),
        (IgnoresTheLaw, r"distribution must be the law that the space was made with"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_trainers(make: Callable[[], Norms], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_trainer(make)
