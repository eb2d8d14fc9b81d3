"""What every space must do: move its values as stated, let the model compute with them, and put every bit back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedzo.testing.conformance.bits import (
    Bits,
    global_generators,
    model_bits,
    must,
    must_be_same_model,
    must_be_same_values,
)
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.spaces.base import DifferentiableSpace, Space, Values

_KEY = 0x9E3779B97F4A7C15  # a stream key has 64 bits
_SCALE = 0.0625
_STEPS = ((1.7e-3, 3), (-0.3, _KEY), (1e-6, 4))
_FACTOR = float(np.float32(0.7001))
_SLOPE_ERROR = 0.02  # of the norm of the gradient; weights of 16 bits round away some tenths of a percent
_MEMBERS = [name for name in vars(Space) if not name.startswith("_")]


def check_space(
    make_space: Callable[[nn.Module], Space],
    make_model: Callable[[], nn.Module],
    *,
    outputs: Callable[[nn.Module], torch.Tensor],
    held_in: torch.dtype = torch.float32,
    distribution: Distribution = Distribution.gaussian,
) -> None:
    """Check that a space keeps the contract of ``fedzo.zo.spaces.base.Space``. Call it for each dtype of the model.

    - It has every member of ``Space``.
    - A probe moves the model to theta + scale * z and leaves every bit, also where its body raises.
    - ``step`` is one rounded product and one rounded difference, ``scale_by`` one rounded product, both then rounded to
      ``held_in``; a step of 0 leaves every bit.
    - ``load`` and ``rewind`` bring every bit back; ``values`` and ``load`` copy.
    - Spaces at the same values have the same model, ``check`` and ``digest``, whatever led there; a move changes both.
    - No parameter of the model moves but ``parameters``, and no other is read as moved within a probe.
    - ``gradient``, where there is one, is right on a linear function of ``parameters``: along a direction it differs
      from central differences by at most 2% of its norm. It leaves every bit, and all parameters frozen.
    - The global random generators are neither used nor needed.

    Args:
        make_space: Makes the space on a model.
        make_model: Makes the model, always with the same bits.
        outputs: What the model computes now, on some fixed input: logits, or a loss. It must depend on trained values.
        held_in: The dtype that holds theta: float32 where there is a master, else that of the weights.
        distribution: The law of directions that the space was made with.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    models = make_model(), make_model()
    must_be_same_model(model_bits(models[1]), model_bits(models[0]), "make_model must always make the same model")
    with global_generators(1):
        mine = _Subject(make_space(models[0]), models[0], outputs, held_in)
    with global_generators(2):
        twin = _Subject(make_space(models[1]), models[1], outputs, held_in)
    missing = [name for name in _MEMBERS if not hasattr(mine.space, name)]
    must(not missing, f"a space must have every member of fedzo.zo.spaces.base.Space, it lacks {', '.join(missing)}")
    law = mine.space.distribution
    must(
        law is distribution, f"distribution must be the law that the space was made with, {distribution!r}, got {law!r}"
    )
    _check_forms(mine)
    mine.must_be_at(twin.state(), "two spaces made on the same model must be the same")
    for seed, check in enumerate((_check_probes, _check_steps, _check_scaling, _check_returns)):
        with global_generators(seed):
            check(mine, twin)
    if isinstance(mine.space, DifferentiableSpace):
        with global_generators(0):
            _check_gradient(mine, mine.space)


@dataclass(frozen=True, slots=True)
class _State:
    model: Bits
    values: Values
    digest: str
    check: int


