"""Stochastic rounding against a search among all values of the dtype, in exact float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.zo import directions
from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.directions import PURPOSE_ROUNDING, direction, halves, halves_at, philox, stream_key
from fedzo.zo.rounding import round_stochastically
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.steps import apply_steps

NARROW = [torch.bfloat16, torch.float16]
BEYOND = {torch.bfloat16: 2.0**128, torch.float16: 2.0**16}
"""Where infinity stands: the value that would follow the largest finite one."""


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


def magnitudes(dtype: torch.dtype) -> np.ndarray:
    """All finite magnitudes in ascending order, and the one beyond, as float64."""
    values = every_value(dtype).double().numpy()
    return np.append(np.unique(np.abs(values[np.isfinite(values)])), BEYOND[dtype])


def neighbours(wide: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, upper) magnitudes around each |x| and the probability of the upper, in float64."""
    grid, x = magnitudes(dtype), np.abs(wide.double().numpy())
    at = np.searchsorted(grid, x, side="right") - 1
    lower, upper = grid[at], grid[at + 1]
    return lower, upper, (x - lower) / (upper - lower)


def expected(wide: torch.Tensor, draws: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    lower, upper, p = neighbours(wide, dtype)
    magnitude = torch.from_numpy(np.where(draws.numpy() < p * 65536, upper, lower))
    magnitude[magnitude == BEYOND[dtype]] = torch.inf
    return torch.copysign(magnitude, wide.double()).to(dtype)


def many_values(dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers of all sizes below the largest finite one's successor, both signs; powers of two and beside."""
    random = np.random.default_rng(0)
    lowest, highest = (-149, 127) if dtype == torch.bfloat16 else (-30, 15)
    powers = np.ldexp(np.float32(1), np.arange(lowest, highest + 1)).astype(np.float32)
    beside = [np.nextafter(powers, np.float32(towards)) for towards in (0, np.inf)]
    scattered = np.ldexp(random.uniform(1, 2, 60_000), random.integers(lowest, highest + 1, 60_000)).astype(np.float32)
    largest = magnitudes(dtype)[-2]
    top = np.float32([0, largest, largest + (magnitudes(dtype)[-1] - largest) * 0.999])
    positive = np.concatenate([powers, *beside, scattered, top])
    return torch.from_numpy(np.concatenate([positive, -positive]))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize("dtype", NARROW)
def test_every_value_goes_where_a_search_and_its_draw_send_it(dtype: torch.dtype) -> None:
    wide = many_values(dtype)
    draws = torch.from_numpy(np.random.default_rng(1).integers(0, 65536, wide.numel()).astype(np.int32))

    assert same_bits(round_stochastically(wide, draws, dtype), expected(wide, draws, dtype))
    for constant in (0, 65535):
        same = torch.full_like(draws, constant)
        assert same_bits(round_stochastically(wide, same, dtype), expected(wide, same, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_values_that_the_dtype_holds_keep_their_bits_whatever_the_draw(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    for draw in (0, 1, 65535):
        rounded = round_stochastically(values.float(), torch.full(values.shape, draw, dtype=torch.int32), dtype)
        assert same_bits(rounded[~values.isnan()], values[~values.isnan()])
        assert torch.equal(rounded.isnan(), values.isnan())


@pytest.mark.parametrize("law", list(Distribution))
@pytest.mark.parametrize(
    ("dtype", "value", "s"),
    [
        (torch.bfloat16, 0.1, 1e-6),
        (torch.bfloat16, -1.0, 1e-4),
        (torch.float16, 0.1, 1e-6),
        (torch.float16, 2.0**-14, 1e-8),
        (torch.float16, -3e-6, 1e-8),
    ],
)
def test_steps_are_unbiased_within_five_standard_errors(
    law: Distribution, dtype: torch.dtype, value: float, s: float
) -> None:
    """Deviations in units of the gap; each is p or p - 1, so their variance is p (1 - p)."""
    keys, n = 40, 5000
    deviation, variance = 0.0, 0.0
    for key in range(keys):
        layer = nn.Linear(n, 1, bias=False)
        layer.weight.data = torch.full((1, n), value, dtype=dtype)
        start = layer.weight.detach().float().view(-1).numpy()
        wide = torch.from_numpy(start - np.float32(s) * direction(key, n, distribution=law))

        FullSpace(layer, distribution=law, rounding=Rounding.stochastic).step(float(np.float32(s)), key)

        lower, upper, p = neighbours(wide, dtype)
        moved = layer.weight.detach().double().view(-1).numpy() - wide.double().numpy()
        deviation += float((moved / (upper - lower)).sum())
        variance += float((p * (1 - p)).sum())

    assert variance > 0
    assert abs(deviation) < 5 * variance**0.5


def test_draws_are_halves_of_purpose_1_blocks_on_both_paths() -> None:
    key, start, n = stream_key(7, round=2), 2**35 - 21, 70_001
    words = [
        philox((b & 0xFFFFFFFF, b >> 32, 1, 0), (key & 0xFFFFFFFF, key >> 32))
        for b in range(start // 8, start // 8 + 9)
    ]
    by_hand = [word >> shift & 0xFFFF for block in words for word in block for shift in (0, 16)][start % 8 :][:60]

    made = halves(key, n, purpose=PURPOSE_ROUNDING, start=start)

    assert made[:60].tolist() == by_hand
    assert np.array_equal(made, halves_at(key, torch.arange(start, start + n), purpose=PURPOSE_ROUNDING).numpy())
    assert halves(key, 0, purpose=PURPOSE_ROUNDING).size == 0


@pytest.fixture(params=["any chunk", "torch words"])
def other_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switch to chunks of 37, or to the integers that devices other than the CPU use."""

    def switch() -> None:
        if request.param == "any chunk":
            monkeypatch.setattr(directions, "_CHUNK", 37)
        else:
            by_torch = lambda key, n, *, purpose, start: (  # noqa: E731
                halves_at(key, torch.arange(start, start + n), purpose=purpose).int().numpy()
            )
            monkeypatch.setattr(directions, "halves", by_torch)

    return switch


@pytest.mark.parametrize("dtype", NARROW)
def test_chunks_and_paths_give_the_same_bits_as_a_step_by_hand(
    dtype: torch.dtype, other_path: Callable[[], None]
) -> None:
    def stepped() -> torch.Tensor:
        model = nn.Sequential(nn.Embedding(13, 7), nn.Linear(7, 11))
        for i, parameter in enumerate(model.parameters()):
            parameter.data = torch.linspace(-1 - i, 1, parameter.numel()).view(parameter.shape)
        model.to(dtype)
        FullSpace(model, rounding=Rounding.stochastic).step(1e-4, key=9)
        return torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])

    start = torch.cat([torch.linspace(-1 - i, 1, n).to(dtype).float() for i, n in enumerate((91, 77, 11))])
    wide = start - torch.from_numpy(direction(9, 179)) * torch.tensor(1e-4)
    draws = halves_at(9, torch.arange(179), purpose=PURPOSE_ROUNDING).int()

    assert same_bits(stepped(), expected(wide, draws, dtype))
    other_path()
    assert same_bits(stepped(), expected(wide, draws, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_lr_0_leaves_every_bit(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    layer = nn.Linear(values.numel(), 1, bias=False)
    layer.weight.data = values.clone().view(1, -1)
    space = FullSpace(layer, rounding=Rounding.stochastic)

    apply_steps(space, [(np.float32(3), 1)], lr=0.0)

    assert same_bits(layer.weight.detach().view(-1), values)


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_add_up_to_those_of_float32_and_vanish_when_rounded_to_nearest(dtype: torch.dtype) -> None:
    n, steps, s = 100_000, 50, 1e-5

    def drift(dtype: torch.dtype, how: Rounding) -> np.ndarray:
        layer = nn.Linear(n, 1, bias=False)
        layer.weight.data = torch.full((1, n), 0.75, dtype=dtype)
        space = FullSpace(layer, rounding=how)
        for key in range(steps):
            space.step(s, key)
        return (space.values() - np.float32(0.75)).astype(np.float64)

    exact, kept = drift(torch.float32, Rounding.stochastic), drift(dtype, Rounding.stochastic)

    slope = np.dot(exact, kept) / np.dot(exact, exact)
    standard_error = (kept - exact).std() / exact.std() / n**0.5
    assert abs(slope - 1) < 5 * standard_error < 0.4
    assert not drift(dtype, Rounding.nearest).any()


def test_float32_weights_are_not_concerned() -> None:
    steps = []
    for how in Rounding:
        layer = nn.Linear(50, 3)
        for parameter in layer.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        FullSpace(layer, rounding=how).step(1e-3, 3)
        steps.append(torch.cat([parameter.detach().view(-1) for parameter in layer.parameters()]))

    assert torch.equal(*steps)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_neighbours_have_adjacent_bit_patterns(dtype: torch.dtype) -> None:
    wide = many_values(dtype)
    wide = wide[wide.abs() >= torch.finfo(dtype).smallest_normal]  # where every p is a multiple of 2^-16
    down, up = (
        round_stochastically(wide, torch.full(wide.shape, draw, dtype=torch.int32), dtype) for draw in (65535, 0)
    )
    kept = down.float() == wide

    assert (down.double().abs() <= wide.double().abs()).all()
    assert same_bits(up[kept], down[kept])
    assert torch.equal(up[~kept].view(torch.int16), down[~kept].view(torch.int16) + 1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", [1 + 2**-11.3, 1 - 2**-12.7, 0.1, 3.14159, 2**-14 - 2**-27, 2**-14 + 2**-27, 1e-6, 4e4])
def test_the_mean_over_all_draws_is_the_value_itself(dtype: torch.dtype, sign: int, x: float) -> None:
    wide = torch.full((65536,), sign * x, dtype=torch.float32)
    draws = torch.arange(65536, dtype=torch.int32)

    mean = round_stochastically(wide, draws, dtype).double().mean().item()

    lower, upper, _ = neighbours(wide[:1], dtype)
    coarse = dtype == torch.float16 and x < 2**-14  # its probabilities are multiples of 2^-16
    assert abs(mean - wide[0].item()) <= (2**-16 * float(upper[0] - lower[0]) if coarse else 0)
