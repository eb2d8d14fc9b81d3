"""The check of estimators refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedzo.testing import check_estimator
from fedzo.zo.estimator import Baseline, Estimator, LossFn, OneSided, Projection, TwoPoint, projections
from fedzo.zo.spaces.base import Space


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


class Walks(Faulty):
    """MeZO's walk, from one side to the other, which no space has: a probe within a probe is one from theta."""

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        losses = np.empty((2, len(keys)))
        for p, key in enumerate(keys):
            with space.probe(self.eps, key):
                losses[0, p] = loss_fn()
                with space.probe(-2 * self.eps, key):
                    losses[1, p] = loss_fn()
        with np.errstate(all="ignore"):
            return projections((losses[0] - losses[1]) / (2 * self.eps), losses.mean(axis=0))


class DrawsFromNumpy(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        np.random.random()
        return super().estimate(space, loss_fn, keys)


class WideScalars(Faulty):
    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        return [replace(p, g=float(p.g)) for p in super().estimate(space, loss_fn, keys)]  # type: ignore[arg-type]


def test_without_a_fault_it_passes() -> None:
    check_estimator(Faulty)


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
        (Steps, r"must use nothing of the space but probe, size and distribution, it asked for 'step'"),
        (LeavesAProbeOpen, r"when estimate returns every probe must be closed"),
        (ClosesByHand, r"where the loss raises, every probe must be closed"),
        (Walks, r"a probe must be left before the next is entered: they do not add up"),
        (DrawsFromNumpy, r"global generators must be left alone, but numpy's was used"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_estimators(make: Callable[[float], Estimator], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_estimator(make)


def test_estimators_that_promise_too_much() -> None:
    def mean(eps: float) -> Estimator:
        return OneSided(eps, Baseline.mean)

    def less_the_mean(slopes: np.ndarray) -> np.ndarray:
        return slopes - slopes.mean()

    with pytest.raises(AssertionError, match=r"on a linear loss \(gaussian directions\), g must be"):
        check_estimator(mean)
    with pytest.raises(AssertionError, match=r"the mean of g z over 1000 steps .* must be 1\.0 times the gradient"):
        check_estimator(mean, on_linear=less_the_mean)
    with pytest.raises(AssertionError, match=r"the error of g must fall as eps\^2, it falls as eps\^(1|0\.9)"):
        check_estimator(lambda eps: OneSided(eps, Baseline.center), order=2)
    with pytest.raises(AssertionError, match=r"its standard errors must be below a tenth of the gradient's norm"):
        check_estimator(mean, on_linear=less_the_mean, share=1e-3)
    with pytest.raises(AssertionError, match="order must be None without on_linear"):
        check_estimator(mean, on_linear=None, share=3 / 4, order=1)
