"""What every estimator must do: g on linear losses, its mean, its error in eps, forwards, and dropped probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fedzo.testing.conformance.bits import global_generators, must
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.estimator import Estimator, Projection
from fedzo.zo.spaces.base import Space

Numbers = npt.NDArray[np.float64]
Place = tuple[float, int] | None
"""Where a loss is asked for: within probe(scale, key), or at theta."""
OnLinear = Callable[[Numbers], Numbers] | None
"""The g of a step on a linear loss, from the slopes of its probes."""

_GRADIENT = np.array([0.5, -2.0, 4.0, 1.0, -0.25])
_N = _GRADIENT.size
_THETA = np.linspace(-0.5, 0.7, _N)
_EPS = 0.25
_WIDTHS = (0.5, 0.25, 0.125)
_TRIALS = 1000


def check_estimator(
    make: Callable[[float], Estimator],
    *,
    on_linear: OnLinear = lambda slopes: slopes,
    share: float | None = 1.0,
    order: int | None = None,
    num_probes: int = 4,
) -> None:
    """Check that an estimator keeps the contract of ``fedzo.zo.estimator.Estimator``, for both laws of z.

    - On a linear loss g is what ``on_linear`` says, up to the rounding to float32.
    - Over 1,000 steps on a quadratic loss the mean of g z is ``share`` times the gradient, within five standard errors.
    - The error of g falls with eps as ``order`` says.
    - The loss is asked for exactly ``forwards_per_step`` times, when and where does not depend on any loss, and
      nothing of the space is used but ``probe``, ``size`` and ``distribution``. No probe is entered within another.
    - A loss that is not finite drops its probe alone; the others' g is as if there had not been the dropped one.
    - The same losses give the same answer every time; no bit of theta moves, also where the loss raises.

    Args:
        make: Makes the estimator for an eps, for example ``lambda eps: ESTIMATORS.build(TwoPointConfig(eps=eps))``.
        on_linear: The g of a step on a linear loss, float64 [P], from the slopes <gradient, z> of its probes, float64
            [P]. By default the slopes themselves; None where g follows from more than them, such as the directions.
        share: Share of the gradient that the mean of g z is; None where the estimator does not promise any.
        order: k where the error of g is O(eps^k); None where that is not to be checked, as without ``on_linear``.
        num_probes: P, at least 3; more where a step needs more.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    must(num_probes >= 3, f"num_probes must be >= 3 to see that one dropped probe leaves the others, got {num_probes}")
    must(order is None or on_linear is not None, "order must be None without on_linear, which tells the exact g")
    for law in Distribution:
        with global_generators(1):
            _check_linear(make(_EPS), on_linear, law, num_probes)
        with global_generators(2):
            _check_bad_losses(make(_EPS), on_linear, law, num_probes)
            if share is not None:
                _check_mean(make(_EPS), share, law, num_probes)
        if order is not None and on_linear is not None:
            _check_order(make, on_linear, order, law, num_probes)


class _Probed:
    """Theta in float64, which a probe moves: what an estimator may use of a space, and no more."""

    def __init__(self, law: Distribution) -> None:
        self.size, self.distribution = _N, law
        self.theta = _THETA
        self.place: Place = None

    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        must(self.place is None, "a probe must be left before the next is entered: they do not add up")
        self.theta, self.place = _THETA + scale * _direction(key, self.distribution), (scale, key)
        try:
            yield
        finally:
            self.theta, self.place = _THETA, None

    def __getattr__(self, name: str) -> Any:
        parts = "probe, size and distribution"
        raise AssertionError(f"an estimator must use nothing of the space but {parts}, it asked for {name!r}")


@cache
def _direction(key: int, law: Distribution) -> Numbers:
    return direction(key, _N, distribution=law).astype(np.float64)


def _slopes(keys: Sequence[int], law: Distribution) -> Numbers:
    return np.array([_direction(key, law) @ _GRADIENT for key in keys])


def _linear(theta: Numbers) -> float:
    return 3.0 + float(theta @ _GRADIENT)


def _estimate(
    estimator: Estimator, law: Distribution, loss: Callable[[Numbers], float], keys: Sequence[int], *, bad: Any = ()
) -> tuple[list[Projection], list[Place]]:
    """A step's projections, and where each loss was asked for; ``bad`` = (call, value) stands for one loss."""
    space, places = _Probed(law), list[Place]()

    def asked() -> float:
        places.append(space.place)
        return float(bad[1]) if bad and len(places) == bad[0] + 1 else loss(space.theta)

    answer = estimator.estimate(cast(Space, space), asked, keys)
    must(space.place is None and space.theta is _THETA, "when estimate returns every probe must be closed")
    must(len(answer) == len(keys), f"estimate must give one projection a key, {len(keys)} in all, got {len(answer)}")
    for p in answer:
        must(
            type(p.g) is np.float32 and bool(np.isfinite(p.g)), f"g must be a finite np.float32, got {type(p.g)} {p.g}"
        )
        must(
            (p.g == 0 and math.isnan(p.loss)) if p.dropped else math.isfinite(p.loss),
            f"g must be 0 and the loss nan where a probe is dropped, and the loss finite elsewhere, got {p}",
        )
    calls = estimator.forwards_per_step(len(keys))
    must(
        len(places) == calls,
        f"the loss must be asked for forwards_per_step({len(keys)}) = {calls} times, it was asked for {len(places)}",
    )
    return answer, places


