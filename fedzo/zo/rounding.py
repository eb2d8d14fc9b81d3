"""Stochastic rounding to 16-bit floats as a function of (key, coordinate): the same bits on every peer.

A step of MeZO moves a weight by about 1e-6, far less than half the spacing of its neighbours in bfloat16, so rounding
to nearest undoes it. Rounding up with probability (x - lower) / (upper - lower) keeps the mean: steps add up to what
they would have been (Gupta et al., arXiv 1502.02551). The draws are those of ``docs/explanation-randomness.md``,
purpose 1, under the step's own key.
"""

from __future__ import annotations

import torch

_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's 23 in the significand


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether a float32 loses bits in this dtype."""
    return dtype in _DROPPED_BITS


def round_stochastically(wide: torch.Tensor, draws: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to one of the two neighbours in ``dtype``: away from zero if draw < 65536 (|x| - |lower|) / gap.

    The probability is exact in bfloat16 and in the normal range of float16, which drop at most 16 bits; below that
    range it is rounded up to a multiple of 2^-16. Beyond the largest finite value the upper neighbour is infinity; what
    is not finite is cast. Integer and exact float32 operations only, so every device rounds alike.

    Args:
        wide: float32.
        draws: Uniform on 0 to 65535, int32, of the same shape.
        dtype: bfloat16 or float16.

    Returns:
        The rounded values, of ``dtype``.
    """
    dropped = _DROPPED_BITS[dtype]
    bits = wide.view(torch.int32)
    low = bits & (1 << dropped) - 1
    up = draws < low << 16 - dropped
    rounded = (bits - low + (up.to(torch.int32) << dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 the spacing stays 2^-24
        quotient = wide.abs() * 2.0**24
        lower = quotient.floor()
        above = draws < (quotient - lower) * 65536
        rounded = torch.where(wide.abs() < 2.0**-14, torch.copysign((lower + above) * 2.0**-24, wide), rounded)
    return torch.where(wide.isfinite(), rounded, wide).to(dtype)
