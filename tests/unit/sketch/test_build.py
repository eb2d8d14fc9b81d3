"""Sketches against a slow twin: float64 loops over single weights, the paper's formulas as they stand."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.sketch import Sketch, SketchSettings, decode, sketch_matrix, unpack
from fedzo.sketch.column_pass import choose_codes, factor_hessian


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return 2 * inputs.T @ inputs / len(inputs)


def example(rows: int, columns: int, *, seed: int = 0, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    inputs = torch.randn(tokens, columns, generator=generator) @ mix * sizes
    return torch.randn(rows, columns, generator=generator) * 0.02, hessian_of(inputs)


def dense(sketch: Sketch) -> torch.Tensor:
    return decode(sketch.codes, sketch.tables, torch.empty(len(sketch.codes), sketch.num_columns))


# --- the twin ---------------------------------------------------------------------------------------------------------


def best_levels(values: Any, weights: Any, k: int) -> list[float]:
    """Weighted k-means of a few numbers, of all cuts of the sorted values the best."""
    pairs = sorted(zip(values.tolist(), weights.tolist(), strict=True))
    best: tuple[float, list[float]] = (np.inf, [])
    for cuts in itertools.combinations(range(1, len(pairs)), k - 1):
        cost, levels = 0.0, []
        for a, b in itertools.pairwise((0, *cuts, len(pairs))):
            mass = sum(w for _, w in pairs[a:b])
            mean = sum(w * x for x, w in pairs[a:b]) / mass
            cost += sum(w * (x - mean) ** 2 for x, w in pairs[a:b])
            levels.append(mean)
        best = min(best, (cost, levels))
    return best[1]


def twin(weight: torch.Tensor, hessian: torch.Tensor, settings: SketchSettings) -> tuple[Any, Any]:
    """Tables [R, G, k] and codes [R, d], one weight after another."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    rows, d = w.shape
    groups, k = settings.groups_per_row, 2**settings.bits
    alive = [h[i, i] for i in range(d) if h[i, i] != 0]
    for i in range(d):
        if h[i, i] == 0:
            h[i, i] = sum(alive) / len(alive)
    order = sorted(range(d), key=lambda i: -h[i, i]) if settings.act_order else list(range(d))
    h = h + settings.damping * np.mean(np.diag(h)) * np.eye(d)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    importance = np.empty(d)
    for position, i in enumerate(order):
        importance[i] = upper[position, position] ** -settings.importance_power
    tables, codes = np.empty((rows, groups, k)), np.empty((rows, d), int)
    for r in range(rows):
        for g in range(groups):
            own = slice(g * d // groups, (g + 1) * d // groups)
            tables[r, g] = best_levels(w[r, own], importance[own], k)
        rounded = torch.from_numpy(tables).to(torch.bfloat16).double().numpy()
        left = w[r].copy()
        for position, i in enumerate(order):
            table = rounded[r, i * groups // d]
            codes[r, i] = np.argmin(np.abs(table - left[i]))
            error = (left[i] - table[codes[r, i]]) / upper[position, position]
            if settings.compensate:
                for later in range(position + 1, d):
                    left[order[later]] -= error * upper[position, later]
    return rounded, codes


@pytest.mark.parametrize(
    "settings",
    [
        SketchSettings(bits=2),
        SketchSettings(bits=3, damping=0.01),
        SketchSettings(bits=2, groups_per_row=2),
        SketchSettings(bits=2, importance_power=0, act_order=False),
        SketchSettings(bits=2, compensate=False, importance_power=2),
    ],
    ids=str,
)
def test_tables_and_codes_are_those_of_the_slow_twin(settings: SketchSettings) -> None:
    weight, hessian = example(5, 14)
    hessian[3, :] = hessian[:, 3] = 0  # a column that no input reaches

    sketch = sketch_matrix(weight, hessian, settings)

    tables, codes = twin(weight, hessian, settings)
    np.testing.assert_array_equal(sketch.tables.double().numpy(), tables)
    np.testing.assert_array_equal(unpack(sketch.codes, settings.bits, 14).numpy(), codes)


@pytest.mark.parametrize(("columns", "groups"), [(300, 1), (256, 4)])
def test_a_pass_over_several_blocks_is_the_plain_loop(columns: int, groups: int) -> None:
    weight, hessian = example(3, columns)
    tables = torch.randn(3, groups, 8, generator=torch.Generator().manual_seed(2)).mul(0.03).sort().values
    factor = factor_hessian(hessian, damping=0.1, act_order=True)

    codes = choose_codes(weight, tables, factor, compensate=True)

    order = sorted(range(columns), key=lambda i: -float(hessian[i, i]))
    assert factor.order.tolist() == order
    damped = hessian.double() + 0.1 * hessian.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = np.linalg.cholesky(np.linalg.inv(damped[order][:, order].numpy())).T
    np.testing.assert_allclose(factor.upper.numpy(), upper, rtol=0, atol=1e-9 * np.abs(upper).max())
    for r in range(3):
        left = weight[r].double().numpy()[order]
        for position, i in enumerate(order):
            table = tables[r, i * groups // columns].double().numpy()
            assert codes[r, i] == np.argmin(np.abs(table - left[position]))
            error = (left[position] - table[codes[r, i]]) / upper[position, position]
            left[position + 1 :] -= error * upper[position, position + 1 :]


PEAK = """
import re
import sys
from pathlib import Path

import torch

from fedzo.sketch.column_pass import factor_hessian

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
columns = int(sys.argv[1])
inputs = torch.randn(columns, columns)
hessian = inputs.T @ inputs
for _ in range(2):  # the first call loads what stays
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    factor_hessian(hessian, damping=0.1, act_order=True)
print((resident("VmHWM") - before) / (8 * columns**2))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_a_hessian_is_factorised_in_two_matrices_of_its_size() -> None:
    """Each of a 7B model's widest layer takes gigabytes."""
    returned_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # memory that was let go is not resident

    done = subprocess.run(
        [sys.executable, "-c", PEAK, "1200"], env=returned_at_once, capture_output=True, text=True, check=True
    )

    assert 1.9 < float(done.stdout) < 2.4


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_compensation_never_makes_the_calibration_loss_worse(bits: int, seed: int) -> None:
    weight, hessian = example(24, 160, seed=seed)

    compensated = sketch_matrix(weight, hessian, SketchSettings(bits=bits))
    nearest = sketch_matrix(weight, hessian, SketchSettings(bits=bits, compensate=False))

    assert torch.equal(compensated.tables, nearest.tables)
    assert compensated.output_error < nearest.output_error


def test_the_errors_are_those_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(6, 20, generator=generator), torch.randn(50, 20, generator=generator)

    sketch = sketch_matrix(weight, hessian_of(inputs), SketchSettings(bits=3))

    change = inputs.double() @ (weight - dense(sketch)).double().T
    outputs = inputs.double() @ weight.double().T
    assert sketch.output_error == pytest.approx(2 * change.square().sum(dim=1).mean().item(), rel=1e-4)
    assert sketch.relative_error == pytest.approx((change.square().sum() / outputs.square().sum()).item(), rel=1e-4)
    used = {(r, int(code)) for r, row in enumerate(unpack(sketch.codes, 3, 20)) for code in row}
    assert sketch.num_unused == 6 * 8 - len(used)


def test_a_row_of_few_values_is_kept_exactly() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.5], [2.0, 2.0, 2.0, 2.0]])  # of bfloat16
    _, hessian = example(1, 4)

    sketch = sketch_matrix(weight, hessian, SketchSettings(bits=2))

    assert torch.equal(dense(sketch), weight)
    assert (sketch.output_error, sketch.relative_error, sketch.num_unused) == (0, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_arguments_give_equal_bits_and_stay_as_they_are(dtype: torch.dtype) -> None:
    weight, hessian = example(8, 130)
    weight = weight.to(dtype)
    before = weight.clone(), hessian.clone()

    a, b = (sketch_matrix(weight, hessian, SketchSettings(groups_per_row=2)) for _ in range(2))

    c = sketch_matrix(weight.T.contiguous().T, hessian, SketchSettings(groups_per_row=2))  # as GPT-2 lays them out

    for other in (b, c):
        assert torch.equal(a.codes, other.codes)
        assert torch.equal(a.tables, other.tables)
    assert (a.tables.dtype, tuple(a.tables.shape), tuple(a.codes.shape)) == (torch.bfloat16, (8, 2, 16), (8, 65))
    assert a.relative_error < 0.05
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_the_scale_of_the_inputs_changes_nothing_beside_columns_that_none_reaches() -> None:
    weight, hessian = example(8, 40)
    hessian[:, :10] = hessian[:10] = 0

    a, b = (sketch_matrix(weight, scale * hessian, SketchSettings(bits=3)) for scale in (1.0, 2.0**-20))

    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.tables, b.tables)
    assert a.output_error == b.output_error * 2**20


