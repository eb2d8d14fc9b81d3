"""The checks refuse broken plugins, each with the rule that it breaks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.data.files import Row
from fedzo.errors import ConfigError
from fedzo.models.load import LoadedModel
from fedzo.testing import check_estimator, check_server_optimizer, check_space, check_stage, check_trainer
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.trainers import Built, Prepared, Workplace
from fedzo.zo.config import Baseline, Distribution
from fedzo.zo.control_variates import Scaffold
from fedzo.zo.directions import direction
from fedzo.zo.estimator import Estimator, LossFn, OneSided, Projection, TwoPoint, projections
from fedzo.zo.log import Drift, RoundRecord
from fedzo.zo.server_optimizer import ServerOptimizer, Sgd, round_direction, step_along
from fedzo.zo.spaces.base import Space, Values
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace


def name_of(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else ""


def refused(message: str) -> Any:
    return pytest.raises(AssertionError, match=message)


def test_what_is_broken_below_is_right_without_its_fault() -> None:
    check_space(Every, small, outputs=small_outputs)
    check_estimator(Faulty)
    check_server_optimizer(Plain)
    check_trainer(Norms, lambda: tiny_loaded("opt"))
    check_stage(Upper, ROWS)


# --- spaces -----------------------------------------------------------------------------------------------------------


class Every(MaskedSpace):
    """All weights, by a mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, {name: torch.arange(p.numel()) for name, p in model.named_parameters()})


class Drifts(Every):
    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        super().step(-scale, key)
        try:
            yield
        finally:
            super().step(scale, key)


class ForgetsOnError(Every):
    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        self._write_moved(scale, key)
        yield
        self._write(self._master)


class KeepsErrors(Every):
    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        try:
            with super().probe(scale, key):
                yield
        except Exception:
            pass


class ProbesTheOtherWay(Every):
    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        with super().probe(-scale, key):
            yield


class ProbesNothing(Every):
    def _write_moved(self, scale: float, key: int) -> None:
        pass


class StepsUphill(Every):
    def step(self, s: float, key: int) -> None:
        super().step(-s, key)


class RoundsOnce(Every):
    def step(self, s: float, key: int) -> None:
        z = direction(key, self.size).astype(np.float64)
        self.load((self.values().astype(np.float64) - s * z).astype(np.float32))


class StepsInTheMasterOnly(Every):
    def step(self, s: float, key: int) -> None:
        self._master.sub_(torch.from_numpy(direction(key, self.size)) * torch.tensor(s, dtype=torch.float32))


class HasNoMaster(Every):
    def step(self, s: float, key: int) -> None:
        super().step(s, key)
        self.load(torch.from_numpy(self.values()).to(torch.bfloat16).float().numpy())


class DividesToScale(Every):
    def scale_by(self, factor: float) -> None:
        self.load(self.values() / np.float32(1 / factor))


class ReturnsItsMaster(Every):
    def values(self) -> Values:
        return self._master.numpy()


class LoadsWithoutACopy(Every):
    def load(self, values: Values) -> None:
        self._master = torch.from_numpy(values)
        self._write(self._master)


class LoadsTheMasterOnly(Every):
    def load(self, values: Values) -> None:
        self._master.copy_(torch.from_numpy(values))


class MarksByReference(Every):
    def mark(self) -> None:
        self._marked = self._master


class ChecksItsSize(Every):
    def check(self) -> int:
        return self.size


class DigestsASum(Every):
    def digest(self) -> str:
        return str(round(float(self._master.sum()), -3))


class DrawsFromTorch(Every):
    def step(self, s: float, key: int) -> None:
        torch.rand(1)
        super().step(s, key)


class StartsAtRandom(Every):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        with torch.random.fork_rng():
            self.load(torch.rand(self.size).numpy())


class OtherLaw(Every):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.distribution = Distribution.rademacher


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8, bias=True), nn.Linear(8, 3)).requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.from_numpy(direction(number, parameter.numel())).view(parameter.shape))
    return model


def small_outputs(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.linspace(-1, 1, 12).view(2, 6))