@dataclass(frozen=True, slots=True)
class _Subject:
    space: Space
    model: nn.Module
    compute: Callable[[nn.Module], torch.Tensor]
    held_in: torch.dtype

    def state(self) -> _State:
        return _State(model_bits(self.model), self.space.values(), self.space.digest(), self.space.check())

    def outputs(self) -> torch.Tensor:
        return self.compute(self.model).detach().clone()

    def others(self) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
        """The parameters that hold no trained value, and their present values."""
        trained = {id(parameter) for parameter in self.space.parameters}
        named = self.model.named_parameters()
        return {name: (each, each.detach().clone()) for name, each in named if id(each) not in trained}

    def direction(self, key: int) -> Values:
        return direction(key, self.space.size, distribution=self.space.distribution)

    def moved(self, theta: Values, scale: float, key: int) -> Values:
        """theta + scale * z: one rounded product, one rounded sum."""
        return theta + np.float32(scale) * self.direction(key)

    def held(self, values: Values) -> Values:
        rounded: Values = torch.from_numpy(values).to(self.held_in).float().numpy()
        return rounded

    def must_be_at(self, expected: _State, rule: str) -> None:
        """All that can be seen of the space must be what it was."""
        found = self.state()
        must_be_same_values(found.values, expected.values, f"{rule}: values()")
        must_be_same_model(found.model, expected.model, f"{rule}: the model")
        must(found.digest == expected.digest, f"{rule}: digest() must be {expected.digest}, got {found.digest}")
        must(found.check == expected.check, f"{rule}: check() must be {expected.check}, got {found.check}")

    def must_have_moved(self, before: _State, what: str) -> None:
        must(self.space.digest() != before.digest, f"digest() must change after {what}, it is still {before.digest}")
        must(self.space.check() != before.check, f"check() must change after {what}, it is still {before.check}")


def _check_forms(mine: _Subject) -> None:
    space, values = mine.space, mine.space.values()
    must(space.size > 0, f"size must be > 0, got {space.size}")
    must(
        values.dtype == np.float32 and values.shape == (space.size,),
        f"values() must be float32 [{space.size}], got {values.dtype} {list(values.shape)}",
    )
    check = space.check()
    must(0 <= check < 2**32, f"check() must fit in 32 bits, got {check}")
    step_bytes = space.step_bytes(1)
    must(isinstance(step_bytes, int) and step_bytes >= 0, f"step_bytes(1) must be an integer >= 0, got {step_bytes!r}")
    perturbs = space.perturbs_weights
    must(isinstance(perturbs, bool), f"perturbs_weights must be True or False, got {perturbs!r}")
    before = mine.state()
    rows = space.row_weights(mine.model)
    must(rows is None or hasattr(rows, "follow"), f"row_weights(model) must be None or have ``follow``, got {rows!r}")
    mine.must_be_at(before, "after row_weights(model) every bit must be what it was")
    values += 1
    mine.must_be_at(before, "values() must return a copy; after a change of it")
    given = space.values()
    space.load(given)
    given += 1
    mine.must_be_at(before, "load(values) must bring every bit back and copy what it is given")


def _check_probes(mine: _Subject, twin: _Subject) -> None:
    """What the model computes in a probe is what another computes whose values were moved by numpy and loaded."""
    before, theta, rest = mine.state(), mine.space.values(), mine.outputs()
    must(torch.equal(rest, mine.outputs()), "outputs must be a function of the model: two calls gave two results")
    for scale in (_SCALE, -_SCALE):
        twin.space.load(mine.moved(theta, scale, _KEY))
        expected = twin.outputs()
        others = mine.others()
        with mine.space.probe(scale, _KEY):
            found = mine.outputs()
            for name, (parameter, was) in others.items():
                must(
                    torch.equal(parameter + 0, was), f"parameters must hold all that a probe moves, {name!r} moves, too"
                )
        must(
            torch.equal(found, expected),
            f"within probe({scale}, key) the model must compute what it computes after load(theta + {scale} * z); its "
            f"outputs differ by up to {_distance(found, expected)} (from those at theta: {_distance(found, rest)})",
        )
        must(
            not torch.equal(found, rest),
            f"outputs must depend on the trained values: probe({scale}, key) did not change them",
        )
        mine.must_be_at(before, f"after probe({scale}, key) every bit must be what it was")
    for key in range(25):
        for scale in (1e-3, -1.0, 1e-30, 1e30):
            with mine.space.probe(scale, key):
                pass
    mine.must_be_at(before, "after a hundred probes every bit must be what it was")
    try:
        with mine.space.probe(0.5, _KEY):
            raise _BrokenOff
    except _BrokenOff:
        mine.must_be_at(before, "after a probe whose body raised, every bit must be what it was")
    else:
        raise AssertionError("an exception in the body of a probe must reach the caller; the probe kept it")
    negative = theta.copy()
    negative[0] = -0.0
    mine.space.load(negative)
    at_zero = mine.state()
    with mine.space.probe(_SCALE, _KEY):
        mine.outputs()
    mine.must_be_at(at_zero, "after a probe from a value of -0.0 every bit must be what it was")
    mine.space.load(theta)
    twin.space.load(theta)
    mine.must_be_at(before, "load(values) must bring every bit back")