def test_without_any_input_each_weight_gets_the_nearest_of_plain_k_means() -> None:
    weight, _ = example(3, 12)

    sketch = sketch_matrix(weight, torch.zeros(12, 12), SketchSettings(bits=2))

    for row, table, of_row in zip(weight, sketch.tables[:, 0].float(), dense(sketch), strict=True):
        levels = torch.tensor(best_levels(row.numpy(), np.ones(12), 4)).to(torch.bfloat16).float()
        assert torch.equal(table, levels)
        assert torch.equal(of_row, levels[(row[:, None] - levels).abs().argmin(dim=1)])
    assert (sketch.output_error, sketch.relative_error) == (0, 0)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_hessian_that_is_not_positive_definite_after_damping_is_refused() -> None:
    weight, hessian = example(2, 6)
    indefinite = hessian - 0.9 * torch.linalg.eigvalsh(hessian)[-1] * torch.eye(6)
    few = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    twins = 2 * (torch.eye(6) + torch.eye(6).flip(0))  # of rank 3; rounding leaves a pivot of 4e-16 in place of 0

    for bad, damping in ((indefinite, 0.1), (hessian_of(few), 0.0), (twins, 0.0)):
        with pytest.raises(
            ConfigError, match=rf"Hessian of 'layers\.0\.o' must be positive .* damping of {damping:g}\."
        ):
            sketch_matrix(weight, bad, SketchSettings(bits=2, damping=damping), name="layers.0.o")
    sketch_matrix(weight, hessian_of(few), SketchSettings(bits=2))