@pytest.mark.parametrize(
    ("space", "rule"),
    [
        (Drifts, r"after probe\(0\.0625, key\) every bit must be what it was: values\(\): \d+ of 83 values differ"),
        (ForgetsOnError, r"after a probe whose body raised, every bit must be what it was"),
        (KeepsErrors, r"an exception in the body of a probe must reach the caller"),
        (ProbesTheOtherWay, r"within probe\(0\.0625, key\) the model must compute what it computes after load"),
        (ProbesNothing, r"within probe\(0\.0625, key\).*from those at theta: 0\.0"),
        (StepsUphill, r"step\(.*\) must be theta - s \* z with one rounded product and one rounded difference"),
        (RoundsOnce, r"step\(.*\) must be theta - s \* z with one rounded product and one rounded difference"),
        (HasNoMaster, r"after step\(0, key\) every bit must be what it was"),
        (StepsInTheMasterOnly, r"steps and a load of what they lead to must be the same: the model"),
        (DividesToScale, r"scale_by\(.*\) must be factor \* theta with one rounded product"),
        (ReturnsItsMaster, r"values\(\) must return a copy"),
        (LoadsWithoutACopy, r"load\(values\) must bring every bit back and copy what it is given"),
        (LoadsTheMasterOnly, r"the model must compute what it computes after load"),
        (MarksByReference, r"after mark, moves and rewind every bit must be what it was"),
        (ChecksItsSize, r"check\(\) must change after steps, it is still 83"),
        (DigestsASum, r"digest\(\) must change after steps"),
        (DrawsFromTorch, r"global generators must be left alone, but torch's was used"),
        (StartsAtRandom, r"two spaces made on the same model must be the same"),
        (OtherLaw, r"distribution must be the law that the space was made with"),
    ],
    ids=name_of,
)
def test_broken_spaces(space: Callable[[nn.Module], Space], rule: str) -> None:
    with refused(rule):
        check_space(space, small, outputs=small_outputs)


def test_a_space_without_a_master_must_say_in_which_dtype_it_holds_its_values() -> None:
    def half() -> nn.Module:
        return small().to(torch.bfloat16)

    def outputs(model: nn.Module) -> torch.Tensor:
        return model(torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(2, 6))

    check_space(FullSpace, half, outputs=outputs, held_in=torch.bfloat16)
    with refused(r"one rounded difference in float32, held in torch\.float32"):
        check_space(FullSpace, half, outputs=outputs)


# --- estimators -------------------------------------------------------------------------------------------------------


@dataclass
class Faulty:
    """A central difference that a fault gets hold of."""

    eps: float
    past: list[float] = field(default_factory=list)

    def forwards_per_step(self, num_probes: int) -> int:
        return 2 * num_probes

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        return TwoPoint(self.eps).estimate(space, loss_fn, keys)


def scaled(answer: list[Projection], factor: float) -> list[Projection]:
    return [replace(p, g=np.float32(p.g * factor)) for p in answer]