def _check_steps(mine: _Subject, twin: _Subject) -> None:
    before, start = mine.state(), mine.space.values()
    mine.space.step(0.0, _KEY)
    mine.must_be_at(before, "after step(0, key) every bit must be what it was")
    expected = start
    for step, key in _STEPS:
        s = float(np.float32(step))
        expected = mine.held(mine.moved(expected, -s, key))
        mine.space.step(s, key)
        twin.space.step(s, key)
        must_be_same_values(
            mine.space.values(),
            expected,
            f"step({s}, key) must be theta - s * z with one rounded product and one rounded difference in float32, "
            f"held in {mine.held_in}",
        )
    mine.must_have_moved(before, "steps")
    now = model_bits(mine.model)
    for name in mine.others():
        still = torch.equal(now[name], before.model[name])
        must(still, f"parameters must hold all that steps move, but {name!r} moves and is none of them")
    mine.must_be_at(twin.state(), "two spaces moved by the same steps must be the same")
    twin.space.load(start)
    twin.space.load(expected)
    mine.must_be_at(twin.state(), "steps and a load of what they lead to must be the same")


def _check_scaling(mine: _Subject, twin: _Subject) -> None:
    before, expected = mine.state(), mine.held(np.float32(_FACTOR) * mine.space.values())
    mine.space.scale_by(_FACTOR)
    must_be_same_values(
        mine.space.values(),
        expected,
        f"scale_by({_FACTOR}) must be factor * theta with one rounded product in float32, held in {mine.held_in}",
    )
    mine.must_have_moved(before, "scale_by")
    twin.space.load(expected)
    mine.must_be_at(twin.state(), "scale_by and a load of what it leads to must be the same")


def _check_returns(mine: _Subject, twin: _Subject) -> None:
    """Mark and rewind, values and load."""
    before, theta = mine.state(), mine.space.values()
    for _ in range(2):  # a mark is forgotten with its rewind
        mine.space.mark()
        mine.space.step(0.25, _KEY)
        with mine.space.probe(_SCALE, _KEY):
            pass
        mine.space.scale_by(_FACTOR)
        moved = mine.state()
        mine.space.rewind()
        mine.must_be_at(before, "after mark, moves and rewind every bit must be what it was")
    mine.space.step(0.25, _KEY)
    mine.space.scale_by(_FACTOR)
    mine.must_be_at(moved, "after a rewind the same moves must lead to the same state")
    mine.space.load(theta)
    mine.must_be_at(before, "load(values) must bring every bit back")


def _check_gradient(mine: _Subject, space: DifferentiableSpace) -> None:
    """The loss is linear in the parameters, so that central differences are exact but for the rounding of weights."""
    parameters = space.parameters
    slopes = [torch.from_numpy(direction(i, p.numel())).to(p.device).double() for i, p in enumerate(parameters)]
    if not slopes:
        return

    def loss() -> torch.Tensor:
        pairs = zip(parameters, slopes, strict=True)
        return torch.stack([torch.dot(parameter.double().reshape(-1), slope) for parameter, slope in pairs]).sum()

    before, at_rest = mine.state(), float(loss().detach())
    found, gradient = space.gradient(loss)
    mine.must_be_at(before, "after gradient(loss_fn) every bit must be what it was")
    left = sum(parameter.requires_grad for parameter in parameters)
    must(not left, f"after gradient(loss_fn) no parameter may require a gradient, {left} of {len(parameters)} do")
    must(
        math.isclose(found, at_rest, rel_tol=1e-5),
        f"gradient(loss_fn) must give the loss at theta, {at_rest}, got {found}",
    )
    must(
        gradient.dtype == torch.float32 and gradient.shape == (space.size,),
        f"gradient(loss_fn) must give float32 [{space.size}], got {gradient.dtype} {list(gradient.shape)}",
    )
    numbers = gradient.detach().cpu().double().numpy()
    room = _SLOPE_ERROR * float(np.linalg.norm(numbers))
    for key in (_KEY, _KEY - 1, _KEY - 2):
        with space.probe(1.0, key):
            above = float(loss().detach())
        with space.probe(-1.0, key):
            below = float(loss().detach())
        slope, along = (above - below) / 2, float(numbers @ mine.direction(key))
        must(
            abs(along - slope) <= room,
            "gradient(loss_fn) must be the slope of the loss: along a direction z it must be that of central "
            f"differences, {slope}, within {room}, got {along}",
        )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


class _BrokenOff(Exception):
    """Raised within a probe."""