def _check_linear(estimator: Estimator, on_linear: OnLinear, law: Distribution, num_probes: int) -> None:
    keys = range(7, 7 + num_probes)
    answer, _ = _estimate(estimator, law, _linear, keys)
    _must_be_g(answer, on_linear, _slopes(keys, law), f"on a linear loss ({law} directions)")
    _estimate(estimator, law, _linear, keys[:1])
    again, _ = _estimate(estimator, law, _linear, keys)
    must(again == answer, f"the same losses must give the same answer, got {answer}, then {again}")
    huge, _ = _estimate(estimator, law, lambda theta: 1e300 * _linear(theta), keys)
    must(len(huge) == num_probes, "losses whose g is beyond float32 must be answered")
    space = _Probed(law)

    def raises() -> float:
        raise _BrokenOff

    try:
        estimator.estimate(cast(Space, space), raises, keys)
    except _BrokenOff:
        must(space.place is None, "where the loss raises, every probe must be closed")
    else:
        raise AssertionError("an exception of the loss must reach the caller; estimate kept it")


def _check_bad_losses(estimator: Estimator, on_linear: OnLinear, law: Distribution, num_probes: int) -> None:
    keys = range(20, 20 + num_probes)
    _, places = _estimate(estimator, law, _linear, keys)
    for call, place in enumerate(places):
        for value in (math.nan, math.inf, -math.inf):
            answer, seen = _estimate(estimator, law, _linear, keys, bad=(call, value))
            must(
                seen == places,
                f"when and where the loss is asked for must not depend on losses: {places}, but after {value} {seen}",
            )
            if place is None:  # the loss at theta, which all probes may need
                continue
            left = [key for key in keys if key != place[1]]
            dropped = [key for key, p in zip(keys, answer, strict=True) if p.dropped]
            must(
                dropped == [place[1]],
                f"a loss of {value} in the probe of key {place[1]} must drop that probe alone, dropped: {dropped}",
            )
            rest = [p for p in answer if not p.dropped]
            _must_be_g(rest, on_linear, _slopes(left, law), f"where one loss was {value}, of the other probes")
    answer, _ = _estimate(estimator, law, lambda theta: math.nan, keys)
    must(all(p.dropped for p in answer), f"where every loss is nan every probe must be dropped, got {answer}")


def _check_mean(estimator: Estimator, share: float, law: Distribution, num_probes: int) -> None:
    """A quadratic with a full Hessian, which is GRADIENT's at theta."""
    root = np.sin(np.arange(_N * _N)).reshape(_N, _N)
    hessian = root @ root.T

    def quadratic(theta: Numbers) -> float:
        away = theta - _THETA
        return float(_GRADIENT @ away + away @ hessian @ away / 2)

    steps = np.zeros((_TRIALS, _N))
    for trial in range(_TRIALS):
        keys = range(trial * num_probes, (trial + 1) * num_probes)
        answer, _ = _estimate(estimator, law, quadratic, keys)
        for key, p in zip(keys, answer, strict=True):
            steps[trial] += float(p.g) * _direction(key, law) / num_probes
    mean, errors = steps.mean(axis=0), steps.std(axis=0, ddof=1) / math.sqrt(_TRIALS)
    wanted = share * _GRADIENT
    spread = "its standard errors must be below a tenth of the gradient's norm, or the mean of g z shows nothing"
    must(float(errors.max()) < 0.1 * float(np.linalg.norm(wanted)), f"{spread}; they are {errors}")
    must(
        bool((np.abs(mean - wanted) <= 5 * errors).all()),
        f"the mean of g z over {_TRIALS} steps ({law} directions) must be {share} times the gradient, {wanted}, within "
        f"five standard errors ({errors}), got {mean}",
    )


def _check_order(
    make: Callable[[float], Estimator],
    on_linear: Callable[[Numbers], Numbers],
    order: int,
    law: Distribution,
    num_probes: int,
) -> None:
    """The loss is a sum of exponentials of mixed coordinates, whose derivatives of all orders are about as large."""
    mix = 0.6 * np.cos(np.arange(_N * _N)).reshape(_N, _N)
    keys = range(num_probes)
    exact = on_linear(np.array([np.exp(mix @ _THETA) @ mix @ _direction(key, law) for key in keys]))
    errors = []
    for eps in _WIDTHS:
        answer, _ = _estimate(make(eps), law, lambda theta: float(np.exp(mix @ theta).sum()), keys)
        errors.append(float(np.linalg.norm(np.array([p.g for p in answer]) - exact)))
    slope = float(np.polyfit(np.log(_WIDTHS), np.log(np.maximum(errors, 1e-30)), 1)[0])
    must(
        abs(slope - order) < 0.4,
        f"the error of g must fall as eps^{order}, it falls as eps^{slope:.2f}: {errors} at eps = {list(_WIDTHS)}",
    )


def _must_be_g(answer: Sequence[Projection], on_linear: OnLinear, slopes: Numbers, where: str) -> None:
    must(isinstance(answer, list), f"estimate must give a list, got a {type(answer).__name__}")
    if on_linear is None:
        return
    found, wanted = np.array([float(p.g) for p in answer]), on_linear(slopes)
    must(
        bool(np.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(np.abs(wanted).max()))),
        f"{where}, g must be {wanted.tolist()}, got {found.tolist()}",
    )


class _BrokenOff(Exception):
    """Raised by a loss."""
