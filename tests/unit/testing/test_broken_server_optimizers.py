"""The check of server optimizers refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.testing import check_server_optimizer
from fedzo.zo.log import ScalarRecord, VectorRecord
from fedzo.zo.server_optimizer import ServerOptimizer, Sgd, round_direction, step_along
from fedzo.zo.server_optimizer.control_variates import Scaffold
from fedzo.zo.spaces.base import Space, Values
from fedzo.zo.steps import Drift


class Plain:
    """SGD by one sum of a round."""

    moments = 0

    def num_moments(self, num_clients: int) -> int:
        return self.moments

    def u(self, space: Space, record: ScalarRecord, run_seed: int) -> Values:
        return round_direction(space, record, run_seed=run_seed)

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        step_along(space, self.u(space, record, run_seed), record)


class Uphill(Plain):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        step_along(space, -self.u(space, record, run_seed), record)


class KeepsMomentumToItself(Plain):
    def __init__(self) -> None:
        self.m: Any = 0

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        self.m = np.float32(0.5) * self.m + self.u(space, record, run_seed)
        step_along(space, self.m, record)


class RemembersItsFirstRoundOnly(Plain):
    """The same for each new rule, but not after a restart."""

    def __init__(self) -> None:
        self.first: int | None = None

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        self.first = record.round if self.first is None else self.first
        step_along(space, self.u(space, record, run_seed) * np.float32(1 + record.round - self.first), record)


class AsksForTooFewMoments(Plain):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        moments[0] += self.u(space, record, run_seed)
        step_along(space, moments[0], record)


class ReplacesItsMoments(Plain):
    """So they are lost after each round: a rule in one piece and by rounds agree, but its formula does not."""

    moments = 1

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        moments = moments * np.float32(0.5) + self.u(space, record, run_seed)
        step_along(space, moments[0], record)


class Float64(Plain):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        space.load(space.values() - record.lr * self.u(space, record, run_seed).astype(np.float64))


class WideSteps(Sgd):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        super().apply(space, moments, record, run_seed=run_seed)
        space.scale_by(0.999)


class ScalesTheRecord(Plain):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        record.coefficients[:] *= np.float32(0.5)
        super().apply(space, moments, record, run_seed=run_seed)


class AddsNoise(Plain):
    def u(self, space: Space, record: ScalarRecord, run_seed: int) -> Values:
        with torch.random.fork_rng():
            return super().u(space, record, run_seed) * torch.rand(space.size).numpy()


class DrawsFromPython(Plain):
    def u(self, space: Space, record: ScalarRecord, run_seed: int) -> Values:
        random.random()
        return super().u(space, record, run_seed)


class Normalises(Plain):
    def u(self, space: Space, record: ScalarRecord, run_seed: int) -> Values:
        u = super().u(space, record, run_seed)
        with np.errstate(all="ignore"):
            return u / np.sqrt((u * u).sum()) if u.any() else u


class MovesAtLr0(Plain):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        space.load(space.values() - np.float32(record.lr + 2**-10) * self.u(space, record, run_seed))


class Decays(Plain):
    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        space.scale_by(float(np.float32(1 - record.lr / 4)))
        super().apply(space, moments, record, run_seed=run_seed)


class DriftsByTurns(Scaffold):
    """A client's correction depends on who was asked before."""

    def drift(self, start: Values, moments: Values, client: int, *, lr: float) -> Drift:
        moments[0] += np.float32(client)
        return super().drift(start, moments, client, lr=lr)


def test_without_a_fault_it_passes() -> None:
    check_server_optimizer(Plain)


class DisplacesUphill(Sgd):
    def displace(self, space: Space, moments: Values, record: VectorRecord) -> None:
        space.load(space.values() + record.read())


class DisplacesByAMemoryOfItsOwn(Sgd):
    def displace(self, space: Space, moments: Values, record: VectorRecord) -> None:
        MEMORY[id(self)] = MEMORY.get(id(self), np.float32(0)) + record.read()
        space.load(space.values() - MEMORY[id(self)])


class DisplacesInFloat64(Sgd):
    def displace(self, space: Space, moments: Values, record: VectorRecord) -> None:
        space.load(space.values() - record.read().astype(np.float64))


class DisplacesTheRecord(Sgd):
    def displace(self, space: Space, moments: Values, record: VectorRecord) -> None:
        change = record.read()
        change *= np.float32(0.5)
        space.load(space.values() - change)


MEMORY: dict[int, Any] = {}


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (DisplacesUphill, r"displace must lead against the vector"),
        (DisplacesByAMemoryOfItsOwn, r"displace by a new rule each round must lead to the same theta"),
        (DisplacesInFloat64, r"a rule must load float32 \[5\], got float64"),
        (DisplacesTheRecord, r"displace must not change the vector of the record"),
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
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_server_optimizers(make: Callable[[], ServerOptimizer], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_server_optimizer(make)


def test_a_rule_that_is_not_its_formula() -> None:
    def heavy_ball(theta: np.ndarray, rounds: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
        m = np.zeros_like(theta)
        for lr, u in rounds:
            m = m / 2 + u
            theta = theta - lr * m
        return theta

    with pytest.raises(AssertionError, match=r"theta after the log must be the formula's \[.*\] within 3e-6, got"):
        check_server_optimizer(ReplacesItsMoments, formula=heavy_ball)
