"""The check of spaces refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.testing import check_space
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.spaces.base import GraphLossFn, Space, Values
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace


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
        self.write(self._master)


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
        self.write(self._master)


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


class GradientUphill(Every):
    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        loss, gradient = super().gradient(loss_fn)
        return loss, -gradient


class LeavesItUnfrozen(Every):
    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        found = super().gradient(loss_fn)
        self.parameters[0].requires_grad_(True)
        return found


class MovesByItsGradient(Every):
    """Moves a weight by a gradient."""

    def gradient(self, loss_fn: GraphLossFn) -> tuple[float, torch.Tensor]:
        found = super().gradient(loss_fn)
        self.parameters[0].data.mul_(1.5)
        return found


class Without:
    """A space that lacks a member."""

    def __init__(self, space: Space, lacks: str) -> None:
        self._space, self._lacks = space, lacks

    def __getattr__(self, name: str) -> Any:
        if name == self._lacks:
            raise AttributeError(name)
        return getattr(self._space, name)


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8, bias=True), nn.Linear(8, 3)).requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.from_numpy(direction(number, parameter.numel())).view(parameter.shape))
    return model


def small_outputs(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.linspace(-1, 1, 12).view(2, 6))


def test_without_a_fault_it_passes() -> None:
    check_space(Every, small, outputs=small_outputs)


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
        (GradientUphill, r"gradient\(loss_fn\) must be the slope of the loss"),
        (LeavesItUnfrozen, r"after gradient\(loss_fn\) no parameter may require a gradient, 1 of 4 do"),
        (MovesByItsGradient, r"after gradient\(loss_fn\) every bit must be what it was: the model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_spaces(space: Callable[[nn.Module], Space], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_space(space, small, outputs=small_outputs)


@pytest.mark.parametrize("member", ["step_bytes", "perturbs_weights", "row_weights", "scale_by"])
def test_a_space_must_have_every_member(member: str) -> None:
    def make(model: nn.Module) -> Any:
        return Without(Every(model), member)

    with pytest.raises(AssertionError, match=rf"a space must have every member of .*Space, it lacks {member}$"):
        check_space(make, small, outputs=small_outputs)


def test_a_space_without_a_master_must_say_in_which_dtype_it_holds_its_values() -> None:
    def half() -> nn.Module:
        return small().to(torch.bfloat16)

    def outputs(model: nn.Module) -> torch.Tensor:
        return model(torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(2, 6))

    check_space(FullSpace, half, outputs=outputs, held_in=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"one rounded difference in float32, held in torch\.float32"):
        check_space(FullSpace, half, outputs=outputs)
