"""Hard choices held still during a step: both sides of a probe take the experts that the centre took.

A mixture-of-experts router takes the top k of its scores. A probe of size eps can flip that choice for a token; the
loss then jumps by an amount that does not shrink with eps, and a difference quotient divides the jump by eps. What
backpropagation computes is the derivative with the choice held still, and that is what is estimated here.

Torch function modes do it, as in ``fedzo.zo.perturb``: the indices of every ``topk`` and ``argmax`` are recorded, in
order, while the loss is evaluated at theta. While it is evaluated within a probe, each such call gives the values of
its own input at the recorded indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.overrides import TorchFunctionMode

from fedzo.errors import NumericsError
from fedzo.zo.config import Distribution
from fedzo.zo.estimator import ESTIMATORS, Estimator, LossFn, Projection, Still, ZerothOrderConfig
from fedzo.zo.spaces.base import Space

_SELECTORS = {torch.topk, torch.Tensor.topk, torch.argmax, torch.Tensor.argmax}


class Choice(NamedTuple):
    """One call that selected.

    Attributes:
        question: What was asked: name of the function, shape of its input, the other arguments.
        indices: The answer, int64.
    """

    question: tuple[Any, ...]
    indices: torch.Tensor


class Record(TorchFunctionMode):
    """Within the context every choice is made as ever, and appended to ``choices``."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` and remember what it selected."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _SELECTORS:
            indices = result if isinstance(result, torch.Tensor) else result.indices
            self.choices.append(Choice(_question(func, args, kwargs), indices.clone()))
        return result


class Replay(TorchFunctionMode):
    """Within ``active()`` every choice is the recorded one, whatever the scores say now.

    Raises:
        NumericsError: The calls are not those of the record, in number, order, shape or arguments.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        super().__init__()
        self._choices = choices
        self._used = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run a block of code under this mode; it must use the whole record."""
        with self:
            yield
        if self._used < len(self._choices):
            raise _differs(f"{len(self._choices)} of them", self._used)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or answer for it."""
        kwargs = kwargs or {}
        if func not in _SELECTORS:
            return func(*args, **kwargs)
        question = _question(func, args, kwargs)
        if self._used == len(self._choices):
            raise _differs(f"{len(self._choices)} of them", f"another: {question}")
        choice = self._choices[self._used]
        if question != choice.question:
            raise _differs(f"number {self._used} as {choice.question}", question)
        self._used += 1
        indices = choice.indices.clone()
        if question[0] == "argmax":
            return indices
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return torch.return_types.topk((torch.gather(_scores(args, kwargs), dim, indices), indices))


@dataclass(frozen=True, slots=True)
class Frozen:
    """An estimator whose probes make the choices of the centre.

    One forward more a step, at the centre, which makes the record. An estimator that asks for the loss at the centre
    itself is given that forward's, so it costs no more than before.
    """

    inner: Estimator

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        with Record() as record:
            center = loss_fn()
        watched = _Watched(space)

        def loss_of_the_same_choices() -> float:
            if not watched.probing:
                return center
            with Replay(record.choices).active():
                return loss_fn()

        return self.inner.estimate(cast(Space, watched), loss_of_the_same_choices, keys)

    def forwards_per_step(self, num_probes: int) -> int:
        calls: list[None] = []

        def counted() -> float:
            calls.append(None)
            return 0.0

        still = Still(64 + num_probes, Distribution.gaussian)  # enough for independent directions
        self.estimate(cast(Space, still), counted, range(num_probes))
        return len(calls)


class _Watched:
    """A space that knows whether it is being probed."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.size, self.distribution = space.size, space.distribution
        self.probing = False

    @contextmanager
    def probe(self, scale: float, key: int) -> Iterator[None]:
        with self._space.probe(scale, key):
            self.probing = True
            try:
                yield
            finally:
                self.probing = False


def build_estimator(config: ZerothOrderConfig) -> Estimator:
    """The estimator plugin of a configuration, frozen where it says so."""
    estimator = cast(Estimator, ESTIMATORS.build(config))
    return Frozen(estimator) if config.freeze_routing else estimator


def _scores(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return cast(torch.Tensor, args[0] if args else kwargs["input"])


def _question(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    named = tuple(sorted((name, value) for name, value in kwargs.items() if name != "input"))
    return (func.__name__, tuple(_scores(args, kwargs).shape), *args[1:], *named)


def _differs(must: object, got: object) -> NumericsError:
    return NumericsError(
        f"estimator.freeze_routing: a probe must make the choices (topk, argmax) of the forward at the centre, "
        f"{must}, got {got}. This model's calls depend on its values: write estimator.freeze_routing=false."
    )
