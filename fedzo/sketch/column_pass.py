"""Choosing the codes of a matrix column by column, each rounding error made good by the columns that come after it.

With H = (2 / n) sum x x^T over the inputs x of a layer, the error of its outputs is tr(D H D^T), where D is the
difference of the weights. GPTQ (arXiv 2210.17323) lowers it greedily: with H^-1 = U^T U, U upper triangular, it rounds
column i and takes e U[i, j] from each later column j, where e = (w_i - rounded) / U[i, i]. LeanQuant (2407.10032)
rounds to the row's table in place of a grid; SpaLLM (2410.06364) builds its sketches so.

Columns are taken from the largest diagonal of H to the smallest (act-order); groups stay those of the original columns
(static groups). Deviation: a column that no calibration input reaches counts as one of average and independent inputs.
GPTQ sets its diagonal to 1, whatever the scale of the others, and its weights to 0, which a text to come may need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import torch

from fedzo.errors import ConfigError
from fedzo.sketch.tables import Floats, check_finite

_BLOCK = 128  # columns whose errors reach the columns beyond the block by one product


class Factor(NamedTuple):
    """A damped Hessian as the column pass needs it."""

    order: torch.Tensor
    """Original index of each column in the order of the pass, int64 [d]."""
    upper: torch.Tensor
    """U of H^-1 = U^T U in this order, float64 [d, d], upper triangular."""

    def importance(self, power: float) -> Floats:
        """``U[i, i]**-power`` of the columns in their original order, relative to the largest; float64 [d].

        An error of column i costs the square of e = error / U[i, i], a power of 2. LeanQuant recommends 3 or 4, so that
        outliers are kept.
        """
        diagonal = self.upper.diagonal()
        weights = torch.empty_like(diagonal)
        weights[self.order] = (diagonal / diagonal.min()) ** -power
        return weights.numpy()


def factor_hessian(hessian: torch.Tensor, *, damping: float, act_order: bool, name: str = "weight") -> Factor:
    """Damp a Hessian by ``damping`` times its mean diagonal and factorise its inverse.

    U is the inverse of the upper triangular R of H = R R^T, which is the Cholesky factor of H with both axes reversed.
    Of the float64 [d, d] that this takes, two are in memory at a time: of a wide layer each is as large as a model.

    Args:
        hessian: float32 or float64 [d, d], symmetric; not changed.
        damping: 0.1 adds a tenth of the mean diagonal.
        act_order: From the largest diagonal to the smallest; otherwise in their own order.
        name: The matrix, for errors.

    Raises:
        ConfigError: The Hessian is not finite, or not positive definite after damping.
    """
    check_finite(hessian.numpy(), f"the Hessian of {name!r}")
    diagonal = hessian.diagonal().to(torch.float64, copy=True)
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    reverse = order.flip(0)
    damped = hessian[reverse][:, reverse].double()
    damped.diagonal().copy_(diagonal[reverse] + damping * diagonal.mean())
    noise = len(order) * torch.finfo(torch.float64).eps * damped.diagonal()
    lower, minor = torch.linalg.cholesky_ex(damped)
    del damped
    if int(minor) or bool((lower.diagonal() ** 2 <= noise).any()):  # what rounding alone leaves of a 0 is no pivot
        raise ConfigError(
            f"sketch: the Hessian of {name!r} must be positive definite after damping, got one that is not with a "
            f"damping of {damping:g}. Raise the damping, or give more calibration text."
        )
    inverse = torch.eye(len(order), dtype=torch.float64).mT  # column by column, as LAPACK overwrites it
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return Factor(order, torch.from_numpy(inverse.numpy()[::-1, ::-1].copy()))


def choose_codes(weight: torch.Tensor, tables: torch.Tensor, factor: Factor, *, compensate: bool) -> torch.Tensor:
    """The index of a table's value for each weight; of equally near ones the lowest.

    Args:
        weight: float32 [R, d].
        tables: [R, G, k]; fixed during the pass.
        factor: Of the layer's Hessian.
        compensate: Without it each weight gets the value that is nearest to itself.

    Returns:
        uint8 [R, d], below k.
    """
    num_columns = weight.shape[1]
    upper = factor.upper if compensate else factor.upper.diagonal().diag()
    group_of = factor.order // (num_columns // tables.shape[1])
    values, left = tables.double().numpy(), weight.double()[:, factor.order]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for low in range(0, num_columns, _BLOCK):
        block = slice(low, low + _BLOCK)
        here = left[:, block].contiguous()
        chosen, errors = torch.empty(here.shape, dtype=torch.uint8), torch.empty_like(here)
        within, groups = upper[block, block].contiguous().numpy(), group_of[block].numpy()
        _round_block(here.numpy(), within, values, groups, chosen.numpy(), errors.numpy())
        codes[:, factor.order[block]] = chosen
        left[:, low + _BLOCK :] -= errors @ upper[block, low + _BLOCK :]
    return codes


@nb.njit(parallel=True, cache=True)
def _round_block(weights: Any, upper: Any, tables: Any, groups: Any, codes: Any, errors: Any) -> None:
    """Round the columns of ``weights`` [R, b] in turn; ``errors`` gets their e, ``codes`` their codes."""
    for row in nb.prange(weights.shape[0]):
        left = weights[row]
        for i in range(left.size):
            table = tables[row, groups[i]]
            least, code = np.inf, 0
            for j in range(table.size):
                distance = abs(left[i] - table[j])
                if distance < least:
                    least, code = distance, j
            error = (left[i] - table[code]) / upper[i, i]
            codes[row, i], errors[row, i] = code, error
            for j in range(i + 1, left.size):
                left[j] -= error * upper[i, j]
