"""Frozen routing: against backpropagation on a mixture of experts, and against pencil and paper."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedzo.errors import NumericsError
from fedzo.testing.tiny_models import tiny_model
from fedzo.zo.directions import direction
from fedzo.zo.estimator import (
    Baseline,
    Estimator,
    Fzoo,
    FzooConfig,
    OneSided,
    OneSidedConfig,
    TwoPoint,
    TwoPointConfig,
    estimate_together,
)
from fedzo.zo.estimator.frozen_routing import Frozen, Record, Replay, build_estimator
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

IDS = 32 + torch.arange(48).reshape(2, 24) * 7 % 224  # no padding token: its zero embedding is stiff
KEYS = range(24)


def loss_of(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())


def loss_fn_of(model: nn.Module, ids: torch.Tensor = IDS) -> Callable[[], float]:
    def loss_fn() -> float:
        with torch.inference_mode():
            return loss_of(model, ids).item()

    return loss_fn


def scalars(estimator: Estimator, model: nn.Module, loss_fn: Callable[[], float]) -> np.ndarray:
    return np.array([each.g for each in estimator.estimate(FullSpace(model), loss_fn, KEYS)], np.float64)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def exact(mixtral: nn.Module) -> np.ndarray:
    """Derivatives along the directions at fixed routing: backpropagation does not see that indices could change."""
    twin = copy.deepcopy(mixtral).requires_grad_(True)
    loss_of(twin).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).double().numpy()
    return np.array([gradient @ direction(key, gradient.size) for key in KEYS])


def share_of_flips(model: nn.Module, eps: float) -> float:
    with Record() as center:
        loss_fn_of(model)()
    flips, total = 0, 0
    for key in KEYS:
        with FullSpace(model).probe(eps, key), Record() as probe:
            loss_fn_of(model)()
        for before, after in zip(center.choices, probe.choices, strict=True):
            changed = before.indices.sort(-1).values != after.indices.sort(-1).values
            flips, total = flips + int(changed.any(-1).sum()), total + len(changed)
    return flips / total


def test_frozen_scalars_are_the_derivatives_at_fixed_routing(mixtral: nn.Module, exact: np.ndarray) -> None:
    loss_fn = loss_fn_of(mixtral)
    assert share_of_flips(mixtral, 1e-3) > 0.01

    chosen_anew = rms(scalars(TwoPoint(1e-3), mixtral, loss_fn) - exact) / rms(exact)
    coarse, fine = (rms(scalars(Frozen(TwoPoint(eps)), mixtral, loss_fn) - exact) / rms(exact) for eps in (3e-3, 1e-3))

    assert chosen_anew > 0.5  # 1.8
    assert fine < 2e-3  # 0.001
    assert coarse / fine == pytest.approx(9, rel=0.2)  # O(eps^2)


def test_one_sided_frozen_scalars_are_of_first_order(mixtral: nn.Module, exact: np.ndarray) -> None:
    estimators = [Frozen(OneSided(eps, Baseline.center)) for eps in (1e-3, 5e-4)]

    coarse, fine = (rms(scalars(each, mixtral, loss_fn_of(mixtral)) - exact) / rms(exact) for each in estimators)

    assert fine < 0.1
    assert coarse / fine == pytest.approx(2, rel=0.1)


def test_the_weights_bits_are_what_they_were(mixtral: nn.Module) -> None:
    before = FullSpace(mixtral).digest()

    scalars(Frozen(TwoPoint(1e-2)), mixtral, loss_fn_of(mixtral))

    assert FullSpace(mixtral).digest() == before


def test_a_masked_space_is_frozen_alike(mixtral: nn.Module) -> None:
    flat = {"model.layers.0.mlp.gate.weight": torch.arange(0, 128)}  # the router itself
    twin = copy.deepcopy(mixtral).requires_grad_(True)
    loss_of(twin).backward()
    gradient = dict(twin.named_parameters())["model.layers.0.mlp.gate.weight"].grad.flatten().double().numpy()
    want = np.array([gradient @ direction(key, 128) for key in KEYS])
    space, loss_fn = MaskedSpace(mixtral, flat), loss_fn_of(mixtral)

    anew, frozen = (
        np.array([each.g for each in estimator.estimate(space, loss_fn, KEYS)])
        for estimator in (TwoPoint(1e-2), Frozen(TwoPoint(1e-2)))
    )

    assert rms(frozen - want) < 0.05 * rms(want)
    assert rms(anew - want) > 0.5 * rms(want)


def test_several_forwards_a_loss_are_replayed_in_order(mixtral: nn.Module) -> None:
    rows = [loss_fn_of(mixtral, row[None]) for row in IDS]

    apart = scalars(Frozen(TwoPoint(1e-3)), mixtral, lambda: (rows[0]() + rows[1]()) / 2)
    joint = scalars(Frozen(TwoPoint(1e-3)), mixtral, loss_fn_of(mixtral))

    np.testing.assert_allclose(apart, joint, atol=2e-3)  # float32 losses near 6, over 2 eps


@pytest.mark.parametrize("inner", [TwoPoint(1e-3), OneSided(1e-3, Baseline.center), Fzoo(1e-3)])
def test_losses_evaluated_together_give_what_each_gives_alone(mixtral: nn.Module, inner: Estimator) -> None:
    clients = [loss_fn_of(mixtral, row[None]) for row in IDS]
    space, keys = FullSpace(mixtral), [1, 2, 3]

    together = estimate_together(
        Frozen(inner), space, lambda: np.array([loss_fn() for loss_fn in clients]), keys, count=2
    )

    assert together == [Frozen(inner).estimate(space, loss_fn, keys) for loss_fn in clients]


@pytest.mark.parametrize("inner", [TwoPoint(1e-3), OneSided(1e-3, Baseline.center), Fzoo(1e-3)])
def test_a_model_without_selections_is_estimated_as_ever(inner: Estimator) -> None:
    model = tiny_model("llama")

    assert np.array_equal(scalars(Frozen(inner), model, loss_fn_of(model)), scalars(inner, model, loss_fn_of(model)))


@pytest.mark.parametrize(
    ("inner", "more"),
    [
        (TwoPoint(1e-3), 1),
        (OneSided(1e-3, Baseline.center), 0),
        (OneSided(1e-3, Baseline.mean), 1),
        (OneSided(1e-3, Baseline.leave_one_out), 1),
        (Fzoo(1e-3), 0),
    ],
)
def test_the_centre_costs_one_forward_unless_it_is_there_anyway(inner: Estimator, more: int) -> None:
    model, calls = nn.Linear(3, 1), []

    Frozen(inner).estimate(FullSpace(model), lambda: calls.append(1) or float(len(calls)), [1, 2, 3])

    assert len(calls) == Frozen(inner).forwards_per_step(3) == inner.forwards_per_step(3) + more


def test_values_are_the_probes_own_at_the_centres_indices() -> None:
    """Both entries are all but equal, so that probes change their order; the frozen loss stays linear."""
    layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
    layer.weight.data = torch.tensor([[1.0, 1.0 + 2**-20]])

    def loss_fn() -> float:
        return float(layer.weight.topk(1).values.sum()) + float(layer.weight[0][layer.weight.argmax()])

    g = [each.g for each in Frozen(TwoPoint(2.0**-6)).estimate(FullSpace(layer), loss_fn, range(50))]

    z = np.array([direction(key, 2)[1] for key in range(50)])
    np.testing.assert_allclose(g, 2 * z, atol=1e-4)


SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0]])


@pytest.mark.parametrize(
    "select",
    [
        lambda x: torch.topk(x, 2, dim=-1),
        lambda x: torch.topk(input=x, k=2),
        lambda x: x.topk(2, 0),
        lambda x: x.topk(k=1, dim=0, largest=False, sorted=False),
        lambda x: torch.topk(x, 3, 1, False),
    ],
)
def test_topk_gathers_and_is_like_topk(select: Callable[[torch.Tensor], torch.return_types.topk]) -> None:
    with Record() as record:
        center = select(SCORES)
    with Replay(record.choices).active():
        same, other = select(SCORES), None
    with Replay(record.choices).active():
        other = select(-SCORES)

    assert torch.equal(same.values, center.values)
    assert torch.equal(other.values, -center.values)
    assert torch.equal(other.indices, center.indices)
    assert type(other) is type(center)


def test_argmax_is_replayed_and_no_caller_can_change_the_record() -> None:
    with Record() as record:
        SCORES.argmax(dim=1).add_(1)
        torch.argmax(SCORES)
    for _ in range(2):
        with Replay(record.choices).active():
            assert (-SCORES).argmax(dim=1).add_(1).tolist() == [2, 1]
            assert torch.argmax(-SCORES).item() == 4


@pytest.mark.parametrize(
    ("again", "got"),
    [
        (lambda: None, r"1 of them, got 0\."),
        (lambda: (SCORES.topk(2), SCORES.topk(2)), r"1 of them, got another: \('topk', \(2, 4\), 2\)"),
        (lambda: SCORES[:1].topk(2), r"number 0 as \('topk', \(2, 4\), 2\), got \('topk', \(1, 4\), 2\)"),
        (lambda: SCORES.topk(3), r"got \('topk', \(2, 4\), 3\)"),
        (lambda: SCORES.argmax(), r"got \('argmax', \(2, 4\)\)"),
    ],
)
def test_other_calls_than_the_recorded_ones_are_refused(again: Callable[[], object], got: str) -> None:
    with Record() as record:
        SCORES.topk(2)

    with pytest.raises(NumericsError, match="freeze_routing.*" + got), Replay(record.choices).active():
        again()


def test_an_error_in_the_model_is_not_replaced() -> None:
    with Record() as record:
        SCORES.topk(2)

    with pytest.raises(ValueError, match="boom"), Replay(record.choices).active():
        raise ValueError("boom")


@pytest.mark.parametrize("config_class", [TwoPointConfig, OneSidedConfig, FzooConfig])
def test_a_configuration_asks_for_it(config_class: type) -> None:
    plain = build_estimator(config_class(eps=1e-3))

    assert not isinstance(plain, Frozen)
    assert build_estimator(config_class(eps=1e-3, freeze_routing=True)) == Frozen(plain)