def test_what_is_not_finite_is_refused_with_its_layer() -> None:
    weight, hessian = example(2, 6)
    weight[0, 0], hessian[1, 1] = torch.inf, torch.nan

    with pytest.raises(ConfigError, match=r"the weights of 'o' must be finite, got 1 of 12"):
        sketch_matrix(weight, torch.eye(6), SketchSettings(), name="o")
    with pytest.raises(ConfigError, match=r"the Hessian of 'o' must be finite, got 1 of 36"):
        sketch_matrix(torch.ones(2, 6), hessian, SketchSettings(), name="o")


def test_groups_that_do_not_divide_the_width_are_refused_with_the_layer() -> None:
    weight, hessian = example(2, 6)

    with pytest.raises(ConfigError, match=r"width of 'layers\.3\.down' must be a multiple of groups_per_row=4, got 6"):
        sketch_matrix(weight, hessian, SketchSettings(groups_per_row=4), name="layers.3.down")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3 or 4, got 5"),
        ({"groups_per_row": 0}, "groups_per_row must be >= 1, got 0"),
        ({"damping": -0.1}, r"damping must be >= 0 and finite, got -0\.1"),
        ({"importance_power": float("nan")}, "importance_power must be >= 0 and finite, got nan"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SketchSettings(**settings)
