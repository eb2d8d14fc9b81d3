"""Whether bfloat16 may stand in for float32, and where probes vanish: by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.models.auto_dtype import (
    NUM_DIRECTIONS,
    Trial,
    choose_dtype,
    coarseness_warning,
    spacing,
    too_coarse,
    try_out,
)
from fedzo.models.config import DType
from fedzo.sketch import tables_of
from fedzo.testing.tiny_models import tiny_model, tiny_sketch
from fedzo.zo.config import Distribution
from fedzo.zo.estimator import LossFn, Projection, TwoPoint
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

KEYS = range(NUM_DIRECTIONS)


@pytest.mark.parametrize(
    ("value", "dtype", "gap"),
    [
        (1.0, torch.bfloat16, 2**-7),
        (1.99, torch.bfloat16, 2**-7),
        (2.0, torch.bfloat16, 2**-6),
        (0.03, torch.bfloat16, 2**-13),  # 0.03 lies above 2^-6 = 0.0156
        (1.0, torch.float16, 2**-10),
        (0.03, torch.float16, 2**-16),
        (2.0**-20, torch.float16, 2**-24),
        (0.0, torch.float16, 2**-24),
        (1.0, torch.float32, 2**-23),
    ],
)
def test_spacing_by_hand(value: float, dtype: torch.dtype, gap: float) -> None:
    assert spacing(value, dtype) == gap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spacing_is_the_way_to_the_next_bit_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(0, 0x7B00, 37, dtype=torch.int16)
    here, there = (pattern.view(dtype).double() for pattern in (patterns, patterns + 1))

    assert [spacing(value, dtype) for value in here.tolist()] == (there - here).tolist()


def model_of(rms: dict[str, float], dtype: torch.dtype) -> nn.Module:
    """Matrices whose entries are plus and minus their root mean square."""
    model = nn.Module()
    for name, value in rms.items():
        signs = 1 - 2 * (torch.arange(60).view(6, 10) % 2)
        model.register_parameter(name, nn.Parameter((signs * value).to(dtype), requires_grad=False))
    return model


def test_tensors_whose_probes_vanish_are_named() -> None:
    """Half the spacing of bfloat16 is 2^-8 at 1, 2^-10 at 1/4."""
    model = model_of({"norm": 1.0, "matrix": 0.25, "zero": 0.0}, torch.bfloat16)

    assert too_coarse(model, FullSpace(model), 2**-8) == []
    assert too_coarse(model, FullSpace(model), 2**-8.5) == ["norm"]
    assert too_coarse(model, FullSpace(model), 2**-10) == ["norm"]
    assert too_coarse(model, FullSpace(model), 2**-11) == ["norm", "matrix"]
    assert too_coarse(model.float(), FullSpace(model), 1e-3) == []


def test_of_a_mask_the_values_count_that_it_trains() -> None:
    """The largest of a Gaussian matrix lie two binades above its root mean square, where bfloat16 is four times as
    coarse: the count of values that a probe leaves as they are says so, too."""
    weight = (0.15 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    model = nn.Module()
    model.register_parameter("matrix", nn.Parameter(weight, requires_grad=False))
    largest = weight.float().abs().view(-1).topk(64).indices.sort().values
    spaces = [MaskedSpace(model, {"matrix": each}) for each in (largest, torch.arange(weight.numel()))]

    def vanished(space: MaskedSpace, eps: float) -> float:
        moved = space.master + eps * torch.randn(space.size, generator=torch.Generator().manual_seed(1))
        return float((moved.to(torch.bfloat16) == space.master.to(torch.bfloat16)).float().mean())

    assert [too_coarse(model, space, 1e-3) for space in spaces] == [["matrix"], []]
    few, whole = (vanished(space, 1e-3) for space in spaces)
    assert few > 0.8
    assert whole < 0.5


def test_tables_are_judged_by_the_dtype_that_their_sketch_computes_in() -> None:
    """They are float32 themselves; half the spacing of bfloat16 is 2^-12 at 0.1."""
    narrow, wide = tiny_sketch(dtype=torch.bfloat16), tiny_sketch()
    for table in (*tables_of(narrow).values(), *tables_of(wide).values()):
        table.fill_(0.1)
    tables = tables_of(narrow)

    assert too_coarse(narrow, DenseSpace([*tables.values()]), 1e-4) == list(tables)
    assert too_coarse(narrow, DenseSpace([*tables.values()]), 2**-12) == []
    assert too_coarse(wide, DenseSpace([*tables_of(wide).values()]), 1e-4) == []


def test_the_warning_names_five_tensors_and_counts_them_all() -> None:
    model = model_of({f"w{i}": 1.0 for i in range(7)} | {"fine": 2.0**-9}, torch.bfloat16)

    text = coarseness_warning(model, FullSpace(model), 1e-3)

    assert text is not None
    assert "estimator.eps=0.001" in text
    assert "in 7 tensors (w0, w1, w2, w3, w4, ...)" in text
    assert "model.dtype=float32" in text
    assert coarseness_warning(model.float(), FullSpace(model), 1e-3) is None
    several = model_of({"a": 1.0, "b": 1.0, "c": 1.0}, torch.bfloat16)
    trained = {name: each for name, each in several.named_parameters() if name != "b"}
    few = coarseness_warning(several, FullSpace(several, parameters=trained), 1e-3)
    assert few is not None
    assert "in 2 tensors (a, c)" in few


@pytest.mark.parametrize(
    ("narrow", "seconds", "error", "dtype"),
    [
        ([3.0, -4.0], 0.9, 0.0, DType.bfloat16),
        ([3.0, -4.5], 0.5, 0.1, DType.bfloat16),  # a difference of 0.5 beside a length of 5
        ([3.0, -4.6], 0.5, 0.12, DType.float32),
        ([3.0, -4.0], 0.91, 0.0, DType.float32),
        ([-3.0, 4.0], 0.1, 2.0, DType.float32),
        ([3.0, math.nan], 0.1, math.inf, DType.float32),
    ],
)
def test_fidelity_comes_before_speed(narrow: list[float], seconds: float, error: float, dtype: DType) -> None:
    wide, trial = Trial(np.array([3.0, -4.0]), 2.0), Trial(np.array(narrow), 2 * seconds)
    choice = choose_dtype(wide, {"bfloat16": trial})

    (contender,) = choice.contenders
    assert contender.error == pytest.approx(error)
    assert contender.time == pytest.approx(seconds)
    assert choice.name == dtype
    assert f"{dtype} is chosen" in str(choice)
    assert f"{contender.time:.2f} of the time" in str(choice)


@pytest.mark.parametrize(
    ("tf32", "narrow", "chosen"),
    [
        (([3.0, -4.0], 0.5), ([3.0, -4.0], 0.4), "bfloat16"),  # the faster of two that are true
        (([3.0, -4.0], 0.4), ([3.0, -4.0], 0.5), "tf32"),
        (([3.0, -4.0], 0.8), ([-3.0, 4.0], 0.1), "tf32"),  # the true one
        (([-3.0, 4.0], 0.1), ([3.0, -4.0], 0.8), "bfloat16"),
        (([3.0, -4.0], 1.0), ([3.0, -4.0], 1.0), "float32"),
    ],
)
def test_the_fastest_of_those_that_are_true_is_chosen(
    tf32: tuple[list[float], float], narrow: tuple[list[float], float], chosen: str
) -> None:
    others = {name: Trial(np.array(g), seconds) for name, (g, seconds) in (("tf32", tf32), ("bfloat16", narrow))}

    choice = choose_dtype(Trial(np.array([3.0, -4.0]), 1.0), others)

    assert choice.name == chosen
    assert str(choice).count("of the time") == 3  # the limit, and what each took


@pytest.mark.parametrize("wide", [[0.0, 0.0], [math.nan, 1.0]])
def test_scalars_that_say_nothing_choose_float32(wide: list[float]) -> None:
    choice = choose_dtype(Trial(np.array(wide), 1.0), {"bfloat16": Trial(np.array(wide), 0.1)})

    assert (choice.contenders[0].error, choice.name) == (math.inf, DType.float32)


def trial(model: nn.Module, loss_fn: Callable[[], float], **space: object) -> Trial:
    made = MaskedSpace(model, {"weight": torch.arange(32)}, distribution=Distribution.rademacher)
    return try_out(made, TwoPoint(2.0**-6), loss_fn, KEYS)


def test_a_model_that_bfloat16_computes_exactly_is_off_by_nothing() -> None:
    """Weights of 1 and -1 moved by 2^-6, and their sum: all numbers are held exactly in both dtypes."""

    def of(dtype: torch.dtype) -> Trial:
        layer = nn.Linear(32, 1, bias=False).requires_grad_(False)
        layer.weight.copy_(1 - 2 * (torch.arange(32) % 2))
        layer.to(dtype)
        return trial(layer, lambda: float(layer.weight.double().sum()))

    wide, narrow = of(torch.float32), of(torch.bfloat16)

    assert np.abs(wide.g).max() > 0
    assert choose_dtype(wide, {"bfloat16": narrow}).contenders[0].error == 0


def test_a_masked_language_model_loses_its_scalars_in_bfloat16() -> None:
    ids = 32 + torch.arange(24).reshape(2, 12) * 7 % 200

    def of(dtype: torch.dtype) -> Trial:
        model = tiny_model("llama", dtype=dtype)
        names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name]

        def loss_fn() -> float:
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

        space = MaskedSpace(model, {name: torch.arange(4) for name in names})
        return try_out(space, TwoPoint(3e-4), loss_fn, range(64))  # of four, the error is another on each make of CPU

    choice = choose_dtype(of(torch.float32), {"bfloat16": of(torch.bfloat16)})

    assert choice.contenders[0].error > 1
    assert choice.name == DType.float32


def test_a_trial_warms_up_and_drops_what_is_not_finite() -> None:
    losses = iter([9.0, 3.0, 1.0, 0.0, math.inf, 0.0])
    layer = nn.Linear(2, 1)

    result = try_out(FullSpace(layer), TwoPoint(0.5), losses.__next__, [1, 2])

    assert result.g[0] == 1
    assert math.isnan(result.g[1])
    assert result.seconds > 0


class OfPairs:
    """Compares directions with each other, so that one alone says nothing."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def forwards_per_step(self, num_probes: int) -> int:
        return 2 * num_probes

    def estimate(self, space: Space, loss_fn: LossFn, keys: Sequence[int]) -> list[Projection]:
        self.asked.append(len(keys))
        if len(keys) % 2:
            raise ValueError(f"{len(keys)} directions are no pairs")
        return TwoPoint(0.5).estimate(space, loss_fn, keys)


def test_a_warm_up_has_as_many_probes_as_a_step() -> None:
    estimator = OfPairs()

    result = try_out(FullSpace(nn.Linear(2, 1)), estimator, lambda: 1.0, range(4), 3, 2)

    assert estimator.asked == [2, 2, 2, 4]
    assert result.g.tolist() == [0.0] * 4


def test_the_message_tells_along_how_many_directions_scalars_were_compared() -> None:
    choice = choose_dtype(Trial(np.arange(6.0), 1.0), {"bfloat16": Trial(np.arange(6.0), 0.5)})

    assert "bfloat16 is chosen. Scalars along 6 directions" in str(choice)
