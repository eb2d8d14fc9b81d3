"""From a matrix and the Hessian of its inputs to a sketch: tables, codes, and what they lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedzo.errors import ConfigError
from fedzo.sketch.column_pass import choose_codes, factor_hessian
from fedzo.sketch.packing import check_bits, columns_per_group, decode, pack
from fedzo.sketch.tables import kmeans_1d

TABLE_DTYPE = torch.bfloat16  # of a built table; a trained one is float32


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchSettings:
    """How a matrix is sketched; the defaults are those that LeanQuant recommends.

    Raises:
        ConfigError: A setting is out of its range.
    """

    bits: int = 4
    """Of a code: 2, 3 or 4. A table has 2^bits values."""
    groups_per_row: int = 1
    """Equal and contiguous groups of a row's columns, each with a table of its own."""
    importance_power: float = 4.0
    """p of the columns' importance ``U[i, i]**-p`` in the k-means; 0 weighs all columns alike."""
    damping: float = 0.1
    """Share of the mean diagonal that is added to a Hessian's."""
    act_order: bool = True
    """Whether the columns are rounded from the largest diagonal of the Hessian to the smallest."""
    compensate: bool = True
    """Whether the later columns make good the error of a rounded one; without it codes are the nearest."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.groups_per_row < 1:
            raise ConfigError(f"sketch: groups_per_row must be >= 1, got {self.groups_per_row}. Write 1, 2, 4 or 8.")
        for key in ("importance_power", "damping"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"sketch: {key} must be >= 0 and finite, got {value:g}. Leave it out for the default."
                )


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """A matrix [R, d] as tables and codes; ``fedzo.sketch.decode`` makes it dense again."""

    codes: torch.Tensor
    """Packed as ``fedzo.sketch.packing`` says, uint8 [R, ceil(d * bits / 8)]."""
    tables: torch.Tensor
    """Ascending when built, bfloat16 [R, G, 2^bits]."""
    num_columns: int
    """d."""
    output_error: float
    """tr(D H D^T) with D the matrix less its sketch: twice the mean squared change of the outputs, summed over them."""
    output_energy: float
    """tr(W H W^T), the same of the outputs themselves."""
    num_unused: int
    """Values of the tables that no code names."""

    @property
    def relative_error(self) -> float:
        """``output_error / output_energy``; 0 where there is neither."""
        return self.output_error / self.output_energy if self.output_energy else 0.0


def sketch_matrix(
    weight: torch.Tensor, hessian: torch.Tensor, settings: SketchSettings, *, name: str = "weight"
) -> Sketch:
    """Sketch a matrix (SpaLLM, arXiv 2410.06364; the builder is LeanQuant's, 2407.10032).

    The tables are fitted to the weights as they are, with the importance of their columns. They are rounded to 16 bits
    before codes are chosen, so the column pass makes this rounding good, too. Equal arguments give equal bits on one
    machine.

    Args:
        weight: Floating point [R, d], outputs by inputs; on a CPU, as all of this.
        hessian: (2 / n) sum x x^T over the n inputs x [d] of the calibration, float32 or float64 [d, d]; not changed.
        settings: How.
        name: The layer, for errors.

    Raises:
        ConfigError: The groups do not divide d; the weights or the Hessian are not finite, or the Hessian is not
            positive definite after damping.
    """
    matrix = weight.detach().float().contiguous()
    width = columns_per_group(matrix.shape[1], settings.groups_per_row, name=name)
    factor = factor_hessian(hessian, damping=settings.damping, act_order=settings.act_order, name=name)
    importance = factor.importance(settings.importance_power)
    levels = [
        kmeans_1d(matrix[:, low : low + width].numpy(), importance[low : low + width], 2**settings.bits, name=name)
        for low in range(0, matrix.shape[1], width)
    ]
    tables = torch.stack([torch.from_numpy(of_group) for of_group in levels], dim=1).to(TABLE_DTYPE)
    codes = choose_codes(matrix, tables, factor, compensate=settings.compensate)
    packed = pack(codes, settings.bits)
    difference = matrix - decode(packed, tables, torch.empty_like(matrix))
    return Sketch(
        codes=packed,
        tables=tables,
        num_columns=matrix.shape[1],
        output_error=_quadratic(difference, hessian),
        output_energy=_quadratic(matrix, hessian),
        num_unused=_num_unused(codes, tables),
    )


def _quadratic(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(M H M^T)."""
    return float(((matrix @ hessian.float()) * matrix).sum(dtype=torch.float64))


def _num_unused(codes: torch.Tensor, tables: torch.Tensor) -> int:
    used = torch.zeros(tables.shape, dtype=torch.bool)
    return used.numel() - int(used.scatter_(2, codes.view(*tables.shape[:2], -1).long(), True).sum())