class WrongSign(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        return scaled(super().estimate(space, loss_fn, keys), -1)


class ForgetsTheTwo(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        return scaled(super().estimate(space, loss_fn, keys), 2)


class AsksOnceMore(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        loss_fn()
        return super().estimate(space, loss_fn, keys)


class StopsAtABadLoss(Faulty):
    """Fills up with calls at theta, so that their number is right."""

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        plus, minus = np.full(len(keys), np.nan), np.full(len(keys), np.nan)
        for p, key in enumerate(keys):
            with space.probe(self.eps, key):
                plus[p] = loss_fn()
            with space.probe(-self.eps if math.isfinite(plus[p]) else 0.0, key):
                minus[p] = loss_fn()
        return projections((plus - minus) / (2 * self.eps), (plus + minus) / 2)


class DropsAll(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        answer = super().estimate(space, loss_fn, keys)
        dropped = Projection(g=np.float32(0), loss=math.nan, dropped=True)
        return [dropped] * len(answer) if any(p.dropped for p in answer) else answer


class PassesNanOn(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        answer = super().estimate(space, loss_fn, keys)
        return [replace(p, g=np.float32(np.nan), dropped=False) if p.dropped else p for p in answer]


class Remembers(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        self.past.append(0.5)
        return scaled(super().estimate(space, loss_fn, keys), 1.0 if len(self.past) < 3 else 0.5)


class Reverses(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        return super().estimate(space, loss_fn, keys)[::-1]


class Steps(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        space.step(self.eps, keys[0])
        return super().estimate(space, loss_fn, keys)


class LeavesAProbeOpen(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        answer = super().estimate(space, loss_fn, keys)
        self.open = space.probe(self.eps, keys[0])
        self.open.__enter__()
        return answer


class ClosesByHand(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        losses = np.empty((2, len(keys)))
        for p, key in enumerate(keys):
            for side, scale in enumerate((self.eps, -self.eps)):
                self.open = space.probe(scale, key)
                self.open.__enter__()
                losses[side, p] = loss_fn()
                self.open.__exit__(None, None, None)
        with np.errstate(all="ignore"):
            return projections((losses[0] - losses[1]) / (2 * self.eps), losses.mean(axis=0))


class DrawsFromNumpy(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        np.random.random()
        return super().estimate(space, loss_fn, keys)


class WideScalars(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        return [replace(p, g=float(p.g)) for p in super().estimate(space, loss_fn, keys)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (WrongSign, r"on a linear loss \(gaussian directions\), g must be"),
        (ForgetsTheTwo, r"on a linear loss \(gaussian directions\), g must be"),
        (Reverses, r"on a linear loss \(gaussian directions\), g must be"),
        (AsksOnceMore, r"the loss must be asked for forwards_per_step\(4\) = 8 times, it was asked for 9"),
        (StopsAtABadLoss, r"when and where the loss is asked for must not depend on losses"),
        (DropsAll, r"must drop that probe alone, dropped: \[20, 21, 22, 23\]"),
        (PassesNanOn, r"g must be a finite np\.float32"),
        (WideScalars, r"g must be a finite np\.float32, got <class 'float'>"),
        (Remembers, r"the same losses must give the same answer"),
        (Steps, r"must use nothing of the space but probe, it asked for 'step'"),
        (LeavesAProbeOpen, r"when estimate returns every probe must be closed"),
        (ClosesByHand, r"where the loss raises, every probe must be closed"),
        (DrawsFromNumpy, r"global generators must be left alone, but numpy's was used"),
    ],
    ids=name_of,
)
def test_broken_estimators(make: Callable[[float], Estimator], rule: str) -> None:
    with refused(rule):
        check_estimator(make)


def test_estimators_that_promise_too_much() -> None:
    def mean(eps: float) -> Estimator:
        return OneSided(eps, Baseline.mean)

    def less_the_mean(slopes: np.ndarray) -> np.ndarray:
        return slopes - slopes.mean()

    with refused(r"on a linear loss \(gaussian directions\), g must be"):
        check_estimator(mean)
    with refused(r"the mean of g z over 1000 steps \(gaussian directions\) must be 1\.0 times the gradient"):
        check_estimator(mean, on_linear=less_the_mean)
    with refused(r"the error of g must fall as eps\^2, it falls as eps\^(1|0\.9)"):
        check_estimator(lambda eps: OneSided(eps, Baseline.center), order=2)
    with refused(r"its standard errors must be below a tenth of the gradient's norm"):
        check_estimator(mean, on_linear=less_the_mean, share=1e-3)


# --- server optimizers ------------------------------------------------------------------------------------------------


class Plain:
    """SGD by one sum of a round."""

    moments = 0

    def num_moments(self, num_clients: int) -> int:
        return self.moments

    def u(self, space: Space, record: RoundRecord, run_seed: int) -> Values:
        return round_direction(space, record, run_seed=run_seed)

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        step_along(space, self.u(space, record, run_seed), record)


class Uphill(Plain):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        step_along(space, -self.u(space, record, run_seed), record)


class KeepsMomentumToItself(Plain):
    def __init__(self) -> None:
        self.m: Any = 0

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        self.m = np.float32(0.5) * self.m + self.u(space, record, run_seed)
        step_along(space, self.m, record)


class RemembersItsFirstRoundOnly(Plain):
    """The same for each new rule, but not after a restart."""

    def __init__(self) -> None:
        self.first: int | None = None

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        self.first = record.round if self.first is None else self.first
        step_along(space, self.u(space, record, run_seed) * np.float32(1 + record.round - self.first), record)


class AsksForTooFewMoments(Plain):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        moments[0] += self.u(space, record, run_seed)
        step_along(space, moments[0], record)


class ReplacesItsMoments(Plain):
    """So they are lost after each round: a rule in one piece and by rounds agree, but its formula does not."""

    moments = 1

    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        moments = moments * np.float32(0.5) + self.u(space, record, run_seed)
        step_along(space, moments[0], record)


class Float64(Plain):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        space.load(space.values() - record.lr * self.u(space, record, run_seed).astype(np.float64))


class WideSteps(Sgd):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        super().apply(space, moments, record, run_seed=run_seed)
        space.scale_by(0.999)


class ScalesTheRecord(Plain):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        record.coefficients[:] *= np.float32(0.5)
        super().apply(space, moments, record, run_seed=run_seed)


class AddsNoise(Plain):
    def u(self, space: Space, record: RoundRecord, run_seed: int) -> Values:
        with torch.random.fork_rng():
            return super().u(space, record, run_seed) * torch.rand(space.size).numpy()


class DrawsFromPython(Plain):
    def u(self, space: Space, record: RoundRecord, run_seed: int) -> Values:
        random.random()
        return super().u(space, record, run_seed)


class Normalises(Plain):
    def u(self, space: Space, record: RoundRecord, run_seed: int) -> Values:
        u = super().u(space, record, run_seed)
        with np.errstate(all="ignore"):
            return u / np.sqrt((u * u).sum()) if u.any() else u


class MovesAtLr0(Plain):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        space.load(space.values() - np.float32(record.lr + 2**-10) * self.u(space, record, run_seed))


class Decays(Plain):
    def apply(self, space: Space, moments: Values, record: RoundRecord, *, run_seed: int) -> None:
        space.scale_by(float(np.float32(1 - record.lr / 4)))
        super().apply(space, moments, record, run_seed=run_seed)


class DriftsByTurns(Scaffold):
    """A client's correction depends on who was asked before."""

    def drift(self, start: Values, moments: Values, client: int) -> Drift:
        moments[0] += np.float32(client)
        return super().drift(start, moments, client)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (Uphill, r"the first step must lead against u = 1\.0 z"),
        (KeepsMomentumToItself, r"theta must be a function of the log, but replayed by a rule that has played before"),
        (RemembersItsFirstRoundOnly, r"must be a function of the log, but "),
        (AsksForTooFewMoments, r"must do with the num_moments\(3\) = 0 rows of moments that it asks for"),
        (Float64, r"a rule must load float32 \[5\], got float64"),
        (WideSteps, r"scale_by\(factor\) must get a float32 number, got 0\.999"),
        (ScalesTheRecord, r"apply must not change the record; it changed that of round 0"),
        (AddsNoise, r"must be a function of the log, but "),
        (DrawsFromPython, r"global generators must be left alone, but random's was used"),
        (Normalises, r"must not lead to nan or infinity"),
        (MovesAtLr0, r"a round with lr = 0 must leave theta"),
        (Decays, r"a first round whose scalars are all 0 must leave theta"),
        (DriftsByTurns, r"drift must change neither theta nor the moments"),
    ],
    ids=name_of,
)
def test_broken_server_optimizers(make: Callable[[], ServerOptimizer], rule: str) -> None:
    with refused(rule):
        check_server_optimizer(make)


def test_a_rule_that_is_not_its_formula() -> None:
    def heavy_ball(theta: np.ndarray, rounds: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
        m = np.zeros_like(theta)
        for lr, u in rounds:
            m = m / 2 + u
            theta = theta - lr * m
        return theta

    with refused(r"theta after the log must be the formula's \[.*\] within 3e-6, got"):
        check_server_optimizer(ReplacesItsMoments, formula=heavy_ball)


# --- trainers ---------------------------------------------------------------------------------------------------------


class Norms:
    """The one-dimensional weights, from a seed of 4 bytes."""

    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        return Prepared(workplace.seed.to_bytes(4, "little"))

    def build(self, loaded: LoadedModel, artifact: bytes, *, distribution: Distribution) -> Built:
        if len(artifact) != 4:
            raise ConfigError(f"the artifact must be a seed of 4 bytes, got {len(artifact)}")
        return self.built(loaded, int.from_bytes(artifact, "little"), distribution)

    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        weights = [weight for weight in loaded.model.parameters() if weight.dim() == 1]
        space = DenseSpace(weights, distribution=distribution)
        base = direction(seed, space.size)
        space.load(base)
        return Built(space, lambda: space.load(base))


class BuildsFromMemory(Norms):
    kept = 0

    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        self.kept = workplace.seed
        return super().prepare(loaded, workplace)

    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return super().built(loaded, self.kept or id(self) % 2**32, distribution)


class DrawsItsStart(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        with torch.random.fork_rng():
            return super().built(loaded, int(torch.randint(2**31, ())), distribution)


class PreparesAnew(Norms):
    calls = 0

    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        PreparesAnew.calls += 1
        return Prepared((workplace.seed + self.calls).to_bytes(4, "little"))


class TrainsWhilePreparing(Norms):
    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        next(loaded.model.parameters()).data.mul_(1.5)
        return super().prepare(loaded, workplace)


class ForgetsToReset(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return replace(super().built(loaded, seed, distribution), reset=lambda: None)


class ResetsToWhatItLoaded(Norms):
    """Steps in place of a copy."""

    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        built = super().built(loaded, seed, distribution)
        return replace(built, reset=lambda: built.space.step(-0.25, 3))


class TakesAnything(Norms):
    def build(self, loaded: LoadedModel, artifact: bytes, *, distribution: Distribution) -> Built:
        return self.built(loaded, int.from_bytes(artifact[:4], "little"), distribution)


class RaisesWhatPythonRaises(Norms):
    def build(self, loaded: LoadedModel, artifact: bytes, *, distribution: Distribution) -> Built:
        return self.built(loaded, sum(artifact[i] << 8 * i for i in range(4)), distribution)


class SpoilsTheModelFirst(Norms):
    def build(self, loaded: LoadedModel, artifact: bytes, *, distribution: Distribution) -> Built:
        if len(artifact) != 4:
            next(loaded.model.parameters()).data.zero_()
        return super().build(loaded, artifact, distribution=distribution)


class SavesNothing(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return replace(super().built(loaded, seed, distribution), save=Path.mkdir)


class IgnoresTheLaw(Norms):
    def built(self, loaded: LoadedModel, seed: int, distribution: Distribution) -> Built:
        return super().built(loaded, seed, Distribution.gaussian)


class GivesADoubleGradient(Norms):
    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        return replace(super().prepare(loaded, workplace), gradient=torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (BuildsFromMemory, r"two peers must build the same values from one artifact"),
        (DrawsItsStart, r"two peers must build the same values from one artifact"),
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
    ids=name_of,
)
def test_broken_trainers(make: Callable[[], Norms], rule: str) -> None:
    with refused(rule):
        check_trainer(make)


# --- stages -----------------------------------------------------------------------------------------------------------

ROWS: list[Row] = [{"text": f"Review {i}", "label": i} for i in range(6)]


class Upper:
    """The text in capitals."""

    column: str | None = "text"

    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return [{**row, "text": self.text(row["text"], client)} for row in rows]

    def text(self, text: str, client: int) -> str:
        return text.upper()


class InPlace(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        for row in rows:
            row["text"] = row["text"].upper()
        return rows


class DropsARow(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return super().apply(rows, client=client)[1:]


class Sorts(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return sorted(super().apply(rows, client=client), key=lambda row: -row["label"])


class Relabels(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return [{**row, "label": 0} for row in super().apply(rows, client=client)]


class AddsAColumn(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return [{**row, "original": row["text"]} for row in super().apply(rows, client=client)]


class LosesTheText(Upper):
    def text(self, text: str, client: int) -> Any:
        return None


class CountsItsCalls(Upper):
    def __init__(self) -> None:
        self.calls = 0

    def text(self, text: str, client: int) -> str:
        self.calls += 1
        return f"{text} {self.calls}"


class KnowsClientsByTurn(Upper):
    """A client is what it was first asked as."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def text(self, text: str, client: int) -> str:
        return f"{text} of site {self.seen.setdefault(client, len(self.seen))}"


class Shuffles(Upper):
    def text(self, text: str, client: int) -> str:
        return "".join(random.sample(text, len(text)))


class NeedsRows(Upper):
    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        return super().apply(rows, client=client) if rows else [{"text": "", "label": 0}]


class OtherColumn(Upper):
    column = "prompt"


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (InPlace, r"apply must not change the rows that it is given"),
        (DropsARow, r"apply must give as many rows as it gets, 6, got 5"),
        (Sorts, r"apply must keep the order and change nothing but 'text'; row 0 differs in \['label'\]"),
        (Relabels, r"apply must keep the order and change nothing but 'text'; row 1 differs in \['label'\]"),
        (AddsAColumn, r"change nothing but 'text'; row 0 differs in \['original'\]"),
        (LosesTheText, r"apply must keep the type of 'text', str; row 0 got NoneType"),
        (
            CountsItsCalls,
            r"the result for the same rows of the same client must not depend on what the stage did before",
        ),
        (KnowsClientsByTurn, r"the result for the same rows of the same client of a new stage must be the same"),
        (Shuffles, r"must not depend on what the stage did before|global generators must be left alone"),
        (NeedsRows, r"no rows must give no rows"),
        (OtherColumn, r"change nothing but 'prompt'; row 0 differs in \['text'\]"),
    ],
    ids=name_of,
)
def test_broken_stages(make: Callable[[], Upper], rule: str) -> None:
    with refused(rule):
        check_stage(make, ROWS)
